"""The length of a training in optimizer steps, as its Trainer will count them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_optim.build import OptimConfig, get_schedule, long_warmup, resolve_warmup
from lightning_optim.trainer import _packages as packages


@dataclass(frozen=True)
class Length:
    """The optimizer steps of warm-up and of the whole training (``None``: it has no end, or that is not needed)."""

    warmup: int
    total: int | None

    @classmethod
    def of(cls, trainer: Trainer | None, config: OptimConfig) -> Length:
        """Returns what ``config`` needs; raises InvalidOption for a warm-up as a fraction of an endless training."""
        asked = (config, *config.parts.values())
        needed = any(
            one.warmup_steps or (one.lr_scheduler is not None and get_schedule(one.lr_scheduler).needs_total)
            for one in asked
        )
        total = total_steps(trainer) if trainer is not None and needed else None
        return cls(resolve_warmup(config.warmup_steps, total), total)

    @property
    def warning(self) -> str:
        """A warning if the warm-up takes the whole training, else an empty string."""
        return long_warmup(self.warmup, self.total)


def total_steps(trainer: Trainer) -> int | None:
    """Returns the optimizer steps of the whole training, from its first epoch on; ``None`` if it has no end.

    ``trainer.estimated_stepping_batches`` assumes the current gradient accumulation for all epochs, and is -1 for
    epochs of unknown length.
    """
    estimate = trainer.estimated_stepping_batches
    if estimate in (-1, math.inf):
        return None
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    # With several, the last one wins in every epoch.
    plans = [callback for callback in callbacks if isinstance(callback, packages.kin(GradientAccumulationScheduler))]
    if not plans or epochs in (None, -1) or batches == math.inf:
        return int(estimate)
    limit = math.inf if trainer.max_steps == -1 else trainer.max_steps
    steps, epoch = 0, 0
    while epoch < max(epochs or 0, 1) and steps < limit:
        steps += math.ceil(batches / plans[-1].get_accumulate_grad_batches(epoch))
        epoch += 1
    return int(min(steps, limit))
