"""Shapes of well-known transformers, and a model in plain torch that has them, for who has no module yet."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_optim.errors import InvalidOption, listing

Kind = Literal["llama", "gpt2", "bert", "vit"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer.

    Attributes:
        kind: ``"llama"``: RMSNorm, rotary positions, a gated MLP, no biases, a head of its own. ``"gpt2"``: LayerNorm,
            learned positions, biases, a tied head. ``"bert"``: the same with the norms behind, and a head that predicts
            every token. ``"vit"``: patches of an image in place of tokens, and a head over classes.
        hidden: Width of the residual stream.
        layers: Number of blocks.
        heads: Attention heads.
        intermediate: Width inside of the MLP.
        vocab: Tokens; for ``"vit"`` classes.
        length: Tokens of a sequence; for ``"vit"`` patches and the class token.
        kv_heads: Heads of keys and values; ``None`` for as many as ``heads``.
        source: Where the sizes are from.
    """

    kind: Kind
    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int
    length: int
    kv_heads: int | None = None
    source: str = "given"

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "heads", "intermediate", "vocab", "length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InvalidOption(f"{name}={value!r} of a shape is no whole number of at least 1", code="LO901")
        if self.hidden % self.heads or (self.kind == "llama" and self.hidden // self.heads % 2):
            raise InvalidOption(
                f"hidden={self.hidden} is not divided into heads={self.heads} of the same"
                f"{' even' if self.kind == 'llama' else ''} width: change one of them",
                code="LO901",
            )
        if self.heads % (self.kv_heads or self.heads):
            raise InvalidOption(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}", code="LO901")


_GALORE = "configs/ of https://github.com/jiaweizzhao/GaLore"
_LLAMA = "LLaMA, https://arxiv.org/abs/2302.13971, table 2; width of the MLP and vocabulary: its released configs"
_GPT2 = "https://huggingface.co/openai-community/gpt2 and its larger ones, config.json"
_BERT = "BERT, https://arxiv.org/abs/1810.04805"
_VIT = "An Image is Worth 16x16 Words, https://arxiv.org/abs/2010.11929, table 1; patches of 16 pixels, images of 224"
_VIT_LENGTH = (224 // 16) ** 2 + 1


def _llama(hidden: int, layers: int, heads: int, intermediate: int, source: str, length: int = 2048) -> Shape:
    return Shape("llama", hidden, layers, heads, intermediate, 32000, length, source=source)


def _wide(kind: Kind, hidden: int, layers: int, heads: int, vocab: int, length: int, source: str) -> Shape:
    return Shape(kind, hidden, layers, heads, 4 * hidden, vocab, length, source=source)


#: The shapes that have a name.
SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "llama-60m": _llama(512, 8, 8, 1376, _GALORE, 1024),
        "llama-130m": _llama(768, 12, 12, 2048, _GALORE, 1024),
        "llama-350m": _llama(1024, 24, 16, 2736, _GALORE, 1024),
        "llama-1b": _llama(2048, 24, 32, 5461, _GALORE, 1024),
        "llama-7b": _llama(4096, 32, 32, 11008, _LLAMA),
        "llama-13b": _llama(5120, 40, 40, 13824, _LLAMA),
        "llama-70b": Shape(
            "llama", 8192, 80, 64, 28672, 32000, 4096, 8, "Llama 2, https://arxiv.org/abs/2307.09288, and its config"
        ),
        "llama3-8b": Shape(
            "llama", 4096, 32, 32, 14336, 128256, 8192, 8, "The Llama 3 Herd, https://arxiv.org/abs/2407.21783, table 3"
        ),
        "gpt2": _wide("gpt2", 768, 12, 12, 50257, 1024, _GPT2),
        "gpt2-medium": _wide("gpt2", 1024, 24, 16, 50257, 1024, _GPT2),
        "gpt2-large": _wide("gpt2", 1280, 36, 20, 50257, 1024, _GPT2),
        "gpt2-xl": _wide("gpt2", 1600, 48, 25, 50257, 1024, _GPT2),
        "bert-base": _wide("bert", 768, 12, 12, 30522, 512, _BERT),
        "bert-large": _wide("bert", 1024, 24, 16, 30522, 512, _BERT),
        "vit-b": _wide("vit", 768, 12, 12, 1000, _VIT_LENGTH, _VIT),
        "vit-l": _wide("vit", 1024, 24, 16, 1000, _VIT_LENGTH, _VIT),
    }
)


def find_shape(name: str) -> Shape:
    """Returns the shape that has this name.

    Raises:
        InvalidOption: If none has it.
    """
    if name not in SHAPES:
        near = difflib.get_close_matches(name, SHAPES, n=4) or list(SHAPES)
        raise InvalidOption(
            f"there is no shape {name!r}; known are {listing(near)}. Or give sizes: Shape(...)", code="LO902"
        )
    return SHAPES[name]


