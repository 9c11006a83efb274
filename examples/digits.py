"""Classifies scikit-learn's handwritten digits with a small convolutional network.

Any optimizer, by name::

    python examples/digits.py fit --config examples/digits.yaml --optim schedule_free_adamw
"""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_optim import OptimCLI, OptimMixin

CLASSES = 10


class DigitClassifier(OptimMixin, LightningModule):
    """Two convolutions with BatchNorm and a linear layer.

    Args:
        channels: Channels of the first convolution; the second has twice as many.
        **optim: ``optim``, ``lr``, ``weight_decay`` ...: see :class:`lightning_optim.OptimMixin`.
    """

    def __init__(self, channels: int = 16, **optim: Any) -> None:
        super().__init__(**optim)
        self.save_hyperparameters()
        self.network = nn.Sequential(
            *self._convolution(1, channels),
            *self._convolution(channels, 2 * channels),
            nn.Flatten(),
            nn.Linear(2 * channels * 2 * 2, CLASSES),
        )
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

    @staticmethod
    def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        """Returns layers that halve the image's height and width."""
        convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
        return convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits of the ten digits."""
        return self.network(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        loss = cross_entropy(self(images), digits)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, digits = batch
        logits = self(images)
        self.accuracy.update(logits, digits)
        self.log("val_loss", cross_entropy(logits, digits), prog_bar=True)
        self.log("val_accuracy", self.accuracy, prog_bar=True)


class Digits(LightningDataModule):
    """1797 grey images of 8x8 pixels that ship with scikit-learn; a fifth is for validation."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        images, digits = load_digits(return_X_y=True)
        pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        train, val = train_test_split(range(len(digits)), test_size=0.2, stratify=digits, random_state=0)
        labels = torch.tensor(digits)
        self.train, self.val = (TensorDataset(pixels[part], labels[part]) for part in (train, val))
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, len(self.val))


if __name__ == "__main__":
    OptimCLI(DigitClassifier, Digits)
