"""Any optimizer for any LightningModule, by name.

class LitModel(OptimMixin, L.LightningModule):
    def __init__(self, width: int = 256, **optim):
        super().__init__(**optim)

L.Trainer(max_epochs=3).fit(LitModel(optim="lion_8bit", lr=1e-4))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_optim._moved import keep_old_paths as _keep_old_paths
from lightning_optim.build import WATCHERS as _WATCHERS
from lightning_optim.build import (
    Conversion,
    OptimArguments,
    OptimConfig,
    Remark,
    build_optimizer,
    build_schedule,
    convert_training_arguments,
    migrate_state_dict,
)
from lightning_optim.errors import (
    DuplicateOptimizer,
    IncompatibleTrainer,
    InvalidOption,
    InvalidParamGroups,
    MissingDependency,
    UnknownOptimizer,
    UnknownSchedule,
    UnreadableCheckpoint,
    UntrustedOptimizer,
)
from lightning_optim.layerwise import Clipping, Layerwise, Replicas
from lightning_optim.table import (
    REGISTRY,
    Buffer,
    OptimizerSpec,
    Options,
    Quantization,
    Range,
    Requirement,
    StateLayout,
    option,
    register,
)
from lightning_optim.trainer._mixin import OptimMixin
from lightning_optim.trainer._optim_callback import OptimCallback
from lightning_optim.trainer.accelerators import NPUAccelerator, PJRTAccelerator
from lightning_optim.trainer.accelerators import register as _register_accelerators
from lightning_optim.trainer.callbacks._grokking import GrokkingSignal
from lightning_optim.trainer.callbacks._monitor import OptimizerMonitor
from lightning_optim.trainer.callbacks._schedule_free import ScheduleFreeCallback
from lightning_optim.trainer.callbacks._unattended import watch as _watch
from lightning_optim.trainer.strategies import (
    FSDP2Strategy,
    FusedDDPStrategy,
    FusedMixedPrecision,
    FusedStrategy,
    LayerwiseDDPStrategy,
    LayerwiseFSDP2Strategy,
    LayerwiseStrategy,
    NPUDDPStrategy,
    NPUStrategy,
    SingleDeviceXLASyncFreeStrategy,
    XLASyncFreePrecision,
    XLASyncFreeStrategy,
)
from lightning_optim.trainer.strategies import register as _register_strategies

if TYPE_CHECKING:
    from lightning_optim.choose import MemoryEstimate as MemoryEstimate
    from lightning_optim.choose import Recommendation as Recommendation
    from lightning_optim.choose import Shape as Shape
    from lightning_optim.choose import compare_memory as compare_memory
    from lightning_optim.choose import estimate_memory as estimate_memory
    from lightning_optim.choose import recommend as recommend
    from lightning_optim.trainer._cli import OptimCLI as OptimCLI

__version__ = "0.2.0"

__all__ = [
    "REGISTRY",
    "Buffer",
    "Clipping",
    "Conversion",
    "DuplicateOptimizer",
    "FSDP2Strategy",
    "FusedDDPStrategy",
    "FusedMixedPrecision",
    "FusedStrategy",
    "GrokkingSignal",
    "IncompatibleTrainer",
    "InvalidOption",
    "InvalidParamGroups",
    "Layerwise",
    "LayerwiseDDPStrategy",
    "LayerwiseFSDP2Strategy",
    "LayerwiseStrategy",
    "MemoryEstimate",
    "MissingDependency",
    "NPUAccelerator",
    "NPUDDPStrategy",
    "NPUStrategy",
    "OptimArguments",
    "OptimCallback",
    "OptimConfig",
    "OptimMixin",
    "OptimizerMonitor",
    "OptimizerSpec",
    "Options",
    "PJRTAccelerator",
    "Quantization",
    "Range",
    "Recommendation",
    "Remark",
    "Replicas",
    "Requirement",
    "ScheduleFreeCallback",
    "Shape",
    "SingleDeviceXLASyncFreeStrategy",
    "StateLayout",
    "UnknownOptimizer",
    "UnknownSchedule",
    "UnreadableCheckpoint",
    "UntrustedOptimizer",
    "XLASyncFreePrecision",
    "XLASyncFreeStrategy",
    "build_optimizer",
    "build_schedule",
    "compare_memory",
    "convert_training_arguments",
    "estimate_memory",
    "migrate_state_dict",
    "option",
    "recommend",
    "register",
]

_keep_old_paths()
_register_accelerators()
_WATCHERS.append(_watch)
_register_strategies()


# What most runs do not need, by the room that hands it out.
_ON_DEMAND = dict.fromkeys(
    ("MemoryEstimate", "Recommendation", "Shape", "compare_memory", "estimate_memory", "recommend"),
    "lightning_optim.choose",
)


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return getattr(importlib.import_module(_ON_DEMAND[name]), name)
    # OptimCLI needs jsonargparse, an optional package.
    if name == "OptimCLI":
        from lightning_optim.trainer import OptimCLI as optim_cli  # noqa: N813

        return optim_cli
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
