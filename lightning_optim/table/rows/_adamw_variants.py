"""Rows of our own variants of AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lightning_optim.errors import InvalidOption
from lightning_optim.optimizers._adam_mini import AdamMini, block_count
from lightning_optim.optimizers._anyprecision import StateDtype, check_epsilon
from lightning_optim.table._options import AT_LEAST_ONE, NON_NEGATIVE, UNIT, Options, Range, option
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
                f"Trainer(gradient_clip_val={self.gradient_clipping:g})",
                code="LO208",
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


@dataclass(frozen=True)
class AdoptOptions(Options):
    """Options of :class:`~lightning_optim.optimizers.Adopt`."""

    betas: tuple[float, float] = option(
        (0.9, 0.9999), "decay rates of the normalized gradients' average and of the second moment", UNIT
    )
    eps: float = option(1e-6, "smallest root of a second moment to divide by", NON_NEGATIVE)
    clip_exp: float | None = option(
        0.25, "a normalized gradient is at most (step - 1) ** clip_exp; None: no bound", NON_NEGATIVE
    )


@dataclass(frozen=True)
class AdanOptions(Options):
    """Options of :class:`~lightning_optim.optimizers.Adan`."""

    betas: tuple[float, float, float] = option(
        (0.98, 0.92, 0.99), "decay rates of the gradients' average, their differences' and the second moment", UNIT
    )
    eps: float = option(1e-8, "added to the denominator", NON_NEGATIVE)
    no_prox: bool = option(False, "decay as AdamW does, before the update, not by a division after it")


@dataclass(frozen=True)
class AdamMiniOptions(AdamOptions):
    """Options of :class:`~lightning_optim.optimizers.AdamMini`."""

    bound_to_state: ClassVar[frozenset[str]] = frozenset({"blocks"})

    blocks: int | None = option(
        None, "equal blocks of a parameter with one second moment each; None: its rows, a vector as one", AT_LEAST_ONE
    )


def _blocks(shape: tuple[int, ...], options: Any) -> int:
    return block_count(shape, options.blocks)


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
    OptimizerSpec(
        name="adopt",
        target="lightning_optim.optimizers:Adopt",
        summary="Adam that divides a gradient by the second moment of those before it; any beta2 converges",
        source="ADOPT: Modified Adam Can Converge with Any beta2 with the Optimal Rate, "
        "https://arxiv.org/abs/2411.02853; lightning_optim.optimizers.Adopt",
        options=AdoptOptions,
        state_format="Adopt/1",
        default_lr=1e-3,
        default_weight_decay=0.0,
        state=StateLayout(buffers=tuple(Buffer(name, float32=True) for name in ("exp_avg", "exp_avg_sq"))),
        sharded=True,
        half_weights=True,
        note="the first step of a parameter sets its second moment and does not move it",
    ),
    OptimizerSpec(
        name="adan",
        target="lightning_optim.optimizers:Adan",
        summary="Adam with Nesterov momentum, estimated from the differences of successive gradients",
        source="Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models, "
        "https://arxiv.org/abs/2208.06677; lightning_optim.optimizers.Adan",
        options=AdanOptions,
        state_format="Adan/1",
        default_lr=1e-3,
        default_weight_decay=0.0,
        state=StateLayout(
            buffers=tuple(
                Buffer(name, float32=True)
                for name in ("exp_avg", "exp_avg_diff", "exp_avg_ahead_sq", "previous_gradient")
            )
        ),
        sharded=True,
        half_weights=True,
    ),
    OptimizerSpec(
        name="adam_mini",
        target="lightning_optim.optimizers:AdamMini",
        summary="AdamW with one second moment per row, or per head: half of its state",
        source="Adam-mini: Use Fewer Learning Rates To Gain More, https://arxiv.org/abs/2406.16793; "
        "lightning_optim.optimizers.AdamMini",
        options=AdamMiniOptions,
        state_format="AdamMini/1",
        unsharded=AdamMini.unsharded,
        default_lr=1e-3,
        default_weight_decay=0.0,
        state=StateLayout(
            buffers=(Buffer("exp_avg", float32=True), Buffer("exp_avg_sq_block", float32=True, elements=_blocks))
        ),
        half_weights=True,
        note="the paper has one per head for queries and keys: param_groups={'.*[qk]_proj.*': {'blocks': heads}}",
    ),
)
