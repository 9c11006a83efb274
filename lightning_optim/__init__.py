"""Any optimizer for any LightningModule, by name.

class LitModel(OptimMixin, L.LightningModule):
    def __init__(self, width: int = 256, **optim):
        super().__init__(**optim)

L.Trainer(max_epochs=3).fit(LitModel(optim="lion_8bit", lr=1e-4))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_optim.accelerators import NPUAccelerator, PJRTAccelerator
from lightning_optim.accelerators import register as _register_accelerators
from lightning_optim.arguments import OptimArguments
from lightning_optim.availability import Requirement
from lightning_optim.callbacks.grokking import GrokkingSignal
from lightning_optim.callbacks.optim import OptimCallback
from lightning_optim.callbacks.schedule_free import ScheduleFreeCallback
from lightning_optim.callbacks.unattended import watch as _watch
from lightning_optim.config import OptimConfig
from lightning_optim.errors import (
    DuplicateOptimizer,
    IncompatibleTrainer,
    InvalidOption,
    InvalidParamGroups,
    MissingDependency,
    UnknownOptimizer,
    UnknownSchedule,
    UntrustedOptimizer,
)
from lightning_optim.factory import WATCHERS as _WATCHERS
from lightning_optim.factory import build_optimizer
from lightning_optim.layerwise.clipping import Clipping
from lightning_optim.layerwise.engine import Layerwise
from lightning_optim.layerwise.replicas import Replicas
from lightning_optim.mixin import OptimMixin
from lightning_optim.options import Options, option
from lightning_optim.registry import REGISTRY, register
from lightning_optim.schedules import build_schedule
from lightning_optim.spec import Buffer, OptimizerSpec, Quantization, StateLayout
from lightning_optim.strategies import (
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
from lightning_optim.strategies import register as _register_strategies

if TYPE_CHECKING:
    from lightning_optim.cli import OptimCLI as OptimCLI

__version__ = "0.1.0"

__all__ = [
    "REGISTRY",
    "Buffer",
    "Clipping",
    "DuplicateOptimizer",
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
    "MissingDependency",
    "NPUAccelerator",
    "NPUDDPStrategy",
    "NPUStrategy",
    "OptimArguments",
    "OptimCallback",
    "OptimConfig",
    "OptimMixin",
    "OptimizerSpec",
    "Options",
    "PJRTAccelerator",
    "Quantization",
    "Replicas",
    "Requirement",
    "ScheduleFreeCallback",
    "SingleDeviceXLASyncFreeStrategy",
    "StateLayout",
    "UnknownOptimizer",
    "UnknownSchedule",
    "UntrustedOptimizer",
    "XLASyncFreePrecision",
    "XLASyncFreeStrategy",
    "build_optimizer",
    "build_schedule",
    "option",
    "register",
]

_register_accelerators()
_WATCHERS.append(_watch)
_register_strategies()


def __getattr__(name: str) -> Any:
    # OptimCLI needs jsonargparse, an optional package.
    if name == "OptimCLI":
        try:
            from lightning_optim.cli import OptimCLI as optim_cli  # noqa: N813
        except ModuleNotFoundError as error:
            raise MissingDependency(
                f"OptimCLI needs the package {error.name!r}: pip install 'jsonargparse[signatures]>=4.40'"
            ) from error
        return optim_cli
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
