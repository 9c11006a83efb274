"""The row whose class is torch_xla's (https://docs.pytorch.org/xla)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_optim.table._availability import Requirement
from lightning_optim.table._options import option
from lightning_optim.table._spec import OptimizerSpec
from lightning_optim.table.rows._torch_optim import ADAMW_FORMAT, ADAMW_SOURCE, ADAMW_STATE, AdamOptions

REQUIREMENTS = (
    Requirement(
        "torch_xla",
        "torch_xla",
        ">=2.9",
        same_minor_as="torch",
        command="pip install 'torch==2.9.0' 'torch_xla==2.9.0'",
        device="xla",
    ),
)


@dataclass(frozen=True)
class SyncFreeAdamWOptions(AdamOptions):
    """Options of ``torch_xla.amp.syncfree.AdamW``."""

    amsgrad: bool = option(False, "divide by the largest second moment seen")
    maximize: bool = option(False, "ascend instead of descend")


ROWS = (
    OptimizerSpec(
        name="adamw_torch_xla",
        target="lightning_optim.optimizers.adapters._xla:AdamW",
        wraps="torch_xla.amp.syncfree.AdamW",
        summary="AdamW, one XLA operation per parameter that never waits for the device",
        source=f"{ADAMW_SOURCE}; torch_xla.amp.syncfree.AdamW",
        options=SyncFreeAdamWOptions,
        default_lr=1e-3,
        default_weight_decay=1e-2,
        requirements=REQUIREMENTS,
        state=ADAMW_STATE,
        state_format=ADAMW_FORMAT,
        devices=frozenset({"xla"}),
        in_place=frozenset({"xla"}),
        fallbacks=("adamw",),
    ),
)
