"""The learning-rate schedules as data: options, and the factor on the peak as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, Literal, Protocol

from lightning_optim.errors import InvalidOption, UnknownSchedule, close_names, listing
from lightning_optim.table import NON_NEGATIVE, POSITIVE, UNIT, Options, Range, option, required

_ONE = Range(low=0.0, high=1.0)


@dataclass(frozen=True)
class ScheduleOptions(Options):
    """Base of the schedules' options; used directly for schedules without any."""

    kind: ClassVar[str] = "lr_scheduler_args"

    def check_peak(self, peak: float) -> None:
        """Raises :class:`InvalidOption` for values that do not fit the peak learning rate."""


@dataclass(frozen=True)
class CosineOptions(ScheduleOptions):
    """Options of ``cosine``."""

    num_cycles: float = option(0.5, "waves of the cosine; 0.5 falls from the peak to 0", POSITIVE)


@dataclass(frozen=True)
class FlooredCosineOptions(ScheduleOptions):
    """Options of ``cosine_with_min_lr``."""

    min_lr: float | None = option(
        None, "lowest learning rate; of a group with another peak, in proportion", NON_NEGATIVE
    )
    min_lr_rate: float | None = option(None, "lowest rate as a part of the peak, in place of min_lr", _ONE)
    num_cycles: float = option(0.5, "waves of the cosine; 0.5 falls from the peak to the lowest rate", POSITIVE)

    def check(self) -> None:
        if (self.min_lr is None) == (self.min_lr_rate is None):
            given = "neither" if self.min_lr is None else "both"
            raise InvalidOption(
                f"{given} of min_lr and min_lr_rate in lr_scheduler_args: set one of them, min_lr=1e-5 (a learning "
                "rate) or min_lr_rate=0.1 (a part of the peak)",
                code="LO206",
            )

    def check_peak(self, peak: float) -> None:
        if self.min_lr is not None:
            _check_below("min_lr", self.min_lr, peak)

    def lowest(self, peak: float) -> float:
        """Returns the lowest rate as a part of the peak."""
        return self.min_lr / peak if self.min_lr is not None else self.min_lr_rate or 0.0


@dataclass(frozen=True)
class WarmFlooredCosineOptions(FlooredCosineOptions):
    """Options of ``cosine_warmup_with_min_lr``."""

    warmup_lr_rate: float | None = option(
        None, "rate of the first step as a part of the peak; None: 1 / warmup_steps", _ONE
    )


@dataclass(frozen=True)
class RestartsOptions(ScheduleOptions):
    """Options of ``cosine_with_restarts``."""

    num_cycles: int = option(1, "number of falls from the peak to 0", POSITIVE)


@dataclass(frozen=True)
class PolynomialOptions(ScheduleOptions):
    """Options of ``polynomial``."""

    lr_end: float = option(1e-7, "learning rate at the end; of a group with another peak, in proportion", NON_NEGATIVE)
    power: float = option(1.0, "exponent of the remaining part", POSITIVE)

    def check_peak(self, peak: float) -> None:
        _check_below("lr_end", self.lr_end, peak)


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


def _check_below(name: str, value: float, peak: float) -> None:
    if value >= peak:
        raise InvalidOption(f"{name}={value:g} must be smaller than the learning rate {peak:g}", code="LO213")


class Multiplier(Protocol):
    """A factor on the peak learning rate, by step."""

    def __call__(self, step: int, warmup: int, total: int, options: Any, peak: float) -> float:
        """Returns the factor."""


def _after_warmup(curve: Multiplier) -> Multiplier:
    """Puts a linear rise from 0 before a curve."""

    @wraps(curve)
    def multiplier(step: int, warmup: int, total: int, options: Any, peak: float) -> float:
        return step / max(1, warmup) if step < warmup else curve(step, warmup, total, options, peak)

    return multiplier


def _progress(step: int, warmup: int, total: int) -> float:
    return (step - warmup) / max(1, total - warmup)


def _constant(step: int, warmup: int, total: int, options: ScheduleOptions, peak: float) -> float:
    return 1.0


@_after_warmup
def _constant_with_warmup(step: int, warmup: int, total: int, options: ScheduleOptions, peak: float) -> float:
    return 1.0


@_after_warmup
def _linear(step: int, warmup: int, total: int, options: ScheduleOptions, peak: float) -> float:
    return max(0.0, (total - step) / max(1, total - warmup))


@_after_warmup
def _cosine(step: int, warmup: int, total: int, options: CosineOptions, peak: float) -> float:
    return max(0.0, _wave(_progress(step, warmup, total), options.num_cycles))


