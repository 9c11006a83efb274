"""Learning-rate schedules by Hugging Face's names, equal to ``transformers.get_scheduler`` step by step.

Each schedule is a row: its options and a function of the step. The function is no part of its state, so a checkpoint
stores a schedule's position but not its length: resuming a run with a larger ``max_steps`` stretches the schedule to
the new length, as Hugging Face's Trainer does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_optim.errors import InvalidOption, UnknownSchedule, close_names, listing
from lightning_optim.options import NON_NEGATIVE, POSITIVE, UNIT, Options, Range, convert, option, parse, required

_ONE = Range(low=0.0, high=1.0)


@dataclass(frozen=True)
class ScheduleOptions(Options):
    """Base of the schedules' options; alone, for schedules without any."""

    kind: ClassVar[str] = "lr_scheduler_args"


@dataclass(frozen=True)
class CosineOptions(ScheduleOptions):
    """Options of ``cosine``."""

    num_cycles: float = option(0.5, "waves of the cosine; 0.5 falls from the peak to 0", POSITIVE)


@dataclass(frozen=True)
class RestartsOptions(ScheduleOptions):
    """Options of ``cosine_with_restarts``."""

    num_cycles: int = option(1, "number of falls from the peak to 0", POSITIVE)


@dataclass(frozen=True)
class PolynomialOptions(ScheduleOptions):
    """Options of ``polynomial``."""

    lr_end: float = option(1e-7, "learning rate at the end; of a group with another peak, in proportion", NON_NEGATIVE)
    power: float = option(1.0, "exponent of the remaining part", POSITIVE)


@dataclass(frozen=True)
class InverseSqrtOptions(ScheduleOptions):
    """Options of ``inverse_sqrt``."""

    timescale: int | None = option(
        None, "steps after which the rate is 1/sqrt(2); None: warmup_steps or 10000", POSITIVE
    )


@dataclass(frozen=True)
class WarmupStableDecayOptions(ScheduleOptions):
    """Options of ``warmup_stable_decay``."""

    num_decay_steps: int = required("steps of the final decay", NON_NEGATIVE)
    num_stable_steps: int | None = option(None, "steps at the peak; None: what warm-up and decay leave", NON_NEGATIVE)
    warmup_type: Literal["linear", "cosine", "1-sqrt"] = option("linear", "form of the warm-up")
    decay_type: Literal["linear", "cosine", "1-sqrt"] = option("cosine", "form of the decay")
    min_lr_ratio: float = option(0.0, "lowest rate as a part of the peak", _ONE)
    num_cycles: float = option(0.5, "waves of a cosine decay", POSITIVE)


@dataclass(frozen=True)
class PlateauOptions(ScheduleOptions):
    """Options of ``reduce_lr_on_plateau``: ``torch.optim.lr_scheduler.ReduceLROnPlateau`` and what to watch."""

    monitor: str = option("val_loss", "name of the logged metric to watch", scope="policy")
    mode: Literal["min", "max"] = option("min", "whether the metric should fall or rise")
    factor: float = option(0.1, "the rate is multiplied by it", UNIT)
    patience: int = option(10, "checks without improvement before the rate is reduced", NON_NEGATIVE)
    threshold: float = option(1e-4, "smallest change that counts", NON_NEGATIVE)
    threshold_mode: Literal["rel", "abs"] = option("rel", "whether threshold is relative")
    cooldown: int = option(0, "checks to wait after a reduction", NON_NEGATIVE)
    min_lr: float = option(0.0, "lowest learning rate", NON_NEGATIVE)
    eps: float = option(1e-8, "smaller reductions are left out", NON_NEGATIVE)


def _warm(step: int, warmup: int) -> float:
    return step / max(1, warmup)


def _progress(step: int, warmup: int, total: int) -> float:
    return (step - warmup) / max(1, total - warmup)


def _constant(step: int, warmup: int, total: int, options: ScheduleOptions, peak: float) -> float:
    return 1.0


def _constant_with_warmup(step: int, warmup: int, total: int, options: ScheduleOptions, peak: float) -> float:
    return _warm(step, warmup) if step < warmup else 1.0


def _linear(step: int, warmup: int, total: int, options: ScheduleOptions, peak: float) -> float:
    return _warm(step, warmup) if step < warmup else max(0.0, (total - step) / max(1, total - warmup))


def _cosine(step: int, warmup: int, total: int, options: CosineOptions, peak: float) -> float:
    if step < warmup:
        return _warm(step, warmup)
    progress = _progress(step, warmup, total)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * options.num_cycles * 2.0 * progress)))


