"""Learning rates of a schedule that was made for another optimizer, for one that takes its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_optim._compat.torch import mark_as_stepped
from lightning_optim.errors import IncompatibleTrainer

# Beside the state of the other schedule, whose keys are its own.
_RATES = "followed_rates"


def peak_rate(optimizer: Optimizer) -> float:
    """Returns the highest learning rate among the groups: ``OneCycleLR``'s maximum, else what it was built with."""
    return max(_peak(group) for group in optimizer.param_groups)


class FollowingSchedule(LRScheduler):
    """Multiplies every group's peak by what another schedule makes of the peak of its own optimizer.

    The other schedule goes on changing the optimizer that it was made for, which nobody steps. Whatever it is (one of
    torch's, several in a row, one of the module's own), its attributes and methods are found here, and its state is
    this one's: a checkpoint moves between a run with the other optimizer and a run with this one.

    Args:
        optimizer: The optimizer that trains; each group's current ``lr`` is its peak.
        followed: The schedule to follow.
        replaced: The optimizer that ``followed`` was made for.

    Raises:
        IncompatibleTrainer: If a group holds parameters that have different learning rates in ``replaced``.
    """

    def __init__(self, optimizer: Optimizer, followed: Any, replaced: Optimizer) -> None:
        # Without LRScheduler's own __init__, which would take a first step.
        self.optimizer = optimizer
        self.followed = followed
        self._replaced = replaced
        # Otherwise torch warns of a schedule that is stepped before its optimizer.
        mark_as_stepped(replaced)
        self._peak = peak_rate(replaced)
        self._group_of = {p: group for group in replaced.param_groups for p in group["params"]}
        for group in optimizer.param_groups:
            _remember_peak(group)
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
        """Returns a method of the other schedule, which may change its rates, as timm's ``step_update`` does."""

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            self._follow()
            return result

        return call

    def _follow(self) -> None:
        for group in self.optimizer.param_groups:
            rate = _remember_peak(group) * self._factor(group)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _factor(self, group: dict[str, Any]) -> float:
        factors = {float(other["lr"]) / self._peak for other in self._followed_groups(group)}
        if len(factors) > 1:
            name = group.get("name", "one")
            raise IncompatibleTrainer(
                f"lr_scheduler='module': the module's own {type(self._replaced).__name__} has groups with different "
                f"learning rates, and the group {name!r} of {type(self.optimizer).__name__} has parameters of several. "
                "Divide them with param_groups={'NAME.*': {'lr': ...}, ...}, or build optimizer and schedule in "
                "configure_optimizers with self.build_optimizer (OptimMixin)."
            )
        return factors.pop()

    def _followed_groups(self, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
        known = [self._group_of[p] for p in group["params"] if p in self._group_of]
        # What was added later, as finetuning callbacks do, goes with the group of the highest rate.
        yield from known or [max(self._replaced.param_groups, key=_peak)]


def _peak(group: dict[str, Any]) -> float:
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def _remember_peak(group: dict[str, Any]) -> float:
    if "initial_lr" not in group:
        group["initial_lr"] = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
    return float(group["initial_lr"])