class Transformer(nn.Module):
    """A transformer of a shape, whose ``forward`` returns the training loss.

    Attention is ``scaled_dot_product_attention``, so that no scores are kept; the loss is taken of float32 logits of
    all tokens at once. There is no dropout. What a model of yours does otherwise, its own estimate shows.

    Args:
        shape: The sizes.
        activation_checkpointing: Whether each block keeps its input alone and runs again in backward.
    """

    def __init__(self, shape: Shape, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.activation_checkpointing = activation_checkpointing
        width = shape.hidden
        if shape.kind == "vit":
            self.embedding: nn.Module = nn.Conv2d(3, width, 16, 16)
            self.first = nn.Parameter(torch.zeros(1, 1, width))
        else:
            self.embedding = nn.Embedding(shape.vocab, width)
        if shape.kind != "llama":
            self.positions = nn.Embedding(shape.length, width)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.layers))
        self.norm = _norm(shape)
        self.head = nn.Linear(width, shape.vocab, bias=shape.kind in ("vit", "bert"))
        if shape.kind in ("gpt2", "bert"):
            assert isinstance(self.embedding, nn.Embedding)
            self.head.weight = self.embedding.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the loss of token numbers ``[batch, length]``, or of images ``[batch, 3, 224, 224]``."""
        hidden = self.embedding(inputs)
        if self.shape.kind == "vit":
            hidden = torch.cat([self.first.expand(len(hidden), -1, -1), hidden.flatten(2).mT], dim=1)
        if self.shape.kind != "llama":
            hidden = hidden + self.positions(torch.arange(hidden.shape[1], device=hidden.device))
        if self.shape.kind == "bert":
            hidden = self.norm(hidden)
        for block in self.blocks:
            hidden = _checkpointed(block, hidden) if self.activation_checkpointing else block(hidden)
        if self.shape.kind != "bert":
            hidden = self.norm(hidden)
        logits = self.head(hidden[:, 0] if self.shape.kind == "vit" else hidden)
        # The values do not matter here, and targets of another token would cut the logits into views.
        targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        return functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


class _Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        bias = shape.kind != "llama"
        self.behind = shape.kind == "bert"
        self.heads, self.kv_heads = shape.heads, shape.kv_heads or shape.heads
        self.width = shape.hidden // shape.heads
        self.rotary = self.gated = shape.kind == "llama"
        self.causal = shape.kind in ("llama", "gpt2")
        self.attention_norm, self.mlp_norm = _norm(shape), _norm(shape)
        self.query = nn.Linear(shape.hidden, shape.hidden, bias)
        self.key = nn.Linear(shape.hidden, self.kv_heads * self.width, bias)
        self.value = nn.Linear(shape.hidden, self.kv_heads * self.width, bias)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias)
        if self.gated:
            self.gate = nn.Linear(shape.hidden, shape.intermediate, bias)
        self.up = nn.Linear(shape.hidden, shape.intermediate, bias)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.behind:
            hidden = self.attention_norm(hidden + self._attention(hidden))
            out: Tensor = self.mlp_norm(hidden + self._mlp(hidden))
            return out
        hidden = hidden + self._attention(self.attention_norm(hidden))
        return hidden + self._mlp(self.mlp_norm(hidden))

    def _attention(self, hidden: Tensor) -> Tensor:
        query, key, value = (
            layer(hidden).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if self.rotary:
            query, key = _rotated(query), _rotated(key)
        grouped = self.heads != self.kv_heads
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal, enable_gqa=grouped)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def _mlp(self, hidden: Tensor) -> Tensor:
        wide = functional.silu(self.gate(hidden)) * self.up(hidden) if self.gated else functional.gelu(self.up(hidden))
        out: Tensor = self.down(wide)
        return out


def _norm(shape: Shape) -> nn.Module:
    return nn.RMSNorm(shape.hidden) if shape.kind == "llama" else nn.LayerNorm(shape.hidden)


def _rotated(heads: Tensor) -> Tensor:
    """Returns queries or keys ``[batch, heads, length, width]`` turned by their positions."""
    length, width = heads.shape[-2:]
    frequencies = 10000 ** (-torch.arange(0, width, 2, device=heads.device) / width)
    angles = torch.arange(length, device=heads.device)[:, None] * frequencies
    cosine, sine = (values.repeat(1, 2).to(heads.dtype) for values in (angles.cos(), angles.sin()))
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-second, first], dim=-1) * sine


def _checkpointed(block: nn.Module, hidden: Tensor) -> Tensor:
    # Nothing in a block is random.
    out: Tensor = checkpoint(block, hidden, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
    return out
