"""Muon and NorMuon: hidden matrices by orthogonalized momentum, all other parameters by another optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_optim.table._options import AT_LEAST_ONE, POSITIVE, UNIT, option
from lightning_optim.table._others import LeavesOthers
from lightning_optim.table._spec import Buffer, OptimizerSpec, StateLayout


@dataclass(frozen=True)
class MuonOptions(LeavesOthers):
    """Options of ``lightning_optim.optimizers.Muon``."""

    momentum: float = option(0.95, "decay rate of the gradients' average", UNIT)
    nesterov: bool = option(True, "orthogonalize the average of gradient and momentum, not the momentum itself")
    ns_steps: int = option(5, "Newton-Schulz iterations", AT_LEAST_ONE)
    ns_coefficients: tuple[float, float, float] = option(
        (3.4445, -4.775, 2.0315), "coefficients of the iteration's polynomial"
    )
    eps: float = option(1e-7, "smallest norm to divide by before the iteration", POSITIVE)
    cautious: bool = option(False, "decay only weights that the update moves towards zero as well")
    lr_scale: Literal["original", "match_rms_adamw"] = option(
        "original",
        "factor on lr for a matrix [m, n]: 'original' is sqrt(max(1, m / n)); 'match_rms_adamw' is "
        "0.2 * sqrt(max(m, n)), which fits learning rates of AdamW",
    )
    split: int = option(
        1,
        "equal matrices that a matrix is, along its rows; for a fused projection, by a pattern of param_groups",
        AT_LEAST_ONE,
    )
    ns_dtype: Literal["bfloat16", "float32", "float64"] | None = option(
        None, "dtype of the iteration; None is bfloat16 where the device multiplies that fast, else the weights'"
    )
    batched: bool = option(True, "orthogonalize small matrices of one shape as stacks")

    @property
    def scaled_like_adamw(self) -> bool:
        return self.lr_scale == "match_rms_adamw"


@dataclass(frozen=True)
class NorMuonOptions(MuonOptions):
    """Options of ``lightning_optim.optimizers.NorMuon``."""

    beta2: float = option(0.95, "decay rate of the rows' second moments", UNIT)


def _rows(shape: tuple[int, ...], options: MuonOptions) -> int:
    """Returns the number of rows of a matrix, or of a convolution's weight."""
    return shape[0] if len(shape) >= 2 else 0


_MOMENTUM = Buffer("momentum_buffer", float32=True)
_NOTE = (
    "embeddings, the output layer and vectors are stepped by optim_args others (adamw); the report says what was taken "
    "for the output layer, and optim_target_modules settles which matrices are hidden"
)

MUON = OptimizerSpec(
    name="muon",
    target="lightning_optim.optimizers:Muon",
    summary="momentum orthogonalized by Newton-Schulz, for hidden matrices",
    source="Jordan et al., https://kellerjordan.github.io/posts/muon/; https://arxiv.org/abs/2502.16982; "
    "lightning_optim.optimizers.Muon",
    options=MuonOptions,
    state_format="Muon/1",
    sharded=True,
    default_lr=1e-3,
    default_weight_decay=0.1,
    takes="hidden matrices",
    half_weights=True,
    state=StateLayout(buffers=(_MOMENTUM,)),
    note=_NOTE,
)

NORMUON = OptimizerSpec(
    name="normuon",
    target="lightning_optim.optimizers:NorMuon",
    summary="Muon with rows of equal second moment",
    source="https://arxiv.org/abs/2510.05491; lightning_optim.optimizers.NorMuon",
    options=NorMuonOptions,
    state_format="NorMuon/1",
    sharded=True,
    default_lr=1e-3,
    default_weight_decay=0.1,
    takes="hidden matrices",
    half_weights=True,
    state=StateLayout(buffers=(_MOMENTUM, Buffer("exp_avg_sq_row", float32=True, elements=_rows))),
    note=_NOTE,
)

ROWS = (MUON, NORMUON)
