"""Rows whose class is optimi's (https://optimi.benjaminwarner.dev)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_optim.errors import InvalidOption
from lightning_optim.table._availability import Requirement
from lightning_optim.table._options import NON_NEGATIVE, POSITIVE, UNIT, Options, option
from lightning_optim.table._spec import Buffer, OptimizerSpec, StateLayout

REQUIREMENTS = (Requirement("torch-optimi", "optimi", ">=0.3.3"),)


@dataclass(frozen=True)
class StableAdamWOptions(Options):
    """Options of ``optimi.StableAdamW``."""

    betas: tuple[float, float] = option((0.9, 0.99), "decay rates of the first and second moment", UNIT)
    eps: float = option(1e-6, "added to the denominator", NON_NEGATIVE)
    decouple_lr: bool = option(False, "decay by weight_decay alone, not by lr * weight_decay")
    max_lr: float | None = option(None, "peak of the schedule, for decouple_lr; None: the given lr", POSITIVE)
    kahan_sum: bool | None = option(None, "compensated summation; None: for bfloat16 and float16 parameters")
    foreach: bool | None = option(None, "batch the arithmetic over tensors; None lets optimi choose")
    triton: bool | None = option(None, "Triton kernels; None: where all parameters are on a GPU")

    def check(self) -> None:
        if self.foreach and self.triton:
            raise InvalidOption("foreach=True and triton=True exclude each other; give one of them", code="LO208")


ROWS = (
    OptimizerSpec(
        name="stable_adamw",
        target="lightning_optim.optimizers.adapters._optimi:StableAdamW",
        wraps="optimi.StableAdamW",
        summary="AdamW whose updates are clipped by their RMS, as in Adafactor",
        source="Stable and low-precision training for large-scale vision-language models, "
        "https://arxiv.org/abs/2304.13013; optimi.StableAdamW",
        options=StableAdamWOptions,
        state_format="optimi.StableAdamW/1",
        default_lr=1e-3,
        default_weight_decay=1e-2,
        requirements=REQUIREMENTS,
        extra="optimi",
        # By Triton.
        in_place=frozenset({"cuda"}),
        xla="it reads the size of each parameter's update, and so waits for the device once per parameter",
        state=StateLayout(
            buffers=(
                Buffer("exp_avg"),
                Buffer("exp_avg_sq"),
                Buffer("kahan_comp", when=lambda o: o.kahan_sum is not False, low_precision_only=True),
            ),
            scalars_like_parameter=1,
        ),
        sharded=True,
    ),
)
