"""GaLore's rows, whose moments are kept in low-rank subspaces of the gradients."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from typing_extensions import Self

from lightning_optim.optimizers._factored import TENSORS, elements
from lightning_optim.optimizers._galore import default_eps
from lightning_optim.optimizers._low_rank import BLOCKS_WOULD_MOVE, StateDtype
from lightning_optim.optimizers._projection import ProjectionMethod, ProjectionType, base_shapes, low_rank_shape
from lightning_optim.table._options import AT_LEAST_ONE, NON_NEGATIVE, UNIT, Options, option
from lightning_optim.table._spec import Buffer, OptimizerSpec, StateLayout
from lightning_optim.table.rows import _bitsandbytes as bitsandbytes
from lightning_optim.table.rows._adafactor_lomo import AdafactorOptions

_PAPER = "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, https://arxiv.org/abs/2403.03507"
_NOTE = (
    "optim_target_modules chooses the modules whose weights are projected, by default 'all-linear'; a convolution's "
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
        None, "added to the denominator; None: 1e-8, or 1e-6 with match_galore_torch", NON_NEGATIVE
    )
    match_galore_torch: bool = option(
        False, "as in galore-torch: epsilon without bias correction, and decay after the update"
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


def _moment_shape(shape: tuple[int, ...], options: Any) -> tuple[int, ...]:
    # A group that is not projected has no rank.
    if options.rank is None or len(shape) < 2:
        return shape
    return low_rank_shape(shape, options.rank, options.proj_type)


def _moment_elements(shape: tuple[int, ...], options: Any) -> int:
    return math.prod(_moment_shape(shape, options))


def _factored_elements(name: str, shape: tuple[int, ...], options: Any) -> int:
    return elements(name, _moment_shape(shape, options))


def _basis_elements(name: str, shape: tuple[int, ...], options: Any) -> int:
    if options.rank is None or len(shape) < 2:
        return 0
    return math.prod(base_shapes(shape, options.rank, options.proj_type).get(name, (0,)))


def _states_are_float32(options: Any) -> bool:
    return bool(options.state_dtype == "float32")


_EXP_AVG = Buffer("exp_avg", float32=_states_are_float32, elements=_moment_elements)
#: AdamW's moments, those of projected matrices in the subspace.
MOMENTS = (_EXP_AVG, dataclasses.replace(_EXP_AVG, name="exp_avg_sq"))
#: The bases of the subspaces.
BASES = tuple(
    Buffer(name, float32=_states_are_float32, elements=partial(_basis_elements, name), quantized=False)
    for name in ("left", "right")
)

_GALORE_ADAMW = OptimizerSpec(
    name="galore_adamw",
    target="lightning_optim.optimizers:GaLoreAdamW",
    summary="AdamW in a low-rank subspace of the gradient",
    source=f"{_PAPER}; lightning_optim.optimizers.GaLoreAdamW",
    options=GaLoreAdamWOptions,
    state_format="GaLoreAdamW/1",
    sharded=True,
    default_lr=1e-3,
    default_weight_decay=0.0,
    state=StateLayout(buffers=MOMENTS + BASES),
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
        sharded=False,
        unsharded=BLOCKS_WOULD_MOVE,
        state=StateLayout(MOMENTS + BASES, quantization=bitsandbytes.QUANTIZATION),
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
                *(Buffer(name, float32=True, elements=partial(_factored_elements, name)) for name in TENSORS),
                dataclasses.replace(_EXP_AVG, when=lambda o: o.beta1 is not None),
                *BASES,
            )
        ),
    ),
)
