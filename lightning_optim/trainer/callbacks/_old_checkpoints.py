"""Reads checkpoints that contain torchao's quantized tensors, as plain Lightning writes them.

Lightning cannot read such files back: the classes are unknown to ``weights_only=True`` until torchao is imported, and
torch refuses Lightning's callable ``map_location`` for them. Files written with this package hold plain tensors.
"""

from __future__ import annotations

import importlib
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer

from lightning_optim._compat.lightning import WrappingCheckpointIO
from lightning_optim._compat.torch import refuses_wrapper_subclass
from lightning_optim.table import TORCHAO, availability
from lightning_optim.trainer.callbacks._attached import Attached


def is_old_style(error: BaseException) -> bool:
    """Whether reading a checkpoint failed because of torchao's tensors."""
    return "torchao" in str(error) or refuses_wrapper_subclass(error)


def import_torchao() -> None:
    """Makes torchao's classes known to ``torch.load``; raises MissingDependency if it is not installed."""
    availability.ensure("the checkpoint, which holds torchao tensors,", TORCHAO)
    importlib.import_module("torchao.optim")


class OldCheckpoints(Attached):
    """Lets ``fit``, ``validate``, ``test`` and ``predict`` read old-style checkpoints of torchao's optimizers.

    The mixin and :class:`~lightning_optim.OptimCallback` attach it automatically.
    """

    def __init__(self) -> None:
        self._original: CheckpointIO | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._original is None:
            self._original = trainer.strategy.checkpoint_io
            trainer.strategy.checkpoint_io = _ReadsTorchao(self._original)

    def _detach(self, trainer: Trainer) -> None:
        if self._original is not None:
            trainer.strategy.checkpoint_io = self._original
            self._original = None
        # The module returns a new one for every run, and Lightning warns if it finds the previous one.
        super()._detach(trainer)


class _ReadsTorchao(WrappingCheckpointIO):
    """Delegates to the original, and retries with torchao imported if reading fails for its tensors.

    The XLA strategies accept no other wrapper class around their own.
    """

    def teardown(self) -> None:
        # The base class does not delegate this, and an asynchronous original waits for its files here.
        assert self.checkpoint_io is not None
        self.checkpoint_io.teardown()

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        # None is not passed on: the original may have another default.
        given = {"map_location": map_location, "weights_only": weights_only}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            return super().load_checkpoint(path, **given)
        except Exception as error:
            if not is_old_style(error):
                raise
        import_torchao()
        return super().load_checkpoint(path, **{**given, "map_location": "cpu"})
