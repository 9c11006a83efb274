"""Rows of optimizers with little or no state: Adafactor, CAME, LOMO and AdaLomo, our own implementations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning_optim.errors import InvalidOption
from lightning_optim.optimizers._came import RESIDUAL, state_shapes
from lightning_optim.optimizers._factored import TENSORS, elements
from lightning_optim.table._layerwise import stepped_in_backward
from lightning_optim.table._options import POSITIVE, UNIT, Options, Range, option
from lightning_optim.table._spec import Buffer, OptimizerSpec, StateLayout


@dataclass(frozen=True)
class AdaLomoOptions(Options):
    """Options of :class:`~lightning_optim.optimizers.AdaLomo`."""

    eps: tuple[float, float] = option(
        (1e-30, 1e-3), "added to squared gradients; lower bound of a parameter's root mean square", POSITIVE
    )
    clip_threshold: float = option(1.0, "largest root mean square of an update before the learning rate", POSITIVE)
    decay_rate: float = option(-0.8, "the second moment keeps 1 - step ** decay_rate of its old value", Range(high=0.0))


@dataclass(frozen=True)
class AdafactorOptions(AdaLomoOptions):
    """Options of :class:`~lightning_optim.optimizers.Adafactor`."""

    beta1: float | None = option(None, "decay rate of an average of updates; None for no average", UNIT)
    scale_parameter: bool = option(False, "multiply lr by the root mean square of each parameter")
    relative_step: bool = option(
        False, "compute lr as min(1e-2, 1 / sqrt(step)); no lr may be given", scope="constructor"
    )
    warmup_init: bool = option(
        False, "with relative_step: 1e-6 * step replaces the 1e-2 in the minimum", scope="constructor"
    )

    def check(self) -> None:
        if self.warmup_init and not self.relative_step:
            raise InvalidOption(
                "warmup_init=True warms up the rate of relative_step: add relative_step=True", code="LO208"
            )

    def default_lr(self, default: float | None) -> float | None:
        return 1.0 if self.relative_step else default


@dataclass(frozen=True)
class CAMEOptions(Options):
    """Options of :class:`~lightning_optim.optimizers.CAME`."""

    betas: tuple[float, float, float] = option(
        (0.9, 0.999, 0.9999),
        "decay rates of the updates' average, of the gradients' second moment and of the residuals'",
        UNIT,
    )
    eps: tuple[float, float] = option((1e-30, 1e-16), "added to squared gradients; to squared residuals", POSITIVE)
    clip_threshold: float = option(1.0, "largest root mean square of an update before it is averaged", POSITIVE)


@dataclass(frozen=True)
class LOMOOptions(Options):
    """Options of :class:`~lightning_optim.optimizers.LOMO`: none."""


_SECOND_MOMENT = tuple(Buffer(name, float32=True, elements=partial(elements, name)) for name in TENSORS)


def _came_elements(name: str, shape: tuple[int, ...], options: Any) -> int:
    # Empty parameters are never stepped and have no state.
    return math.prod(state_shapes(shape).get(name, (0,))) if math.prod(shape) else 0


ROWS = (
    OptimizerSpec(
        name="adafactor",
        target="lightning_optim.optimizers:Adafactor",
        summary="Adafactor, a second moment of rows and columns instead of elements",
        source="Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, https://arxiv.org/abs/1804.04235; "
        "lightning_optim.optimizers.Adafactor",
        options=AdafactorOptions,
        state_format="Adafactor/1",
        sharded=True,
        default_lr=1e-3,
        default_weight_decay=0.0,
        state=StateLayout((*_SECOND_MOMENT, Buffer("exp_avg", float32=True, when=lambda o: o.beta1 is not None))),
        half_weights=True,
    ),
    OptimizerSpec(
        name="came",
        target="lightning_optim.optimizers:CAME",
        summary="Adafactor with momentum, divided by how far updates scatter around it",
        source="CAME: Confidence-guided Adaptive Memory Efficient Optimization, https://arxiv.org/abs/2307.02047; "
        "lightning_optim.optimizers.CAME",
        options=CAMEOptions,
        state_format="CAME/1",
        sharded=True,
        default_lr=2e-4,
        default_weight_decay=0.0,
        state=StateLayout(
            (
                Buffer("exp_avg", float32=True),
                *_SECOND_MOMENT,
                *(Buffer(name, float32=True, elements=partial(_came_elements, name)) for name in RESIDUAL),
            )
        ),
        half_weights=True,
        note="the first steps are about ten times as long as lr says: warm up",
    ),
    stepped_in_backward(
        OptimizerSpec(
            name="lomo",
            target="lightning_optim.optimizers:LOMO",
            summary="stochastic gradient descent without state",
            source="Full Parameter Fine-tuning for Large Language Models with Limited Resources, "
            "https://arxiv.org/abs/2306.09782; lightning_optim.optimizers.LOMO",
            options=LOMOOptions,
            state_format="LOMO/1",
            default_lr=1e-2,
            default_weight_decay=0.0,
            state=StateLayout(()),
            sharded=True,
            half_weights=True,
        )
    ),
    stepped_in_backward(
        OptimizerSpec(
            name="adalomo",
            target="lightning_optim.optimizers:AdaLomo",
            summary="Adafactor without a first moment, scaled by each parameter's root mean square",
            source="AdaLomo: Low-memory Optimization with Adaptive Learning Rate, https://arxiv.org/abs/2310.10195; "
            "lightning_optim.optimizers.AdaLomo",
            options=AdaLomoOptions,
            state_format="AdaLomo/1",
            sharded=True,
            default_lr=1e-3,
            default_weight_decay=0.0,
            state=StateLayout(_SECOND_MOMENT),
            half_weights=True,
        )
    ),
)
