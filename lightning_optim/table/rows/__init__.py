"""The table: one file per provider, one row per optimizer.

To add an optimizer, add a row here and a case in ``tests/cases.py``; CONTRIBUTING.md shows both.
"""

from __future__ import annotations

from lightning_optim.table._spec import OptimizerSpec
from lightning_optim.table.rows import (
    _adafactor_lomo,
    _adamw_variants,
    _apex,
    _apollo,
    _bitsandbytes,
    _flashoptim,
    _large_batch,
    _low_rank,
    _muon,
    _npu,
    _optimi,
    _prodigy,
    _scale,
    _schedulefree,
    _soap,
    _torch_optim,
    _torchao,
    _xla,
)

ROWS: tuple[OptimizerSpec, ...] = (
    *_torch_optim.ROWS,
    *_xla.ROWS,
    *_npu.ROWS,
    *_apex.ROWS,
    *_torchao.ROWS,
    *_bitsandbytes.ROWS,
    *_flashoptim.ROWS,
    *_adamw_variants.ROWS,
    *_large_batch.ROWS,
    *_low_rank.ROWS,
    *_apollo.ROWS,
    *_muon.ROWS,
    *_prodigy.ROWS,
    *_scale.ROWS,
    *_soap.ROWS,
    *_adafactor_lomo.ROWS,
    *_optimi.ROWS,
    *_schedulefree.ROWS,
)
