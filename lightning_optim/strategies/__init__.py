"""Lightning strategies, one per file; their public names are in :mod:`lightning_optim`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import Strategy, StrategyRegistry

from lightning_optim.packages import is_free
from lightning_optim.strategies.fused import FusedDDPStrategy, FusedMixedPrecision, FusedStrategy, StepsFused
from lightning_optim.strategies.layerwise import LayerwiseStrategy
from lightning_optim.strategies.layerwise_ddp import LayerwiseDDPStrategy
from lightning_optim.strategies.layerwise_fsdp2 import LayerwiseFSDP2Strategy
from lightning_optim.strategies.npu import NPUDDPStrategy, NPUStrategy
from lightning_optim.strategies.xla import SingleDeviceXLASyncFreeStrategy, XLASyncFreeStrategy
from lightning_optim.strategies.xla_precision import XLASyncFreePrecision

__all__ = [
    "FusedDDPStrategy",
    "FusedMixedPrecision",
    "FusedStrategy",
    "LayerwiseDDPStrategy",
    "LayerwiseFSDP2Strategy",
    "LayerwiseStrategy",
    "NPUDDPStrategy",
    "NPUStrategy",
    "SingleDeviceXLASyncFreeStrategy",
    "StepsFused",
    "XLASyncFreePrecision",
    "XLASyncFreeStrategy",
    "register",
]

_FLAGS: tuple[tuple[str, type[Strategy], dict[str, Any]], ...] = (
    ("fused", FusedStrategy, {}),
    ("fused_ddp", FusedDDPStrategy, {"start_method": "popen"}),
    ("fused_ddp_spawn", FusedDDPStrategy, {"start_method": "spawn"}),
    ("fused_ddp_fork", FusedDDPStrategy, {"start_method": "fork"}),
    ("fused_ddp_notebook", FusedDDPStrategy, {"start_method": "fork"}),
    ("layerwise", LayerwiseStrategy, {}),
    ("layerwise_ddp", LayerwiseDDPStrategy, {"start_method": "popen"}),
    ("layerwise_ddp_spawn", LayerwiseDDPStrategy, {"start_method": "spawn"}),
    ("layerwise_ddp_fork", LayerwiseDDPStrategy, {"start_method": "fork"}),
    ("layerwise_ddp_notebook", LayerwiseDDPStrategy, {"start_method": "fork"}),
    ("layerwise_fsdp2", LayerwiseFSDP2Strategy, {}),
    ("single_xla_syncfree", SingleDeviceXLASyncFreeStrategy, {}),
    ("xla_syncfree", XLASyncFreeStrategy, {}),
    ("npu", NPUStrategy, {}),
    ("npu_ddp", NPUDDPStrategy, {}),
)


def register() -> None:
    """Makes ``Trainer(strategy=...)`` know the flags; one that somebody else has taken stays theirs."""
    for flag, strategy, arguments in _FLAGS:
        if is_free(StrategyRegistry, "strategy", flag, strategy):
            description = (strategy.__doc__ or "").splitlines()[0]
            StrategyRegistry.register(flag, strategy, description, override=True, **arguments)
