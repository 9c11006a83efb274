"""What a step needs, whoever wrote the optimizer. Pure torch.

Kernels and the memory layout of states, clipping, train and eval points, what happens before a step, what torch.compile
must leave alone, and the marks that identify a state dict's optimizer. Algorithms (``optimizers/``) do not belong here,
nor does anything that knows the table.
"""

from __future__ import annotations

from lightning_optim.stepping._averaging import KeepsTrainingPoint
from lightning_optim.stepping._clipping import Clipping, norms_of, total_norm
from lightning_optim.stepping._composite import PART, Composite, averaging_parts, own_clips, parts_of
from lightning_optim.stepping._finite import say_if_not_finite
from lightning_optim.stepping._fused import HALF, FusedStep, fused_class, is_packed
from lightning_optim.stepping._kernels import keep_kernel, laid_out_as
from lightning_optim.stepping._preparing import preparations, prepare_step
from lightning_optim.stepping._random import seed, undisturbed
from lightning_optim.stepping._sharding import (
    Layout,
    forget_gathered,
    is_sharded,
    local,
    spread_alike,
    without_reduction,
)
from lightning_optim.stepping._spreading import SpreadsStates, spread_state
from lightning_optim.stepping._state_marks import (
    FORMAT,
    IDENTIFIER,
    MARKS,
    MEMBERS,
    check_state,
    plain_name,
    refuse_foreign,
)
from lightning_optim.stepping._together import Deal, Sum, Together, Update, add_up, alone, run_together, side_by_side
from lightning_optim.stepping._uncompiled import StepsUncompiled, uncompiled
from lightning_optim.stepping._valid_groups import as_group, only_valid_groups

__all__ = [
    "FORMAT",
    "HALF",
    "IDENTIFIER",
    "MARKS",
    "MEMBERS",
    "PART",
    "Clipping",
    "Composite",
    "Deal",
    "FusedStep",
    "KeepsTrainingPoint",
    "Layout",
    "SpreadsStates",
    "StepsUncompiled",
    "Sum",
    "Together",
    "Update",
    "add_up",
    "alone",
    "as_group",
    "averaging_parts",
    "check_state",
    "forget_gathered",
    "fused_class",
    "is_packed",
    "is_sharded",
    "keep_kernel",
    "laid_out_as",
    "local",
    "norms_of",
    "only_valid_groups",
    "own_clips",
    "parts_of",
    "plain_name",
    "preparations",
    "prepare_step",
    "refuse_foreign",
    "run_together",
    "say_if_not_finite",
    "seed",
    "side_by_side",
    "spread_alike",
    "spread_state",
    "total_norm",
    "uncompiled",
    "undisturbed",
    "without_reduction",
]
