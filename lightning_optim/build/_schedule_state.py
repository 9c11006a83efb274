"""A schedule's state names its schedule: one kind of schedule never reads the counters of another."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_optim._compat.torch import STEP_SCHEDULE_STATE
from lightning_optim.errors import InvalidOption

_NAME = "name"
PLATEAU = "reduce_lr_on_plateau"
# How the text for a schedule that has no name here begins.
_FOREIGN = "another package's schedule"
# Attributes of this run alone.
_TRANSIENT = frozenset({"resumed", "replaces"})
_SETTINGS = (
    "mode",
    "factor",
    "patience",
    "threshold",
    "threshold_mode",
    "cooldown",
    "eps",
    "min_lrs",
    "default_min_lr",
)


def written_by(state: Mapping[str, Any]) -> str | None:
    """Returns the name of the schedule that wrote a state; ``None`` if it can be any that counts steps."""
    if _NAME in state:
        return str(state[_NAME])
    if "num_bad_epochs" in state:
        return PLATEAU
    others = sorted(set(state) - STEP_SCHEDULE_STATE)
    return f"{_FOREIGN} (its state has {', '.join(others)})" if others else None


def other_schedule(asked: str | None, written: str | None) -> InvalidOption:
    """Returns the error for a run whose schedule is not the checkpoint's; ``None`` stands for none."""
    foreign = written is not None and written.startswith(_FOREIGN)
    given = written if foreign else f"lr_scheduler={written!r}"
    resume = "what makes that one: the callback or the module's own schedule" if foreign else given
    return InvalidOption(
        f"lr_scheduler={asked!r}, and the checkpoint was written with {given}: the learning rate would follow neither. "
        f"Resume with {resume}; or pass override_on_resume=['lr_scheduler'] to "
        "go on with what was asked, at the step of the checkpoint; or start anew from its weights: "
        "LitModel.load_from_checkpoint(path).",
        code="LO809",
    )


class KnowsItsName(LRScheduler):
    """Mixin for a schedule that refuses the state of another.

    Attributes:
        name: The schedule's name.
        resumed: Whether a state was loaded.
        replaces: Whether it takes the place of the schedule that wrote the checkpoint.
    """

    name: str
    resumed = False
    replaces = False

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key not in _TRANSIENT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads as torch does.

        Raises:
            InvalidOption: If another schedule wrote the state; nothing is loaded if this one replaces it.
        """
        written = written_by(state_dict)
        if written != self.name and not (written is None and self.name != PLATEAU):
            if self.replaces:
                return
            raise other_schedule(self.name, written)
        super().load_state_dict(self._taken(state_dict))
        self.resumed = True

    def _taken(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, _NAME: self.name}

    def begin(self, step: int) -> None:
        """Continues at a step from the groups' peaks (``initial_lr``)."""
        raise NotImplementedError


class Plateau(KnowsItsName, ReduceLROnPlateau):
    """``torch.optim.lr_scheduler.ReduceLROnPlateau`` that stores each group's initial rate as ``initial_lr``.

    Its settings come from the checkpoint, with a warning if others were asked for, unless it ``replaces`` those.
    """

    def __init__(self, optimizer: Optimizer, **settings: Any) -> None:
        self.name = PLATEAU
        for group in optimizer.param_groups:
            remember_peak(group)
        super().__init__(optimizer, **settings)

    def _taken(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in _SETTINGS if hasattr(self, key)}
        differing = [key for key, value in own.items() if key in state_dict and state_dict[key] != value]
        if differing and not self.replaces:
            texts = (f"{key}={state_dict[key]!r} (asked: {own[key]!r})" for key in differing)
            warnings.warn(
                f"lr_scheduler={self.name!r} resumes with the checkpoint's settings: {', '.join(texts)}. To go on with "
                "what was asked, pass override_on_resume=['lr_scheduler'].",
                UserWarning,
                stacklevel=3,
            )
        return super()._taken({**state_dict, **(own if self.replaces else {})})

    def begin(self, step: int) -> None:
        """Starts over: the metric's history is unknown."""
        for group in self.optimizer.param_groups:
            set_rate(group, float(group.get("initial_lr", group["lr"])))


def remember_peak(group: dict[str, Any]) -> float:
    """Returns a group's peak, which is its current rate if it has none yet, and is then stored."""
    if "initial_lr" not in group:
        group["initial_lr"] = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
    return float(group["initial_lr"])


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Sets a group's learning rate; a tensor is filled in place, since a compiled step reads it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
