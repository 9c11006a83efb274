"""Rows whose class is schedulefree's (https://github.com/facebookresearch/schedule_free)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_optim.errors import InvalidOption
from lightning_optim.table._availability import Requirement
from lightning_optim.table._options import NON_NEGATIVE, OPEN_UNIT, Options, option
from lightning_optim.table._spec import Buffer, OptimizerSpec, StateLayout, Warmup

REQUIREMENTS = (Requirement("schedulefree", "schedulefree", ">=1.4.1"),)


@dataclass(frozen=True)
class _Averaging(Options):
    """Options that every schedule-free optimizer has."""

    r: float = option(0.0, "the average weighs step t by t ** r")
    weight_lr_power: float = option(2.0, "the average weighs a step by lr ** weight_lr_power during warm-up")
    foreach: bool | None = option(True, "batch the arithmetic over tensors")


@dataclass(frozen=True)
class ScheduleFreeAdamWOptions(_Averaging):
    """Options of ``schedulefree.AdamWScheduleFree``."""

    # The averaged weights are computed with 1 / beta1, so both ends of the interval are excluded.
    betas: tuple[float, float] = option(
        (0.9, 0.999), "interpolation between average and iterate; decay rate", OPEN_UNIT
    )
    eps: float = option(1e-8, "added to the denominator", NON_NEGATIVE)


@dataclass(frozen=True)
class ScheduleFreeRAdamOptions(ScheduleFreeAdamWOptions):
    """Options of ``schedulefree.RAdamScheduleFree``."""

    silent_sgd_phase: bool = option(True, "do not move while the variance is not yet known")

    def check(self) -> None:
        # RAdam uses its variance once rho_t > 4. rho_t rises towards rho_inf = 2 / (1 - beta2) - 1 without reaching it,
        # and rho_inf > 4 means beta2 > 0.6.
        if self.silent_sgd_phase and self.betas[1] <= 0.6:
            raise InvalidOption(
                f"betas={self.betas!r}: with betas[1] at 0.6 or below, RAdam never knows its variance, and with "
                "silent_sgd_phase=True no weight ever moves. Set betas[1] above 0.6 (0.999 is usual), or "
                "silent_sgd_phase=False, or use optim='schedule_free_adamw'",
                code="LO208",
            )


@dataclass(frozen=True)
class ScheduleFreeSGDOptions(_Averaging):
    """Options of ``schedulefree.SGDScheduleFree``."""

    momentum: float = option(0.9, "interpolation between average and iterate", OPEN_UNIT)


def _row(
    name: str, class_name: str, options: type[Options], lr: float, state: StateLayout, warmup: Warmup
) -> OptimizerSpec:
    algorithm = class_name.removesuffix("ScheduleFree")
    return OptimizerSpec(
        name=name,
        target=f"lightning_optim.optimizers.adapters._schedulefree:{class_name}",
        wraps=f"schedulefree.{class_name}",
        summary=f"{algorithm} that averages its iterates instead of following a schedule",
        source=f"The Road Less Scheduled, https://arxiv.org/abs/2405.15682; schedulefree.{class_name}",
        options=options,
        default_lr=lr,
        default_weight_decay=0.0,
        requirements=REQUIREMENTS,
        extra="schedulefree",
        state=state,
        state_format=f"schedulefree.{algorithm}/1",
        warmup=warmup,
        averages_weights=True,
        sharded=True,
        note="validation, test, prediction and checkpoints use the averaged weights; meanwhile, and in checkpoints, "
        "the training point is stored with the state (one more copy of the parameters)",
    )


_ADAM_STATE = StateLayout(buffers=(Buffer("z"), Buffer("exp_avg_sq")))

ROWS = (
    _row("schedule_free_radam", "RAdamScheduleFree", ScheduleFreeRAdamOptions, 2.5e-3, _ADAM_STATE, "none"),
    _row("schedule_free_adamw", "AdamWScheduleFree", ScheduleFreeAdamWOptions, 2.5e-3, _ADAM_STATE, "optimizer"),
    _row(
        "schedule_free_sgd",
        "SGDScheduleFree",
        ScheduleFreeSGDOptions,
        1.0,
        StateLayout(buffers=(Buffer("z"),)),
        "optimizer",
    ),
)
