"""Writing distributed checkpoints beside, and reading only whole ones.

Lightning and torch write into the folder itself. Where one of that name is there, such as ``last.ckpt``, an
interruption leaves parts of both. And what the pickles in a folder say is run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_optim._compat.lightning import saves_shards
from lightning_optim.errors import UnreadableCheckpoint
from lightning_optim.files import UNFINISHED, cannot_write, check_shards, written_whole_folder

if TYPE_CHECKING:
    _Base = ModelParallelStrategy
else:
    _Base = object


class WritesWholeFolders(_Base):
    """Mixin for our strategies."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        save_whole(self, super().save_checkpoint, checkpoint, filepath, storage_options)


def write_whole_folders(strategy: ModelParallelStrategy) -> None:
    """Makes a strategy of Lightning's write as ours do."""
    if isinstance(strategy, WritesWholeFolders) or "save_checkpoint" in vars(strategy):
        return
    save = strategy.save_checkpoint

    def save_checkpoint(
        self: ModelParallelStrategy, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        save_whole(self, save, checkpoint, filepath, storage_options)

    strategy.save_checkpoint = MethodType(save_checkpoint, strategy)  # type: ignore[method-assign]


def save_whole(
    strategy: ModelParallelStrategy,
    save: Callable[..., None],
    checkpoint: dict[str, Any],
    filepath: Any,
    storage_options: Any,
) -> None:
    """Saves a checkpoint by Lightning's method: a folder beside the one of its name, which it then replaces."""
    if not saves_shards(strategy) or storage_options is not None:
        save(checkpoint, filepath, storage_options)
        return
    path = Path(strategy.broadcast(filepath))
    beside = path.with_name(path.name + UNFINISHED)
    if strategy.is_global_zero:
        shutil.rmtree(beside, ignore_errors=True)
    strategy.barrier()
    try:
        save(checkpoint, beside, storage_options)
    except BaseException:  # torch's own is no Exception
        if strategy.is_global_zero:
            shutil.rmtree(beside, ignore_errors=True)
        raise
    strategy.barrier()
    failed = None
    if strategy.is_global_zero:
        try:
            written_whole_folder(beside, path)
        except OSError as error:
            failed = cannot_write(path, error)
    failed = strategy.broadcast(failed)
    if failed is not None:
        raise OSError(failed)


def check_folder(strategy: ModelParallelStrategy, path: Path) -> None:
    """Raises :class:`UnreadableCheckpoint` in all processes if one finds that a distributed checkpoint is not whole."""
    wrong: UnreadableCheckpoint | None = None
    try:
        check_shards(path, strategy.global_rank, strategy.world_size)
    except UnreadableCheckpoint as error:
        wrong = error
    found = [wrong]
    if strategy.world_size > 1 and dist.is_initialized():
        found = [None] * strategy.world_size
        dist.all_gather_object(found, wrong)
    first = next((each for each in found if each is not None), None)
    if first is not None:
        raise wrong or first
