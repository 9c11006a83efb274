"""The table: one file per provider, one row per optimizer.

To add an optimizer, add a row here and a case in ``tests/cases.py``; CONTRIBUTING.md shows both.
"""

from __future__ import annotations

from lightning_optim.catalog import (
    adamw_variants,
    apex,
    apollo,
    bitsandbytes,
    lean,
    low_rank,
    npu,
    optimi,
    schedulefree,
    torch_optim,
    torchao,
    xla,
)
from lightning_optim.spec import OptimizerSpec

ROWS: tuple[OptimizerSpec, ...] = (
    *torch_optim.ROWS,
    *xla.ROWS,
    *npu.ROWS,
    *apex.ROWS,
    *torchao.ROWS,
    *bitsandbytes.ROWS,
    *adamw_variants.ROWS,
    *low_rank.ROWS,
    *apollo.ROWS,
    *lean.ROWS,
    *optimi.ROWS,
    *schedulefree.ROWS,
)
