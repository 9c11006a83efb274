"""Warns that an optimizer moved nothing, because its learning rate was always 0."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optim.trainer.callbacks._attached import Attached


class Standstill(Attached):
    """Warns once per optimizer, after an epoch in which its learning rate was 0 in every step and still is.

    Its cost is a look at the groups, until the first step of an epoch that moves something.
    """

    def __init__(self) -> None:
        self._names: dict[Optimizer, str] = {}
        self._handles: list[RemovableHandle] = []
        # Steps of this epoch while none has moved anything, then None.
        self._idle: dict[Optimizer, int | None] = {}

    @classmethod
    def watch(cls, trainer: Trainer, optimizer: Optimizer, name: str) -> None:
        """Watches an optimizer in the fit that is being set up; ``name`` is what the user typed to get it."""
        callback = cls._of(trainer)
        callback._names[optimizer] = name
        callback._handles.append(optimizer.register_step_pre_hook(callback._before_step))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._idle = dict.fromkeys(self._names, 0)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        idle = self._idle.get(optimizer)
        if idle is not None:
            self._idle[optimizer] = idle + 1 if _stands_still(optimizer) else None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer, steps in self._idle.items():
            if steps and _stands_still(optimizer):
                rank_zero_warn(
                    f"{self._names.pop(optimizer)} had the learning rate 0 in all {steps} steps of epoch "
                    f"{trainer.current_epoch} and has it still: it moves nothing. A schedule that would raise it has "
                    "to be stepped; one that has come to its end stays there in a run that resumes it; without a "
                    "schedule give lr > 0."
                )
        self._idle = {}

    def _detach(self, trainer: Trainer) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        super()._detach(trainer)


def _stands_still(optimizer: Optimizer) -> bool:
    return all(float(group["lr"]) == 0 for group in optimizer.param_groups)
