"""Warns of an optimizer that needs support from a Trainer that does not know of it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_optim._compat.lightning import running_trainer
from lightning_optim.layerwise import Layerwise
from lightning_optim.stepping import averaging_parts
from lightning_optim.trainer.callbacks._layerwise import LayerwiseCallback
from lightning_optim.trainer.callbacks._schedule_free import ScheduleFreeCallback


def watch(optimizer: Optimizer, name: str) -> None:
    """Checks an optimizer that ``build_optimizer`` made: now, or at its first step if no Trainer is running yet."""
    if _needs(optimizer) is None:
        return
    trainer = running_trainer()
    if trainer is not None:
        _warn(trainer, optimizer, name)
        return

    asked = False

    def at_first_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # It stays: torch iterates over the hooks while they run, so a hook must not remove itself.
        nonlocal asked
        trainer = None if asked else running_trainer()
        asked = True
        if trainer is not None:
            _warn(trainer, optimizer, name)

    optimizer.register_step_pre_hook(at_first_step)


def _needs(optimizer: Optimizer) -> tuple[type, str] | None:
    """Returns the callback that the optimizer needs in a Trainer, and what happens without it."""
    if averaging_parts(optimizer):
        return ScheduleFreeCallback, "it is validated and saved at its training point, not at the averaged weights"
    if Layerwise.of(optimizer) is not None:
        return LayerwiseCallback, "it steps after backward, with all gradients in memory"
    return None


def _warn(trainer: Trainer, optimizer: Optimizer, name: str) -> None:
    needs = _needs(optimizer)
    if needs is None or any(isinstance(callback, needs[0]) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return
    rank_zero_warn(
        f"optim={name!r} was built by build_optimizer in a module's own code, and nobody told the Trainer: {needs[1]}. "
        "Add Trainer(callbacks=[OptimCallback()]), or build it with self.build_optimizer (OptimMixin)."
    )
