"""A schedule made for one optimizer, followed by another that takes its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_optim._compat.torch import mark_as_stepped
from lightning_optim.build._schedule_state import remember_peak, set_rate
from lightning_optim.errors import IncompatibleTrainer

# Key next to the state of the followed schedule.
_RATES = "followed_rates"


def peak_rate(optimizer: Optimizer) -> float:
    """Returns the highest learning rate among the groups: ``OneCycleLR``'s maximum, else what it was built with."""
    return max(_peak(group) for group in optimizer.param_groups)


class FollowingSchedule(LRScheduler):
    """Multiplies every group's peak by the factor that another schedule gives the peak of its own optimizer.

    The followed schedule keeps changing the optimizer it was made for, which is never stepped. It may be any kind (one
    of torch's, a chain, the module's own); its attributes and methods are available here, and its state is this one's,
    so a checkpoint can be moved between a run with the other optimizer and a run with this one.

    Args:
        optimizer: The optimizer that trains; each group's current ``lr`` is its peak.
        followed: The schedule to follow.
        replaced: The optimizer that ``followed`` was made for.

    Raises:
        IncompatibleTrainer: If a group holds parameters that have different learning rates in ``replaced``.
    """

    def __init__(self, optimizer: Optimizer, followed: Any, replaced: Optimizer) -> None:
        # Skips LRScheduler's __init__, which would take a first step.
        self.optimizer = optimizer
        self.followed = followed
        self._replaced = replaced
        # Otherwise torch warns of a schedule that is stepped before its optimizer.
        mark_as_stepped(replaced)
        self._peak = peak_rate(replaced)
        self._group_of = {p: group for group in replaced.param_groups for p in group["params"]}
        for group in optimizer.param_groups:
            remember_peak(group)
        self._follow()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Steps the schedule that is followed, with a metric if it takes one."""
        self.followed.step(*args, **kwargs)
        self._follow()

    def get_last_lr(self) -> list[float | Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {**self.followed.state_dict(), _RATES: [group["lr"] for group in self._replaced.param_groups]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rates = state_dict.get(_RATES, state_dict.get("_last_lr", ()))
        self.followed.load_state_dict({name: value for name, value in state_dict.items() if name != _RATES})
        for group, rate in zip(self._replaced.param_groups, rates, strict=False):
            group["lr"] = rate

    def __getattr__(self, name: str) -> Any:
        if name in ("followed", "_replaced"):  # while it is being copied
            raise AttributeError(name)
        value = getattr(self.followed, name)
        return self._followed_by(value) if callable(value) else value

    def _followed_by(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a method of the followed schedule that may change its rates, as timm's ``step_update`` does."""

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            self._follow()
            return result

        return call

    def _follow(self) -> None:
        for group in self.optimizer.param_groups:
            set_rate(group, remember_peak(group) * self._factor(group))

    def _factor(self, group: dict[str, Any]) -> float:
        factors = {float(other["lr"]) / self._peak for other in self._followed_groups(group)}
        if len(factors) > 1:
            name = group.get("name", "one")
            raise IncompatibleTrainer(
                f"lr_scheduler='module': the module's own {type(self._replaced).__name__} has groups with different "
                f"learning rates, and the group {name!r} of {type(self.optimizer).__name__} has parameters of several. "
                "Divide them with param_groups={'NAME.*': {'lr': ...}, ...}, or build optimizer and schedule in "
                "configure_optimizers with self.build_optimizer (OptimMixin).",
                code="LO416",
            )
        return factors.pop()

    def _followed_groups(self, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
        known = [self._group_of[p] for p in group["params"] if p in self._group_of]
        # Parameters added later, as finetuning callbacks do, follow the group with the highest rate.
        yield from known or [max(self._replaced.param_groups, key=_peak)]


def _peak(group: dict[str, Any]) -> float:
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))
