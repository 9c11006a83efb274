"""The schedule of a resolved optimizer; parts may follow curves of their own."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_optim.build._factory import ResolvedOptimizer
from lightning_optim.build._schedule_state import Plateau
from lightning_optim.build._schedules import Multiplier, NamedSchedule, make_multiplier, make_schedule, resolve_warmup

_CONSTANT = "constant"


def schedule_of(resolved: ResolvedOptimizer, total_steps: int | None) -> NamedSchedule | Plateau | None:
    """Makes the schedule that an optimizer was asked for with, one for all its parts; ``None`` if there is none.

    Args:
        resolved: The optimizer.
        total_steps: Optimizer steps of the whole training.

    Raises:
        InvalidOption: If an argument of a schedule is wrong, missing or would be ignored.
    """
    config, curves = resolved.request.config, curves_of(resolved, total_steps)
    if not curves:
        if config.lr_scheduler is None:
            return None
        warmup = _warmup(resolved, total_steps)
        return make_schedule(resolved.optimizer, config.lr_scheduler, total_steps, warmup, config.lr_scheduler_args)
    return NamedSchedule(resolved.optimizer, main_curve(resolved, total_steps), schedule_text(resolved), curves)


def curves_of(resolved: ResolvedOptimizer, total_steps: int | None) -> Mapping[str, Multiplier]:
    """Returns the curves of the parts that do not follow the main optimizer's, by part."""
    return {part.request.name: _curve(part, total_steps) for part in resolved.parts[1:] if _has_its_own(part, resolved)}


def schedule_text(resolved: ResolvedOptimizer) -> str:
    """Returns the names of the schedules that the optimizer and its parts follow."""
    own = [part for part in resolved.parts[1:] if _has_its_own(part, resolved)]
    names = [f"{part.request.name}: {part.request.config.lr_scheduler or _CONSTANT}" for part in own]
    return "; ".join((resolved.request.config.lr_scheduler or (_CONSTANT if own else "none"), *names))


def main_curve(resolved: ResolvedOptimizer, total_steps: int | None) -> Multiplier:
    """Returns the curve of the main optimizer and of the parts without one of their own."""
    return _curve(resolved.each[0], total_steps)


def _has_its_own(part: ResolvedOptimizer, whole: ResolvedOptimizer) -> bool:
    """Whether a part follows a curve of its own; one that averages its iterates does not follow the others'."""
    scheduled = any(other.request.config.lr_scheduler is not None for other in whole.each)
    return part.request.config.lr_scheduler is not None or (part.spec.averages_weights and scheduled)


def _curve(part: ResolvedOptimizer, total_steps: int | None) -> Multiplier:
    name, config = part.request.config.lr_scheduler or _CONSTANT, part.request.config
    return make_multiplier(part.optimizer, name, total_steps, _warmup(part, total_steps), config.lr_scheduler_args)


def _warmup(part: ResolvedOptimizer, total_steps: int | None) -> int:
    # An optimizer that warms up by itself has its warm-up already.
    return resolve_warmup(part.request.config.warmup_steps, total_steps) if part.spec.warmup == "schedule" else 0
