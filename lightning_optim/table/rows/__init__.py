"""The table: one file per provider, one row per optimizer.

To add an optimizer, add a row here and a case in ``tests/cases.py``; CONTRIBUTING.md shows both.
"""

from __future__ import annotations

from lightning_optim.table._spec import OptimizerSpec
from lightning_optim.table.rows import (
    _adafactor_lomo as lean,
)
from lightning_optim.table.rows import (
    _adamw_variants as adamw_variants,
)
from lightning_optim.table.rows import (
    _apex as apex,
)
from lightning_optim.table.rows import (
    _apollo as apollo,
)
from lightning_optim.table.rows import (
    _bitsandbytes as bitsandbytes,
)
from lightning_optim.table.rows import (
    _low_rank as low_rank,
)
from lightning_optim.table.rows import (
    _npu as npu,
)
from lightning_optim.table.rows import (
    _optimi as optimi,
)
from lightning_optim.table.rows import (
    _schedulefree as schedulefree,
)
from lightning_optim.table.rows import (
    _torch_optim as torch_optim,
)
from lightning_optim.table.rows import (
    _torchao as torchao,
)
from lightning_optim.table.rows import (
    _xla as xla,
)

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
