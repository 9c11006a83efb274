"""Learning-rate schedules by Hugging Face's names, equal to ``transformers.get_scheduler`` step by step.

Each schedule is a row of :data:`~lightning_optim.build._curves.SCHEDULES`: its options and a function of the step. The
function is not part of its state, so a checkpoint stores a schedule's position but not its length: resuming with a
larger ``max_steps`` stretches the schedule to the new length, as Hugging Face's Trainer does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_optim._compat.torch import set_last_rates, set_step_count
from lightning_optim.build._curves import MODULE_SCHEDULE, SCHEDULES, get_schedule
from lightning_optim.build._schedule_state import KnowsItsName, Plateau, set_rate
from lightning_optim.errors import InvalidOption, listing
from lightning_optim.stepping import PART
from lightning_optim.table import convert, parse


def parse_warmup(warmup_steps: Any) -> int | float:
    """Returns ``warmup_steps`` as a count (int) or a fraction below 1 (float), else raises InvalidOption."""
    try:
        number = convert(warmup_steps, float)
    except (TypeError, ValueError):
        number = math.nan
    if 0 < number < 1:
        return float(number)
    if number >= 0 and math.isfinite(number) and number == int(number):
        return int(number)
    raise InvalidOption(
        f"warmup_steps={warmup_steps!r}: a whole number of steps or a fraction of the training below 1 is allowed",
        code="LO209",
    )


def resolve_warmup(warmup_steps: int | float, total_steps: int | None) -> int:
    """Returns the number of warm-up steps, rounded up; raises InvalidOption for a fraction of an unknown length."""
    warmup = parse_warmup(warmup_steps)
    if isinstance(warmup, int):
        return warmup
    if total_steps is None:
        raise InvalidOption(
            f"warmup_steps={warmup_steps!r} is a fraction of a training whose length is unknown; set "
            "Trainer(max_steps=...) or Trainer(max_epochs=...), or give a number of steps",
            code="LO210",
        )
    return math.ceil(total_steps * warmup)


Multiplier = Callable[[int], float]
_Options = Mapping[str, Any] | str | None


class NamedSchedule(KnowsItsName):
    """Multiplies every group's peak by a function of the step.

    Like ``torch.optim.lr_scheduler.LambdaLR``, except for groups added during training, as finetuning callbacks do:
    a learning rate set on such a group, then or later, holds for that step, and the schedule continues from there.

    Args:
        optimizer: The optimizer; each group's current ``lr`` is its peak.
        multiplier: The function.
        name: The schedule's name.
        curves: Other functions, for the groups of parts of the optimizer, by part.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        multiplier: Multiplier,
        name: str,
        curves: Mapping[str, Multiplier] | None = None,
    ) -> None:
        self.name = name
        self._multiplier = multiplier
        self._curves = dict(curves or {})
        self._first = len(optimizer.param_groups)
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        self._follow_added_groups()
        groups = self.optimizer.param_groups
        return [group["initial_lr"] * self._factor(group, self.last_epoch) for group in groups]

    def start_anew(
        self, multiplier: Multiplier, peaks: Sequence[float], curves: Mapping[str, Multiplier] | None = None
    ) -> None:
        """Continues from the current step along other curves, with other peaks, one per group."""
        self._multiplier = multiplier
        self._curves = self._curves if curves is None else dict(curves)
        rates = []
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
            rates.append(peak * self._factor(group, self.last_epoch))
            set_rate(group, rates[-1])
            group["initial_lr"] = peak
        self.base_lrs = list(peaks)
        set_last_rates(self, rates)

    def begin(self, step: int) -> None:
        self.last_epoch = step
        set_step_count(self, step + 1)
        # A checkpoint written without a schedule holds no peaks: its rates are the peaks.
        peaks = [float(group.get("initial_lr", group["lr"])) for group in self.optimizer.param_groups]
        self.start_anew(self._multiplier, peaks)

    def _follow_added_groups(self) -> None:
        """Computes the peak of an added group from the rate that was set on it since the last step."""
        for index, group in enumerate(self.optimizer.param_groups[self._first :], self._first):
            known = index < len(self.get_last_lr()) and "initial_lr" in group
            if not known or float(group["lr"]) != float(self.get_last_lr()[index]):
                # At the start of a warm-up the factor is 0, and the peak cannot be computed.
                group["initial_lr"] = group["lr"] / (self._factor(group, self.last_epoch - 1) or 1.0)

    def _factor(self, group: Mapping[str, Any], step: int) -> float:
        return self._curves.get(group.get(PART, ""), self._multiplier)(step)

    def state_dict(self) -> dict[str, Any]:
        own = ("_multiplier", "_curves", "_first")
        return {name: value for name, value in super().state_dict().items() if name not in own}


