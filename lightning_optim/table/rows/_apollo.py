"""The row of APOLLO, our own implementation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lightning_optim.optimizers._low_rank import StateDtype
from lightning_optim.table._options import AT_LEAST_ONE, NON_NEGATIVE, POSITIVE, UNIT, Options, option
from lightning_optim.table._spec import Buffer, OptimizerSpec, StateLayout
from lightning_optim.table.rows._low_rank import BASES, MOMENTS


@dataclass(frozen=True)
class ApolloOptions(Options):
    """Options of ``lightning_optim.optimizers.ApolloAdamW``."""

    only_projected: ClassVar[frozenset[str]] = frozenset(
        {"rank", "update_proj_gap", "scale", "proj_type", "proj", "scale_type", "norm_growth_limit", "seed"}
    )
    bound_to_state: ClassVar[frozenset[str]] = frozenset({"rank", "proj_type", "proj", "seed"})

    rank: int = option(128, "directions of the subspace", AT_LEAST_ONE)
    update_proj_gap: int = option(200, "steps between two subspaces", AT_LEAST_ONE)
    scale: float = option(1.0, "updates of projected matrices are multiplied by its square root", POSITIVE)
    proj_type: Literal["std", "reverse_std", "right", "left"] = option(
        "std", "side to project: 'std' the shorter one, 'reverse_std' the longer one"
    )
    proj: Literal["random", "svd"] = option("random", "random subspaces, or those of the leading singular vectors")
    scale_type: Literal["channel", "tensor"] = option("channel", "one factor per row or column, or one for the matrix")
    norm_growth_limit: float | None = option(
        1.01, "an update's norm is at most this many times the last one's; None: no limit", AT_LEAST_ONE
    )
    seed: int = option(0, "of the first random subspace", NON_NEGATIVE)
    betas: tuple[float, float] = option((0.9, 0.999), "decay rates of the first and second moment", UNIT)
    eps: float = option(1e-8, "added to the denominator", NON_NEGATIVE)
    state_dtype: StateDtype = option(
        "float32", "dtype of moments and bases; 'parameter': the parameter's, half the bytes for bfloat16 weights"
    )


@dataclass(frozen=True)
class ApolloMiniOptions(ApolloOptions):
    """Options of ``lightning_optim.optimizers.ApolloAdamW``, with what the paper fixes for APOLLO-Mini as defaults."""

    rank: int = option(1, "directions of the subspace", AT_LEAST_ONE)
    scale: float = option(128.0, "updates of projected matrices are multiplied by its square root", POSITIVE)
    scale_type: Literal["channel", "tensor"] = option("tensor", "one factor per row or column, or one for the matrix")


def _norm_elements(shape: tuple[int, ...], options: Any) -> int:
    return int(options.norm_growth_limit is not None and options.rank is not None and len(shape) >= 2)


APOLLO = OptimizerSpec(
    name="apollo_adamw",
    target="lightning_optim.optimizers:ApolloAdamW",
    summary="APOLLO: the gradient, scaled as AdamW would scale it in a random subspace",
    source="APOLLO: SGD-like Memory, AdamW-level Performance, https://arxiv.org/abs/2412.05270; "
    "lightning_optim.optimizers.ApolloAdamW",
    options=ApolloOptions,
    state_format="ApolloAdamW/1",
    sharded=True,
    default_lr=1e-2,
    default_weight_decay=0.0,
    state=StateLayout(
        buffers=(
            *MOMENTS,
            *(dataclasses.replace(basis, when=lambda o: o.proj == "svd") for basis in BASES),
            Buffer("update_norm", float32=True, elements=_norm_elements),
        )
    ),
    half_weights=True,
    lists_layerwise=True,
    projects=True,
    xla="it skips gradients that are not finite, and so waits for the device several times in every step",
    note="apollo_mini is the same with rank=1, scale=128 and scale_type=tensor: hardly more memory than SGD",
)

APOLLO_MINI = dataclasses.replace(
    APOLLO,
    name="apollo_mini",
    summary="APOLLO with one direction and one factor per matrix: hardly more memory than SGD",
    options=ApolloMiniOptions,
    lists_layerwise=False,
    note="",
)

ROWS = (APOLLO, APOLLO_MINI)
