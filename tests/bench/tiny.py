"""A module and data of a few milliseconds, and one that a user interrupts."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader

from tests.models import ForeignTokens, LitTokens, loader

#: The environment variable that says in which training step Ctrl-C is pressed, counted over all fits.
PRESS_AT = "BENCH_TEST_PRESS_AT"


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return loader(batches=4, batch_size=4)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(batches=1, batch_size=8, seed=1)


class OtherData(Data):
    """The same, under another name."""


class Tokens(LitTokens):
    """Presses Ctrl-C in the step that the environment names."""

    def __init__(self, width: int = 16, **optim: Any) -> None:
        super().__init__(width, **optim)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        left = int(os.environ.get(PRESS_AT, "0"))
        if left:
            os.environ[PRESS_AT] = str(left - 1)
            if left == 1:
                os.kill(os.getpid(), signal.SIGINT)
        return super().training_step(batch, batch_idx)


class Foreign(ForeignTokens):
    """Without OptimMixin and validation, with an optimizer of its own that must not train."""
