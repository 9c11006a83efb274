"""Prodigy: Adam that estimates its learning rate, our own implementation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_optim.optimizers._prodigy import Prodigy, slice_length
from lightning_optim.table._options import AT_LEAST_ONE, NON_NEGATIVE, POSITIVE, UNIT, Options, option
from lightning_optim.table._spec import Buffer, OptimizerSpec, StateLayout


@dataclass(frozen=True)
class ProdigyOptions(Options):
    """Options of :class:`~lightning_optim.optimizers.Prodigy`."""

    bound_to_state: ClassVar[frozenset[str]] = frozenset({"slice_p", "d0"})

    betas: tuple[float, float] = option(
        (0.9, 0.999), "decay rates of the first and second moment", UNIT, scope="constructor"
    )
    beta3: float | None = option(
        None, "decay rate of the estimate's sums; None: the root of betas[1]", UNIT, scope="constructor"
    )
    eps: float = option(1e-8, "added to the denominator, times the estimate", NON_NEGATIVE)
    use_bias_correction: bool = option(False, "correct the moments' start at zero", scope="constructor")
    safeguard_warmup: bool = option(
        False, "leave lr out of the estimate's denominator, against a warm-up's small rates", scope="constructor"
    )
    d0: float = option(1e-6, "first estimate", POSITIVE, scope="constructor")
    d_coef: float = option(1.0, "factor on each new estimate", POSITIVE, scope="constructor")
    growth_rate: float | None = option(
        None, "largest factor by which the estimate grows in a step; None: no bound", AT_LEAST_ONE, scope="constructor"
    )
    slice_p: int = option(
        1, "every how many elements are looked at for the estimate; 11 saves 7 bytes per element", AT_LEAST_ONE
    )


def _slice(shape: tuple[int, ...], options: Any) -> int:
    return slice_length(math.prod(shape), options.slice_p)


ROWS = (
    OptimizerSpec(
        name="prodigy",
        target="lightning_optim.optimizers:Prodigy",
        summary="Adam that estimates its learning rate from how far the weights have come",
        source="Prodigy: An Expeditiously Adaptive Parameter-Free Learner, https://arxiv.org/abs/2306.06101; "
        "lightning_optim.optimizers.Prodigy",
        options=ProdigyOptions,
        state_format="Prodigy/1",
        unsharded=Prodigy.unsharded,
        default_lr=1.0,
        default_weight_decay=0.0,
        state=StateLayout(
            buffers=(
                Buffer("exp_avg", float32=True),
                Buffer("exp_avg_sq", float32=True),
                Buffer("s", float32=True, elements=_slice),
                Buffer("p0", float32=True, elements=_slice),
            )
        ),
        half_weights=True,
        coupled="Prodigy makes one estimate of the step size from all parameters",
        note="lr is a factor on the estimate: leave it at 1 and let a schedule lower it",
    ),
)
