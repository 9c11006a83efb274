"""Rows of our own AdamW variants, whose original packages cannot be wrapped."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_optim.errors import InvalidOption
from lightning_optim.optimizers._anyprecision import StateDtype, check_epsilon
from lightning_optim.table._options import NON_NEGATIVE, UNIT, Options, Range, option
from lightning_optim.table._spec import Buffer, OptimizerSpec, StateLayout
from lightning_optim.table.rows._torch_optim import AdamOptions

_CLOSED_UNIT = Range(low=0.0, high=1.0)


@dataclass(frozen=True)
class GrokAdamWOptions(Options):
    """Options of :class:`~lightning_optim.optimizers.GrokAdamW`."""

    betas: tuple[float, float] = option(
        (0.9, 0.999), "decay rates of a group's first parameter's first moment, and of the second moments", UNIT
    )
    eps: float = option(1e-8, "added to the denominator", NON_NEGATIVE)
    alpha_init: float = option(0.98, "decay rate of the gradient's average while the model does not overfit", UNIT)
    lamb: float = option(2.0, "factor on the gradient's average when it is added to the gradient", NON_NEGATIVE)
    gamma: float = option(0.1, "fraction of beta1 lost from one parameter of a group to the next", _CLOSED_UNIT)
    grokking_signal_decay_rate: float = option(
        0.1, "how fast overfitting shortens the gradient's average", NON_NEGATIVE
    )
    gradient_clipping: float = option(0.0, "the Trainer clips: 0 only", scope="policy")

    def check(self) -> None:
        if self.gradient_clipping != 0.0:
            raise InvalidOption(
                f"gradient_clipping={self.gradient_clipping:g} is the Trainer's work; set "
                f"Trainer(gradient_clip_val={self.gradient_clipping:g})"
            )


@dataclass(frozen=True)
class AnyPrecisionAdamWOptions(AdamOptions):
    """Options of :class:`~lightning_optim.optimizers.AnyPrecisionAdamW`."""

    use_kahan_summation: bool = option(False, "compensate the rounding of parameter updates")
    momentum_dtype: StateDtype = option("float32", "dtype of the first moment")
    variance_dtype: StateDtype = option("float32", "dtype of the second moment")
    compensation_buffer_dtype: StateDtype = option("bfloat16", "dtype of the compensation buffer")

    def check(self) -> None:
        check_epsilon(self.eps, self.variance_dtype)


def _bytes(dtype: str) -> int:
    size: int = getattr(torch, dtype).itemsize
    return size


ROWS = (
    OptimizerSpec(
        name="grokadamw",
        target="lightning_optim.optimizers:GrokAdamW",
        summary="AdamW that amplifies the slow component of the gradient, less so while the model overfits",
        source="Grokfast, https://arxiv.org/abs/2405.20233, and https://github.com/cognitivecomputations/grokadamw; "
        "lightning_optim.optimizers.GrokAdamW",
        options=GrokAdamWOptions,
        state_format="GrokAdamW/1",
        default_lr=1e-3,
        default_weight_decay=1e-2,
        state=StateLayout(buffers=tuple(Buffer(name, float32=True) for name in ("exp_avg", "exp_avg_sq", "grok_ema"))),
        sharded=True,
        half_weights=True,
        note="beta1 depends on a parameter's position in its group; the callback GrokkingSignal reports the losses",
    ),
    OptimizerSpec(
        name="adamw_anyprecision",
        target="lightning_optim.optimizers:AnyPrecisionAdamW",
        summary="AdamW with states in chosen dtypes and Kahan summation for bfloat16 parameters",
        source="https://github.com/pytorch/torchdistx and Revisiting BFloat16 Training, "
        "https://arxiv.org/abs/2010.06192; lightning_optim.optimizers.AnyPrecisionAdamW",
        options=AnyPrecisionAdamWOptions,
        state_format="AnyPrecisionAdamW/1",
        default_lr=1e-3,
        default_weight_decay=0.0,
        state=StateLayout(
            buffers=(
                Buffer("exp_avg", element_size=lambda o: _bytes(o.momentum_dtype)),
                Buffer("exp_avg_sq", element_size=lambda o: _bytes(o.variance_dtype)),
                Buffer(
                    "compensation",
                    when=lambda o: o.use_kahan_summation,
                    element_size=lambda o: _bytes(o.compensation_buffer_dtype),
                ),
            ),
        ),
        sharded=True,
        half_weights=True,
    ),
)
