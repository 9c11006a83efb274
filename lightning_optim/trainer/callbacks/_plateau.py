"""Steps ``reduce_lr_on_plateau`` after every validation, which Lightning's intervals cannot express."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_optim._compat.lightning import has_data, loaded_checkpoint, logged_results
from lightning_optim.errors import InvalidOption, listing
from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer.callbacks._attached import Attached

_KEY = "plateau_follows_validation"


class PlateauCallback(Attached):
    """Steps a plateau schedule after every validation, or at the end of every epoch if training logs the metric.

    Lightning steps it at the end of an epoch, after ModelCheckpoint has saved: never in an epoch without an end, and a
    run resumed from the file has lost that step. Here the file includes it.
    """

    def __init__(self, scheduler: ReduceLROnPlateau, monitor: str) -> None:
        self._scheduler = scheduler
        self._monitor = monitor
        # None until a validation has shown whether it logs the metric.
        self._follows_validation: bool | None = None
        # The Trainer, after an epoch whose metric is not logged yet.
        self._due: Trainer | None = None

    @classmethod
    def attach(cls, trainer: Trainer, scheduler: ReduceLROnPlateau, monitor: str) -> None:
        """Lets the fit that is being set up step ``scheduler``."""
        callback = cls(scheduler, monitor)
        callback._follows_validation = loaded_checkpoint(trainer).get(_KEY)
        # First: before ModelCheckpoint saves.
        callback._put_first(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self._is_in_use(trainer):
            return
        loops = trainer.fit_loop.epoch_loop
        self._follows_validation = self._monitor in _logged(logged_results(loops.val_loop))
        if self._follows_validation:
            self._step(trainer)
        elif not (
            self._monitor in {*_logged(logged_results(loops)), *trainer.callback_metrics}
            or any(map(_ends_epochs, _users(trainer)))
            or packages.is_overridden("on_train_epoch_end", pl_module)
        ):
            raise self._missing({*_logged(logged_results(loops)), *trainer.callback_metrics})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._follows_validation or not self._is_in_use(trainer):
            return
        if self._monitor in trainer.callback_metrics:
            self._step(trainer)
        elif not trainer.fit_loop.restarting:
            # The module's own on_train_epoch_end, which comes next, may log it.
            self._due = trainer
        elif self._follows_validation is False:
            rank_zero_warn(
                f"lr_scheduler='reduce_lr_on_plateau' is not asked at the end of epoch {trainer.current_epoch}: the "
                f"checkpoint was saved before that epoch's {self._monitor!r} was there. Resume from files of "
                "ModelCheckpoint(save_on_train_epoch_end=True), or watch a metric of the validation."
            )

    def state_dict(self) -> dict[str, Any]:
        # A checkpoint is being saved; the states of optimizer and schedule are read after this.
        self._settle()
        return {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(final=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(final=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_KEY] = self._follows_validation

    def _settle(self, final: bool = False) -> None:
        """Steps for the epoch that ended; finally the metric must be there, unless no validation was due yet."""
        trainer = self._due
        if trainer is None:
            return
        logged = self._monitor in trainer.callback_metrics
        if logged or final:
            self._due = None
        if logged:
            self._step(trainer)
        elif final and (self._follows_validation is False or not has_data(trainer.fit_loop.epoch_loop.val_loop)):
            raise self._missing(trainer.callback_metrics)

    def _is_in_use(self, trainer: Trainer) -> bool:
        """Whether the schedule is still the Trainer's: StochasticWeightAveraging puts its own in the place."""
        return any(config.scheduler is self._scheduler for config in trainer.lr_scheduler_configs)

    def _step(self, trainer: Trainer) -> None:
        trainer.lightning_module.lr_scheduler_step(self._scheduler, trainer.callback_metrics[self._monitor])

    def _missing(self, logged: Iterable[str]) -> InvalidOption:
        names = listing(sorted(logged)) or "nothing"
        return InvalidOption(
            f"lr_scheduler='reduce_lr_on_plateau' watches {self._monitor!r}, which nobody logs; logged is {names}. Set "
            f"lr_scheduler_args={{'monitor': ...}} to one of them, or call self.log({self._monitor!r}, ...) in "
            "validation_step.",
            code="LO529",
        )


def lightning_config(scheduler: ReduceLROnPlateau, monitor: str) -> dict[str, Any]:
    """Returns what to tell Lightning: it knows the schedule, for ``lr_schedulers()`` and monitors, never steps it.

    Not even as one for plateaus: BatchSizeFinder counts its first batch as 0, which is due at any frequency, and has no
    metric.
    """
    never = {"interval": "step", "frequency": sys.maxsize, "reduce_on_plateau": False}
    return {"scheduler": scheduler, "monitor": monitor, **never}


def _logged(results: Any) -> set[str]:
    """Returns the names under which a loop has logged."""
    return {name for on_step in (True, False) for name in results.metrics(on_step)["callback"]}


def _ends_epochs(callback: Callback) -> bool:
    """Whether a callback may log something at the end of an epoch."""
    return type(callback).on_train_epoch_end not in {base.on_train_epoch_end for base in packages.kin(Callback)}


def _users(trainer: Trainer) -> list[Callback]:
    """Returns the callbacks that are neither Lightning's nor ours."""
    known, callbacks = packages.LIGHTNING | {"lightning_optim"}, trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if packages.top(type(callback)) not in known]
