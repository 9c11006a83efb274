"""A small GPT that learns the Python documentation byte by byte: what is trained where nobody names a module.

The text ships with CPython. ``examples/gpt.py`` is its command line.
"""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.text import Perplexity

from lightning_optim.trainer import OptimMixin

VOCABULARY = 256


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each adding to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        fed: Tensor = self.feed_forward(self.feed_forward_norm(x))
        return x + fed

    def attention(self, x: Tensor) -> Tensor:
        """Mixes every position with those before it."""
        heads = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each: batch, head, position, width of a head
        mixed = scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        out: Tensor = self.attention_out(mixed.transpose(1, 2).flatten(2))
        return out


def rotate(x: Tensor) -> Tensor:
    """Turns pairs of features by angles that grow with the position, so that attention sees distances (RoPE)."""
    positions = torch.arange(x.shape[-2], device=x.device)
    frequencies = 1000.0 ** -torch.linspace(0, 1, x.shape[-1] // 2, device=x.device)
    angles = torch.outer(positions, frequencies)
    cos, sin = angles.cos().type_as(x), angles.sin().type_as(x)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


class GPT(OptimMixin, LightningModule):
    """A decoder-only transformer over bytes, whose optimizer is named by its caller.

    Args:
        layers: Number of blocks.
        width: Size of the residual stream.
        heads: Attention heads per block; each has ``width / heads`` features, an even number.
        **optim: ``optim``, ``lr``, ``weight_decay``, ``lr_scheduler`` ...: see :class:`lightning_optim.OptimMixin`.
    """

    def __init__(self, layers: int = 3, width: int = 128, heads: int = 4, **optim: Any) -> None:
        super().__init__(**optim)
        self.save_hyperparameters()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight  # tied: one parameter with two names
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.perplexity = Perplexity()

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits of each position's next byte."""
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(tokens))))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits, targets = self.logits_and_targets(batch)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits, targets = self.logits_and_targets(batch)
        self.log("val_loss", cross_entropy(logits.flatten(0, 1), targets.flatten()), prog_bar=True)
        self.perplexity.update(logits, targets)
        self.log("val_perplexity", self.perplexity)

    def logits_and_targets(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the logits and the bytes that they should predict."""
        (tokens,) = batch
        return self(tokens[:, :-1]), tokens[:, 1:]

    @torch.no_grad()
    def sample(self, prompt: str, length: int = 300, temperature: float = 0.8, context: int = 128) -> str:
        """Continues a text.

        Args:
            prompt: Its beginning.
            length: Bytes to add.
            temperature: Below 1 it takes fewer risks than the model's probabilities suggest.
            context: Bytes it looks back; what it was trained with.
        """
        tokens = torch.tensor([list(prompt.encode())], device=self.device)
        for _ in range(length):
            logits = self(tokens[:, -context:])[:, -1]
            following = torch.multinomial((logits / temperature).softmax(-1), num_samples=1)
            tokens = torch.cat([tokens, following], dim=1)
        return bytes(tokens[0].tolist()).decode(errors="replace")


class PythonTopics(LightningDataModule):
    """The texts behind Python's ``help()`` as windows of bytes; the last tenth is for validation.

    Args:
        context: Bytes to predict per window.
        batch_size: Windows per batch.
    """

    def __init__(self, context: int = 128, batch_size: int = 16) -> None:
        super().__init__()
        text = "".join(topics[name] for name in sorted(topics))
        windows = torch.tensor(list(text.encode())).unfold(0, context + 1, context)
        split = int(0.9 * len(windows))
        self.train, self.val = TensorDataset(windows[:split]), TensorDataset(windows[split:])
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        # An order of its own, so that every optimizer sees the same batches, whatever random numbers it draws.
        order = torch.Generator().manual_seed(torch.initial_seed())
        return DataLoader(self.train, self.batch_size, shuffle=True, generator=order)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, 4 * self.batch_size)
