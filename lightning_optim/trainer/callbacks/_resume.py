"""Resumes the requested schedule from a checkpoint, or refuses to, before the first batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch.optim import Optimizer

from lightning_optim._compat.lightning import loaded_checkpoint, restore_data
from lightning_optim.build import INITIAL_LR, LR, SCHEDULE, KnowsItsName, other_schedule, written_by
from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer.callbacks._attached import Attached


class ResumeCallback(Attached):
    """Compares the run's schedule with the checkpoint's once both are restored, then removes itself.

    Lightning pairs schedulers with saved states one by one, and does not report a missing one.
    """

    def __init__(self, optimizer: Optimizer, schedule: KnowsItsName | None, overrides: Sequence[str]) -> None:
        self._optimizer = optimizer
        self._schedule = schedule
        self._overrides = overrides
        # The states of the checkpoint's schedules; None without a checkpoint.
        self._states: list[dict[str, Any]] | None = None
        if schedule is not None:
            schedule.replaces = SCHEDULE in overrides

    def attach(self, trainer: Trainer) -> None:
        """Attaches the callback to the fit that is being set up."""
        # Most strategies read the checkpoint before the optimizers are made; others call on_load_checkpoint later.
        checkpoint = loaded_checkpoint(trainer)
        if checkpoint:
            self._read(trainer, checkpoint)
        self._put_first(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._read(trainer, checkpoint)

    def _read(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        if not averaging_began(trainer, checkpoint):
            self._states = checkpoint.get("lr_schedulers")

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach(trainer)
        restore_data(trainer)
        if self._states is not None:
            self._go_on(self._states, trainer.global_step)

    def _go_on(self, states: list[dict[str, Any]], step: int) -> None:
        schedule, replaces = self._schedule, SCHEDULE in self._overrides
        if schedule is None:
            if not states:
                return
            if not replaces:
                raise other_schedule(None, written_by(states[0]) or "one that counts steps")
            for group in self._optimizer.param_groups:
                # From here on nothing changes it: the rate is the peak.
                group[LR] = group.pop(INITIAL_LR, group[LR])
        elif not schedule.resumed:
            if not replaces:
                raise other_schedule(schedule.name, None)
            schedule.begin(step)
        elif LR in self._overrides and schedule.last_epoch and not hasattr(schedule, "num_bad_epochs"):
            schedule.begin(schedule.last_epoch)


def averaging_began(trainer: Trainer, checkpoint: dict[str, Any]) -> bool:
    """Whether StochasticWeightAveraging, which is among the callbacks, wrote the state of its own schedule.

    It has then taken the place of the requested one, and does again when the run goes on.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    averaging = (one for one in callbacks if isinstance(one, packages.kin(StochasticWeightAveraging)))
    states = (checkpoint.get("callbacks", {}).get(one.state_key) or {} for one in averaging)
    return any(state.get("scheduler_state") is not None for state in states)
