"""Checkpoints are written whole or not at all, and only whole ones are read.

Lightning writes to the folder for temporary files. Where that is on another disk, what it then calls a move is a copy:
interrupted, it leaves a part in the place of the file before. Nor does it wait for the disk, and torch reads changed
bytes as if they were right.

Old files may contain torchao's quantized tensors. Lightning cannot read such files back: the classes are unknown to
``weights_only=True`` until torchao is imported, and torch refuses Lightning's callable ``map_location`` for them. Files
written with this package hold plain tensors.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_optim._compat.lightning import WrappingCheckpointIO
from lightning_optim._compat.torch import refuses_wrapper_subclass
from lightning_optim.files import (
    cannot_write,
    check_file,
    missing,
    no_checkpoint,
    raise_explained,
    refuse_folder,
    written_whole,
)
from lightning_optim.table import TORCHAO, availability
from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer.callbacks._attached import Attached


def is_old_style(error: BaseException) -> bool:
    """Whether reading a checkpoint failed because of torchao's tensors."""
    return "torchao" in str(error) or refuses_wrapper_subclass(error)


def import_torchao() -> None:
    """Makes torchao's classes known to ``torch.load``; raises MissingDependency if it is not installed."""
    availability.ensure("the checkpoint, which holds torchao tensors,", TORCHAO)
    importlib.import_module("torchao.optim")


class CheckpointFiles(Attached):
    """Has ``fit``, ``validate``, ``test`` and ``predict`` write and read files as described above.

    The mixin and :class:`~lightning_optim.OptimCallback` attach it automatically.
    """

    def __init__(self) -> None:
        self._original: CheckpointIO | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._original is None:
            self._original = trainer.strategy.checkpoint_io
            trainer.strategy.checkpoint_io = _WholeFiles(self._original)

    def _detach(self, trainer: Trainer) -> None:
        if self._original is not None:
            trainer.strategy.checkpoint_io = self._original
            self._original = None
        # The module returns a new one for every run, and Lightning warns if it finds the previous one.
        super()._detach(trainer)


class _WholeFiles(WrappingCheckpointIO):
    """Delegates to the original, with files that are whole; reads with torchao imported if it fails for its tensors.

    The XLA strategies accept no other wrapper class around their own.
    """

    def teardown(self) -> None:
        # The base class does not delegate this, and an asynchronous original waits for its files here.
        assert self.checkpoint_io is not None
        self.checkpoint_io.teardown()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        # Others may write elsewhere, later, or in a form of their own.
        if type(self.checkpoint_io) not in packages.kin(TorchCheckpointIO) or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as beside:
                super().save_checkpoint(checkpoint, beside, storage_options)
        except OSError as error:
            raise type(error)(error.errno, cannot_write(path, error)) from error

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        check_one_file(path)
        # None is not passed on: the original may have another default.
        given = {"map_location": map_location, "weights_only": weights_only}
        given = {name: value for name, value in given.items() if value is not None}
        held = self._load(path, given)
        foreign = no_checkpoint(path, held)
        if foreign is not None:
            raise foreign
        return held

    def _load(self, path: Any, given: dict[str, Any]) -> dict[str, Any]:
        try:
            return super().load_checkpoint(path, **given)
        except Exception as error:
            if not is_old_style(error):
                raise_explained(path, error)
        import_torchao()
        return super().load_checkpoint(path, **{**given, "map_location": "cpu"})


def check_one_file(path: Any) -> None:
    """Raises UnreadableCheckpoint if one whole file is not what a path leads to; lets others tell what is not there."""
    gone = missing(Path(path)) if isinstance(path, (str, os.PathLike)) else None
    if gone is not None:
        raise gone
    refuse_folder(path)
    check_file(path)


def _is_local(path: Any) -> bool:
    return "://" not in str(path)