def build_schedule(
    optimizer: Optimizer,
    name: str,
    total_steps: int | None = None,
    warmup_steps: int | float = 0,
    args: Mapping[str, Any] | str | None = None,
) -> LRScheduler | ReduceLROnPlateau:
    """Makes a learning-rate schedule to be stepped after every optimizer step.

    ``reduce_lr_on_plateau`` is stepped with the metric instead, after every validation.

    Args:
        optimizer: The optimizer; each group's current ``lr`` is its peak.
        name: One of :data:`~lightning_optim.build._curves.SCHEDULES`.
        total_steps: Optimizer steps of the whole training.
        warmup_steps: Steps of the linear rise from 0, or a fraction of ``total_steps``.
        args: The schedule's own options, a mapping or ``"name=value,..."``.

    Raises:
        UnknownSchedule: If there is no such schedule.
        InvalidOption: If an argument is wrong, missing or would be ignored.
    """
    schedule = make_schedule(optimizer, name, total_steps, warmup_steps, args)
    if isinstance(schedule, NamedSchedule):
        too_long = long_warmup(resolve_warmup(warmup_steps, total_steps), total_steps)
        if too_long:
            warnings.warn(too_long, stacklevel=2)
    return schedule


def make_schedule(
    optimizer: Optimizer, name: str, total_steps: int | None, warmup_steps: int | float, args: _Options
) -> NamedSchedule | Plateau:
    """Does the work of :func:`build_schedule`, without its warning."""
    spec = get_schedule(name)
    if spec is MODULE_SCHEDULE:
        raise InvalidOption(
            f"lr_scheduler={name!r} keeps the schedule of a LightningModule; without one there are "
            f"{listing(SCHEDULES)}",
            code="LO212",
        )
    if spec.multiplier is None:
        _check_warmup(name, warmup_steps)
        return Plateau(optimizer, **parse(spec.options, args, name).select("group"))
    return NamedSchedule(optimizer, make_multiplier(optimizer, name, total_steps, warmup_steps, args), name)


def make_multiplier(
    optimizer: Optimizer, name: str, total_steps: int | None, warmup_steps: int | float, args: _Options
) -> Multiplier:
    """Returns the factor on the peak as a function of the step. Raises: see :func:`build_schedule`."""
    spec = get_schedule(name)
    options = parse(spec.options, args, name)
    if spec.needs_total and total_steps is None and getattr(options, "num_stable_steps", None) is None:
        raise InvalidOption(
            f"lr_scheduler={name!r} needs the length of the training; set Trainer(max_steps=...) or "
            "Trainer(max_epochs=...), or pass total_steps",
            code="LO210",
        )
    _check_warmup(name, warmup_steps)
    warmup = resolve_warmup(warmup_steps, total_steps)
    peak = float(optimizer.defaults["lr"])
    options.check_peak(peak)
    assert spec.multiplier is not None
    return partial(spec.multiplier, warmup=warmup, total=total_steps or 0, options=options, peak=peak)


def long_warmup(warmup: int, total: int | None) -> str:
    """Returns a warning if the warm-up takes the whole training, else an empty string."""
    if not warmup or total is None or warmup < total:
        return ""
    return (
        f"the warm-up has {warmup} steps and the whole training {total}: the learning rate never reaches its peak. Set "
        "warmup_steps to fewer steps, or to a fraction such as 0.1."
    )


def _check_warmup(name: str, warmup_steps: int | float) -> None:
    if warmup_steps and not get_schedule(name).warms_up:
        instead = "'constant_with_warmup'" if name == "constant" else "another lr_scheduler, such as 'linear'"
        raise InvalidOption(
            f"lr_scheduler={name!r} has no warm-up, but warmup_steps={warmup_steps!r}; use {instead}", code="LO211"
        )
