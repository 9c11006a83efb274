"""Rows that keep their moments in low-rank subspaces of the gradients: GaLore."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import Self

from lightning_optim.optimizers._factored import column_elements, full_elements, row_elements
from lightning_optim.optimizers._galore import default_eps
from lightning_optim.optimizers._low_rank import StateDtype
from lightning_optim.optimizers._projection import ProjectionMethod, ProjectionType, base_shapes, low_rank_shape
from lightning_optim.table._options import AT_LEAST_ONE, NON_NEGATIVE, UNIT, Options, option
from lightning_optim.table._spec import Buffer, OptimizerSpec, StateLayout
from lightning_optim.table.rows import _bitsandbytes as bitsandbytes
from lightning_optim.table.rows._adafactor_lomo import AdafactorOptions

_PAPER = "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, https://arxiv.org/abs/2403.03507"
_NOTE = (
    "optim_target_modules chooses the modules whose weights are projected, 'all-linear' unless given; a convolution's "
    "weight is projected as the matrix [out, rest]"
)


@dataclass(frozen=True)
class GaLoreOptions(Options):
    """Options of the projection."""

    only_projected: ClassVar[frozenset[str]] = frozenset(
        {"rank", "update_proj_gap", "scale", "proj_type", "projection"}
    )
    bound_to_state: ClassVar[frozenset[str]] = frozenset({"rank", "proj_type"})

    rank: int = option(128, "directions of the subspace", AT_LEAST_ONE)
    update_proj_gap: int = option(200, "steps between two searches for the subspace", AT_LEAST_ONE)
    scale: float = option(0.25, "factor on the learning rate of projected matrices", NON_NEGATIVE)
    proj_type: ProjectionType = option(
        "std", "side to project: 'std' the shorter one, 'reverse_std' the longer one, 'full' both"
    )
    projection: ProjectionMethod = option(
        "randomized", "'svd' is exact, 'randomized' finds nearly the same subspace at a fraction of the cost"
    )
    state_dtype: StateDtype = option(
        "float32", "dtype of moments and bases; 'parameter': the parameter's, half the bytes for bfloat16 weights"
    )


@dataclass(frozen=True)
class GaLoreAdamWOptions(GaLoreOptions):
    """Options of ``lightning_optim.optimizers.GaLoreAdamW``."""

    betas: tuple[float, float] = option((0.9, 0.999), "decay rates of the first and second moment", UNIT)
    eps: float | None = option(
        None, "added to the denominator; None: 1e-8, with match_galore_torch 1e-6 as there", NON_NEGATIVE
    )
    match_galore_torch: bool = option(
        False, "do as galore-torch: its epsilon, which is not bias-corrected, and the decay after the update"
    )

    def settled(self) -> Self:
        return self if self.eps is not None else dataclasses.replace(self, eps=default_eps(self.match_galore_torch))


@dataclass(frozen=True)
class GaLoreAdafactorOptions(GaLoreOptions, AdafactorOptions):
    """Options of :class:`~lightning_optim.optimizers.GaLoreAdafactor`."""


@dataclass(frozen=True)
class GaLoreAdamW8bitOptions(GaLoreAdamWOptions):
    """Options of ``lightning_optim.optimizers.GaLoreAdamW8bit``."""

    min_8bit_size: int = option(4096, "moments with fewer elements stay unquantized", NON_NEGATIVE)
    quantize_embeddings: bool = option(False, "store embeddings' moments in 8 bits, too", scope="policy")


def moment_elements(shape: tuple[int, ...], options: Any) -> int:
    """Returns the elements of a moment; a group that is not projected has no rank."""
    return math.prod(_moment_shape(shape, options))


def left_elements(shape: tuple[int, ...], options: Any) -> int:
    """Returns the elements of the left basis."""
    return _base_elements("left", shape, options)


def right_elements(shape: tuple[int, ...], options: Any) -> int:
    """Returns the elements of the right basis."""
    return _base_elements("right", shape, options)


def _moment_shape(shape: tuple[int, ...], options: Any) -> tuple[int, ...]:
    if options.rank is None or len(shape) < 2:
        return shape
    return low_rank_shape(shape, options.rank, options.proj_type)


def _base_elements(name: str, shape: tuple[int, ...], options: Any) -> int:
    if options.rank is None or len(shape) < 2:
        return 0
    return math.prod(base_shapes(shape, options.rank, options.proj_type).get(name, (0,)))


def _low_row_elements(shape: tuple[int, ...], options: Any) -> int:
    return row_elements(_moment_shape(shape, options))


def _low_column_elements(shape: tuple[int, ...], options: Any) -> int:
    return column_elements(_moment_shape(shape, options))


def states_are_float32(options: Any) -> bool:
    """Whether moments and bases are float32 where the parameter's dtype is narrower."""
    return bool(options.state_dtype == "float32")


#: AdamW's moments, those of projected matrices in the subspace.
MOMENTS = (
    Buffer("exp_avg", float32=states_are_float32, elements=moment_elements),
    Buffer("exp_avg_sq", float32=states_are_float32, elements=moment_elements),
)
_BASES = (
    Buffer("left", float32=states_are_float32, elements=left_elements, quantized=False),
    Buffer("right", float32=states_are_float32, elements=right_elements, quantized=False),
)

_GALORE_ADAMW = OptimizerSpec(
    name="galore_adamw",
    target="lightning_optim.optimizers:GaLoreAdamW",
    summary="AdamW in a low-rank subspace of the gradient",
    source=f"{_PAPER}; lightning_optim.optimizers.GaLoreAdamW",
    options=GaLoreAdamWOptions,
    state_format="GaLoreAdamW/1",
    default_lr=1e-3,
    default_weight_decay=0.0,
    state=StateLayout(buffers=MOMENTS + _BASES),
    half_weights=True,
    lists_layerwise=True,
    projects=True,
    xla="it skips gradients that are not finite, and so waits for the device several times in every step",
    note=_NOTE,
)

ROWS = (
    _GALORE_ADAMW,
    dataclasses.replace(
        _GALORE_ADAMW,
        name="galore_adamw_8bit",
        target="lightning_optim.optimizers:GaLoreAdamW8bit",
        summary="AdamW in a low-rank subspace of the gradient, 8-bit moments",
        source=f"{_PAPER}; lightning_optim.optimizers.GaLoreAdamW8bit",
        options=GaLoreAdamW8bitOptions,
        state_format="GaLoreAdamW8bit/1",
        state=StateLayout(MOMENTS + _BASES, quantization=bitsandbytes.QUANTIZATION),
        requirements=bitsandbytes.REQUIREMENTS,
        extra="bitsandbytes",
        devices=bitsandbytes.DEVICES,
        fallbacks=("galore_adamw",),
    ),
    dataclasses.replace(
        _GALORE_ADAMW,
        name="galore_adafactor",
        target="lightning_optim.optimizers:GaLoreAdafactor",
        summary="Adafactor in a low-rank subspace of the gradient",
        source=f"{_PAPER}; lightning_optim.optimizers.GaLoreAdafactor",
        options=GaLoreAdafactorOptions,
        state_format="GaLoreAdafactor/1",
        state=StateLayout(
            buffers=(
                Buffer("exp_avg_sq_row", float32=True, elements=_low_row_elements),
                Buffer("exp_avg_sq_col", float32=True, elements=_low_column_elements),
                Buffer("exp_avg_sq", float32=True, elements=full_elements),
                Buffer(
                    "exp_avg",
                    float32=states_are_float32,
                    when=lambda o: o.beta1 is not None,
                    elements=moment_elements,
                ),
                *_BASES,
            )
        ),
    ),
)