@_after_warmup
def _cosine_with_min_lr(step: int, warmup: int, total: int, options: FlooredCosineOptions, peak: float) -> float:
    return _floored(_progress(step, warmup, total), options, peak)


def _cosine_warmup_with_min_lr(
    step: int, warmup: int, total: int, options: WarmFlooredCosineOptions, peak: float
) -> float:
    # It counts from 1: the first step does not have rate 0, and the last one has the lowest rate.
    if step < warmup:
        if options.warmup_lr_rate is None:
            return (step + 1) / warmup
        return options.warmup_lr_rate + (1.0 - options.warmup_lr_rate) * step / max(1, warmup - 1)
    return _floored(_progress(step + 1, warmup, total), options, peak)


def _floored(progress: float, options: FlooredCosineOptions, peak: float) -> float:
    lowest = options.lowest(peak)
    return max(0.0, _wave(progress, options.num_cycles) * (1 - lowest) + lowest)


def _wave(progress: float, cycles: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * progress))


@_after_warmup
def _cosine_with_restarts(step: int, warmup: int, total: int, options: RestartsOptions, peak: float) -> float:
    progress = _progress(step, warmup, total)
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((options.num_cycles * progress) % 1.0))))


@_after_warmup
def _polynomial(step: int, warmup: int, total: int, options: PolynomialOptions, peak: float) -> float:
    if step > total:
        return options.lr_end / peak
    remaining = 1 - (step - warmup) / max(1, total - warmup)
    lr: float = (peak - options.lr_end) * remaining**options.power + options.lr_end
    return lr / peak


@_after_warmup
def _inverse_sqrt(step: int, warmup: int, total: int, options: InverseSqrtOptions, peak: float) -> float:
    timescale = options.timescale or warmup or 10_000
    return 1.0 / math.sqrt((step + timescale - warmup) / timescale)


def _warmup_stable_decay(step: int, warmup: int, total: int, options: WarmupStableDecayOptions, peak: float) -> float:
    decay = options.num_decay_steps
    stable = total - warmup - decay if options.num_stable_steps is None else options.num_stable_steps
    lowest = options.min_lr_ratio
    if step < warmup:
        progress = step / max(1, warmup)
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
        cosine = _wave(progress, options.num_cycles)
        fall = {"linear": 1 - progress, "cosine": cosine, "1-sqrt": 1 - math.sqrt(progress)}
        return max(0.0, fall[options.decay_type] * (1.0 - lowest) + lowest)
    return lowest


@dataclass(frozen=True)
class ScheduleSpec:
    """A row of the schedules.

    Attributes:
        name: Hugging Face's name.
        summary: One line.
        options: The dataclass that declares the options.
        multiplier: The factor on the peak learning rate; ``None`` for the schedule that watches a metric.
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
        ScheduleSpec("cosine_with_min_lr", "fall to min_lr along a cosine", FlooredCosineOptions, _cosine_with_min_lr),
        ScheduleSpec(
            "cosine_warmup_with_min_lr",
            "the same, the first step not at 0",
            WarmFlooredCosineOptions,
            _cosine_warmup_with_min_lr,
        ),
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


#: The schedule that a LightningModule makes itself, kept around an optimizer of ours; not one of the named ones.
MODULE_SCHEDULE = ScheduleSpec(
    "module", "that of the module's own configure_optimizers", ScheduleOptions, None, warms_up=False, needs_total=False
)


def get_schedule(name: str) -> ScheduleSpec:
    """Returns the schedule's row.

    Raises:
        UnknownSchedule: If there is no such schedule; the text lists all.
    """
    if name == MODULE_SCHEDULE.name:
        return MODULE_SCHEDULE
    if not isinstance(name, str) or name not in SCHEDULES:
        near = close_names(str(name), SCHEDULES, limit=2)
        hint = f" Did you mean {listing(near)}?" if near else ""
        raise UnknownSchedule(
            f"there is no lr_scheduler {name!r}.{hint} Allowed: {listing(SCHEDULES)}. For a scheduler of torch "
            "override configure_optimizers and build the optimizer with self.build_optimizer(self).",
            code="LO108",
        )
    return SCHEDULES[name]


def follows_the_step(name: str) -> bool:
    """Whether a schedule is a function of the number of the step; else of a metric, or a module's own."""
    schedule = get_schedule(name)
    return schedule is not MODULE_SCHEDULE and schedule.multiplier is not None
