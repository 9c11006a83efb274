"""Applies what Lightning's finders find to the optimizer and schedule that were built before they ran."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_optim._compat.lightning import finder_sets_rate, loaded_checkpoint
from lightning_optim.build import (
    NamedSchedule,
    OptimConfig,
    ResolvedOptimizer,
    curves_of,
    main_curve,
    resolve_warmup,
    set_rate,
)
from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer._length import Length
from lightning_optim.trainer.callbacks._attached import Attached

_FINDERS = (LearningRateFinder, BatchSizeFinder)


@dataclass(frozen=True)
class Built:
    """An optimizer with its schedule, and the request they were built for."""

    resolved: ResolvedOptimizer
    config: OptimConfig
    schedule: NamedSchedule | ReduceLROnPlateau | None = None

    def adjust(self, trainer: Trainer, found: float | None) -> None:
        """Makes it what it would be if built now, with ``found`` instead of the requested learning rate."""
        optimizer, config = self.resolved.optimizer, self.config
        length = Length.of(trainer, config)
        if length.warning:
            rank_zero_warn(length.warning)
        for part in self.resolved.each:
            if part.spec.warmup == "optimizer":
                warmup = resolve_warmup(part.request.config.warmup_steps, length.total)
                for group in (*part.optimizer.param_groups, part.optimizer.defaults):
                    group["warmup_steps"] = warmup
        if found is not None:
            set_rate(self.resolved.each[0].optimizer.defaults, found)
            set_rate(optimizer.defaults, found)
        peaks = self.resolved.rates(self.resolved.lr if found is None else found)
        # Groups added since then have their own rate.
        peaks += [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups[len(peaks) :]]
        if isinstance(self.schedule, NamedSchedule):
            curves = curves_of(self.resolved, length.total)
            self.schedule.start_anew(main_curve(self.resolved, length.total), peaks, curves)
        elif found is not None:
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                set_rate(group, peak)


class AfterFinders(Attached):
    """Applies what ``LearningRateFinder`` and ``BatchSizeFinder`` found, after they have run.

    They run when fit starts, after the optimizer was built. A found learning rate replaces the requested one: groups
    keep their proportions or their own rates, and it becomes the schedule's peak. Lengths are counted again for the new
    batch size.
    """

    def __init__(self) -> None:
        self._built: list[Built] = []
        self._seen: dict[LearningRateFinder, object] = {}

    @classmethod
    def attach(cls, trainer: Trainer, built: Built) -> None:
        """Has ``built`` adjusted if the Trainer's callbacks include a finder."""
        if not has_finder(trainer):
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        callback = next((callback for callback in callbacks if isinstance(callback, cls)), None)
        if callback is None:
            callback = cls()
            # What an earlier fit found.
            finders = (other for other in callbacks if isinstance(other, packages.kin(LearningRateFinder)))
            callback._seen = {finder: finder.optimal_lr for finder in finders}
            # After the finders.
            callbacks.append(callback)
        callback._built.append(built)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = self._found(trainer)
        for built in self._built:
            built.adjust(trainer, found)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A subclass may search for a rate in the middle of training.
        found = self._found(trainer)
        for built in self._built if found is not None else ():
            built.adjust(trainer, found)

    def _found(self, trainer: Trainer) -> float | None:
        """Returns the rate that a finder has set since the last time, or ``None``."""
        found = None
        for finder in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(finder, packages.kin(LearningRateFinder)) and finder.optimal_lr is not self._seen.get(finder):
                self._seen[finder] = finder.optimal_lr
                if finder.optimal_lr is not None and finder_sets_rate(finder):
                    found = finder.optimal_lr.suggestion()
        return found


def has_finder(trainer: Trainer) -> bool:
    """Whether a finder is among the Trainer's callbacks."""
    return any(isinstance(callback, packages.kin(*_FINDERS)) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def forgetful_finder(trainer: Trainer) -> str:
    """Returns the class name of a finder that would run while a checkpoint is being resumed, or an empty string.

    It restores its own file, and Lightning forgets the checkpoint before optimizer and progress are read.
    """
    if not loaded_checkpoint(trainer):
        return ""
    hooks = {finder.on_fit_start for finder in packages.kin(*_FINDERS)}
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((type(c).__name__ for c in callbacks if type(c).on_fit_start in hooks), "")
