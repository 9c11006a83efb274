"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, our own implementation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from lightning_optim.optimizers._soap import SOAP, state_shapes
from lightning_optim.table._options import AT_LEAST_ONE, NON_NEGATIVE, UNIT, Options, option
from lightning_optim.table._spec import Buffer, OptimizerSpec, StateLayout


@dataclass(frozen=True)
class SOAPOptions(Options):
    """Options of :class:`~lightning_optim.optimizers.SOAP`."""

    bound_to_state: ClassVar[frozenset[str]] = frozenset({"max_precondition_dim", "stack_dims"})

    betas: tuple[float, float] = option((0.95, 0.95), "decay rates of the first and second moment", UNIT)
    eps: float = option(1e-8, "added to the denominator", NON_NEGATIVE)
    shampoo_beta: float | None = option(
        None, "decay rate of the averages of outer products; None: that of the second moment", UNIT
    )
    precondition_frequency: int = option(10, "steps between two refreshes of the eigenbases", AT_LEAST_ONE)
    max_precondition_dim: int = option(10000, "longest side of a matrix with an eigenbasis", AT_LEAST_ONE)
    stack_dims: int = option(
        0, "leading dimensions that index matrices: 1 for experts [E, m, n], by a pattern", NON_NEGATIVE
    )


def _elements(name: str, shape: tuple[int, ...], options: Any) -> int:
    # Empty parameters are never stepped and have no state.
    shapes = state_shapes(shape, options.max_precondition_dim, options.stack_dims) if math.prod(shape) else {}
    return math.prod(shapes.get(name, (0,)))


ROWS = (
    OptimizerSpec(
        name="soap",
        target="lightning_optim.optimizers:SOAP",
        summary="AdamW in the eigenbases of Shampoo's preconditioner",
        source="SOAP: Improving and Stabilizing Shampoo using Adam, https://arxiv.org/abs/2409.11321; "
        "lightning_optim.optimizers.SOAP",
        options=SOAPOptions,
        state_format="SOAP/1",
        unsharded=SOAP.unsharded,
        default_lr=3e-3,
        default_weight_decay=1e-2,
        state=StateLayout(
            buffers=(
                Buffer("exp_avg", float32=True),
                Buffer("exp_avg_sq", float32=True),
                *(
                    Buffer(name, float32=True, elements=partial(_elements, name))
                    for name in ("gram_left", "left", "gram_right", "right")
                ),
            )
        ),
        half_weights=True,
        xla="it decomposes matrices, which XLA devices do not",
        note="the first step of a matrix sets its bases and does not move it; its state has two squares for each side",
    ),
)