def _cosine_with_restarts(step: int, warmup: int, total: int, options: RestartsOptions, peak: float) -> float:
    if step < warmup:
        return _warm(step, warmup)
    progress = _progress(step, warmup, total)
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((options.num_cycles * progress) % 1.0))))


def _polynomial(step: int, warmup: int, total: int, options: PolynomialOptions, peak: float) -> float:
    if step < warmup:
        return _warm(step, warmup)
    if step > total:
        return options.lr_end / peak
    remaining = 1 - (step - warmup) / max(1, total - warmup)
    lr: float = (peak - options.lr_end) * remaining**options.power + options.lr_end
    return lr / peak


def _inverse_sqrt(step: int, warmup: int, total: int, options: InverseSqrtOptions, peak: float) -> float:
    if step < warmup:
        return _warm(step, warmup)
    timescale = options.timescale or warmup or 10_000
    return 1.0 / math.sqrt((step + timescale - warmup) / timescale)


def _warmup_stable_decay(step: int, warmup: int, total: int, options: WarmupStableDecayOptions, peak: float) -> float:
    decay = options.num_decay_steps
    stable = total - warmup - decay if options.num_stable_steps is None else options.num_stable_steps
    lowest = options.min_lr_ratio
    if step < warmup:
        progress = _warm(step, warmup)
        rise = {
            "linear": progress,
            "cosine": 0.5 * (1 - math.cos(math.pi * progress)),
            "1-sqrt": 1 - math.sqrt(1 - progress),
        }
        return max(0.0, rise[options.warmup_type] * (1.0 - lowest) + lowest)
    if step < warmup + stable:
        return 1.0
    if step < warmup + stable + decay:
        progress = (step - warmup - stable) / max(1, decay)
        cosine = 0.5 * (1 + math.cos(math.pi * options.num_cycles * 2.0 * progress))
        fall = {"linear": 1 - progress, "cosine": cosine, "1-sqrt": 1 - math.sqrt(progress)}
        return max(0.0, fall[options.decay_type] * (1.0 - lowest) + lowest)
    return lowest


class Multiplier(Protocol):
    """A factor on the peak learning rate, by step."""

    def __call__(self, step: int, warmup: int, total: int, options: Any, peak: float) -> float:
        """Returns the factor."""


@dataclass(frozen=True)
class ScheduleSpec:
    """A row of the schedules.

    Attributes:
        name: Hugging Face's name.
        summary: One line.
        options: The dataclass that declares the options.
        multiplier: The factor on the peak learning rate at a step, given warm-up and total steps, options and the
            peak; ``None`` for the schedule that watches a metric.
        warms_up: Whether ``warmup_steps`` is used.
        needs_total: Whether the length of the training must be known.
    """

    name: str
    summary: str
    options: type[ScheduleOptions]
    multiplier: Multiplier | None
    warms_up: bool = True
    needs_total: bool = True


SCHEDULES: dict[str, ScheduleSpec] = {
    spec.name: spec
    for spec in (
        ScheduleSpec("constant", "no change", ScheduleOptions, _constant, warms_up=False, needs_total=False),
        ScheduleSpec(
            "constant_with_warmup", "rise, then no change", ScheduleOptions, _constant_with_warmup, needs_total=False
        ),
        ScheduleSpec("linear", "linear fall to 0", ScheduleOptions, _linear),
        ScheduleSpec("cosine", "fall to 0 along a cosine", CosineOptions, _cosine),
        ScheduleSpec("cosine_with_restarts", "several cosine falls", RestartsOptions, _cosine_with_restarts),
        ScheduleSpec("polynomial", "polynomial fall to lr_end", PolynomialOptions, _polynomial),
        ScheduleSpec(
            "inverse_sqrt",
            "fall with the square root of the step",
            InverseSqrtOptions,
            _inverse_sqrt,
            needs_total=False,
        ),
        ScheduleSpec(
            "warmup_stable_decay", "rise, plateau, final fall", WarmupStableDecayOptions, _warmup_stable_decay
        ),
        ScheduleSpec(
            "reduce_lr_on_plateau",
            "fall when a metric stops improving",
            PlateauOptions,
            None,
            warms_up=False,
            needs_total=False,
        ),
    )
}


