"""The same module with ``OptimMixin``: what it trained with is arguments."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_optim import OptimMixin


class Classifier(OptimMixin, LightningModule):
    """A perceptron for digits."""

    def __init__(self, width: int = 64, **optim: Any) -> None:
        super().__init__(**optim)
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(64, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        loss = cross_entropy(self.network(images), digits)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, digits = batch
        self.log("val_loss", cross_entropy(self.network(images), digits))
