"""Small models and data that the tests train on."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import OptimMixin

TOKENS, WIDTH, LENGTH = 16, 64, 8


class TokenModel(nn.Module):
    """Embedding, block with norm and bias, head; the large matrix has 4096 elements, enough to be quantized."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width)
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        return self.head(self.norm(hidden + F.gelu(self.linear(hidden))))


class LitTokens(OptimMixin, L.LightningModule):
    """Learns to predict ``(3 * token + 1) % TOKENS``."""

    def __init__(self, width: int = WIDTH, **optim: Any) -> None:
        super().__init__(**optim)
        self.save_hyperparameters()
        self.model = TokenModel(width)
        self.losses: list[float] = []

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def _loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(self(tokens).flatten(0, 1).float(), targets.flatten())

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.losses.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self.log("test_loss", self._loss(batch))

    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(-1)


class ForeignTokens(L.LightningModule):
    """The same task without OptimMixin, with an optimizer of its own."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.model = TokenModel(width)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def loader(batches: int = 10, batch_size: int = 16, seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    """A fixed sequence of batches."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, TOKENS, (batches * batch_size, LENGTH), generator=generator)
    return DataLoader(TensorDataset(tokens, (3 * tokens + 1) % TOKENS), batch_size=batch_size)


def fp16_mixed() -> MixedPrecision:
    """Float16 autocast with a real GradScaler; Trainer(precision="16-mixed") on a CPU would become bf16-mixed."""
    return MixedPrecision("16-mixed", "cpu")


def trainer(**kwargs: Any) -> L.Trainer:
    """A quiet CPU Trainer without logger and checkpoints, unless asked for."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": -1,
    }
    return L.Trainer(**{**defaults, **kwargs})
