"""What is known about each optimizer, as frozen data: names, options, packages, states. Nothing is built here.

One row per optimizer in ``rows/``, one file per provider; CONTRIBUTING.md shows how to add one. :class:`OptimizerSpec`
documents a row's fields. No ``if name == ...`` anywhere: what differs between rows is a field.
"""

from __future__ import annotations

from lightning_optim.table import _availability as availability
from lightning_optim.table._availability import Requirement
from lightning_optim.table._collections import COLLECTIONS, collection_of
from lightning_optim.table._convert import convert
from lightning_optim.table._layerwise import SUFFIX, LayerwiseOptions, layerwise_row
from lightning_optim.table._options import (
    NON_NEGATIVE,
    POSITIVE,
    UNIT,
    OptionInfo,
    Options,
    Range,
    Role,
    as_mapping,
    as_number,
    coerce,
    describe,
    option,
    parse,
    required,
)
from lightning_optim.table._others import LeavesOthers
from lightning_optim.table._registry import ENTRY_POINT_GROUP, REGISTRY, refuse_unknown, register
from lightning_optim.table._spec import Buffer, OptimizerSpec, Quantization, StateLayout
from lightning_optim.table._strategies import (
    AFTER_BACKWARD,
    CLOSURE_OF_ONE_PROCESS,
    GRAPH_OF_ONE_PROCESS,
    NEEDS_PROCESS_GROUP,
    STRATEGIES,
    Support,
    strategies,
)
from lightning_optim.table.rows import ROWS
from lightning_optim.table.rows._npu import REQUIREMENTS as NPU
from lightning_optim.table.rows._torchao import REQUIREMENTS as TORCHAO
from lightning_optim.table.rows._xla import REQUIREMENTS as XLA

__all__ = [
    "AFTER_BACKWARD",
    "CLOSURE_OF_ONE_PROCESS",
    "COLLECTIONS",
    "ENTRY_POINT_GROUP",
    "GRAPH_OF_ONE_PROCESS",
    "NEEDS_PROCESS_GROUP",
    "NON_NEGATIVE",
    "NPU",
    "POSITIVE",
    "REGISTRY",
    "ROWS",
    "STRATEGIES",
    "SUFFIX",
    "TORCHAO",
    "UNIT",
    "XLA",
    "Buffer",
    "LayerwiseOptions",
    "LeavesOthers",
    "OptimizerSpec",
    "OptionInfo",
    "Options",
    "Quantization",
    "Range",
    "Requirement",
    "Role",
    "StateLayout",
    "Support",
    "as_mapping",
    "as_number",
    "availability",
    "coerce",
    "collection_of",
    "convert",
    "describe",
    "layerwise_row",
    "option",
    "parse",
    "refuse_unknown",
    "register",
    "required",
    "strategies",
]