def get_schedule(name: str) -> ScheduleSpec:
    """Returns the schedule's row.

    Raises:
        UnknownSchedule: If there is none of that name; the text lists all.
    """
    if not isinstance(name, str) or name not in SCHEDULES:
        near = close_names(str(name), SCHEDULES, limit=2)
        hint = f" Did you mean {listing(near)}?" if near else ""
        raise UnknownSchedule(
            f"there is no lr_scheduler {name!r}.{hint} Allowed: {listing(SCHEDULES)}. For a scheduler of torch "
            "override configure_optimizers and build the optimizer with self.build_optimizer(self)."
        )
    return SCHEDULES[name]


def parse_warmup(warmup_steps: Any) -> int | float:
    """Returns ``warmup_steps`` as a count (an int) or a fraction of the training (a float below 1).

    Raises:
        InvalidOption: If it is neither.
    """
    try:
        number = convert(warmup_steps, float)
    except (TypeError, ValueError):
        number = math.nan
    if 0 < number < 1:
        return float(number)
    if number >= 0 and math.isfinite(number) and number == int(number):
        return int(number)
    raise InvalidOption(
        f"warmup_steps={warmup_steps!r}: a whole number of steps or a fraction of the training below 1 is allowed"
    )


def resolve_warmup(warmup_steps: int | float, total_steps: int | None) -> int:
    """Returns the number of warm-up steps; a fraction is taken of ``total_steps``, rounded up.

    Raises:
        InvalidOption: If ``warmup_steps`` is neither a count nor a fraction, or a fraction of an unknown length.
    """
    warmup = parse_warmup(warmup_steps)
    if isinstance(warmup, int):
        return warmup
    if total_steps is None:
        raise InvalidOption(
            f"warmup_steps={warmup_steps!r} is a fraction of a training whose length is unknown; set "
            "Trainer(max_steps=...) or Trainer(max_epochs=...), or give a number of steps"
        )
    return math.ceil(total_steps * warmup)


class NamedSchedule(LRScheduler):
    """Multiplies every group's peak by a function of the step.

    As ``torch.optim.lr_scheduler.LambdaLR``, but for groups that are added while training goes on, as finetuning
    callbacks do: their learning rate at that time is their peak.
    """

    def __init__(self, optimizer: Optimizer, multiplier: Callable[[int], float]) -> None:
        self._multiplier = multiplier
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        factor = self._multiplier(self.last_epoch)
        return [self._peak(group) * factor for group in self.optimizer.param_groups]

    @staticmethod
    def _peak(group: dict[str, Any]) -> Any:
        if "initial_lr" not in group:
            group["initial_lr"] = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
        return group["initial_lr"]

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict().items() if name != "_multiplier"}


def build_schedule(
    optimizer: Optimizer,
    name: str,
    total_steps: int | None = None,
    warmup_steps: int | float = 0,
    args: Mapping[str, Any] | str | None = None,
) -> LRScheduler | ReduceLROnPlateau:
    """Makes a learning-rate schedule to be stepped after every optimizer step.

    ``reduce_lr_on_plateau`` is stepped with the metric instead, once per epoch.

    Args:
        optimizer: The optimizer; each group's current ``lr`` is its peak.
        name: One of :data:`SCHEDULES`.
        total_steps: Optimizer steps of the whole training.
        warmup_steps: Steps of the linear rise from 0, or a fraction of ``total_steps``.
        args: The schedule's own options, a mapping or ``"name=value,..."``.

    Raises:
        UnknownSchedule: If there is no such schedule.
        InvalidOption: If an argument is wrong, missing or would be ignored.
    """
    spec = get_schedule(name)
    options = parse(spec.options, args, name)
    if spec.needs_total and total_steps is None and getattr(options, "num_stable_steps", None) is None:
        raise InvalidOption(
            f"lr_scheduler={name!r} needs the length of the training; set Trainer(max_steps=...) or "
            "Trainer(max_epochs=...), or pass total_steps"
        )
    if warmup_steps and not spec.warms_up:
        instead = "'constant_with_warmup'" if name == "constant" else "another lr_scheduler, such as 'linear'"
        raise InvalidOption(f"lr_scheduler={name!r} has no warm-up, but warmup_steps={warmup_steps!r}; use {instead}")
    if spec.multiplier is None:
        return ReduceLROnPlateau(optimizer, **options.select("group"))
    warmup = resolve_warmup(warmup_steps, total_steps)
    peak = float(optimizer.defaults["lr"])
    if isinstance(options, PolynomialOptions) and peak <= options.lr_end:
        raise InvalidOption(f"lr_end={options.lr_end:g} must be smaller than the learning rate {peak:g}")
    multiplier = partial(spec.multiplier, warmup=warmup, total=total_steps or 0, options=options, peak=peak)
    return NamedSchedule(optimizer, multiplier)
