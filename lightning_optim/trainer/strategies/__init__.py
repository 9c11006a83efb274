"""Lightning strategies, one per file; their public names are in :mod:`lightning_optim`."""

from __future__ import annotations

import importlib
from typing import Any

from lightning.pytorch.strategies import Strategy, StrategyRegistry

from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer.strategies._blocks import shard_blocks, shards_itself
from lightning_optim.trainer.strategies._fsdp2 import FSDP2Strategy
from lightning_optim.trainer.strategies._fused import FusedDDPStrategy, FusedMixedPrecision, FusedStrategy, StepsFused
from lightning_optim.trainer.strategies._layerwise import LayerwiseStrategy
from lightning_optim.trainer.strategies._layerwise_ddp import LayerwiseDDPStrategy
from lightning_optim.trainer.strategies._layerwise_fsdp2 import LayerwiseFSDP2Strategy
from lightning_optim.trainer.strategies._npu import NPUDDPStrategy, NPUStrategy
from lightning_optim.trainer.strategies._whole_file import read_whole_files
from lightning_optim.trainer.strategies._whole_folder import write_whole_folders
from lightning_optim.trainer.strategies._xla import SingleDeviceXLASyncFreeStrategy, XLASyncFreeStrategy
from lightning_optim.trainer.strategies._xla_precision import XLASyncFreePrecision

__all__ = [
    "MOVABLE",
    "FSDP2Strategy",
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
    "read_whole_files",
    "register",
    "shard_blocks",
    "shards_itself",
    "write_whole_folders",
]

# Those that also train under a Trainer of pytorch_lightning.
MOVABLE: tuple[type[Strategy], ...] = (
    FusedStrategy,
    FusedDDPStrategy,
    FSDP2Strategy,
    LayerwiseStrategy,
    LayerwiseDDPStrategy,
    LayerwiseFSDP2Strategy,
)

_FLAGS: tuple[tuple[str, type[Strategy], dict[str, Any]], ...] = (
    ("fused", FusedStrategy, {}),
    ("fused_ddp", FusedDDPStrategy, {"start_method": "popen"}),
    ("fused_ddp_spawn", FusedDDPStrategy, {"start_method": "spawn"}),
    ("fused_ddp_fork", FusedDDPStrategy, {"start_method": "fork"}),
    ("fused_ddp_notebook", FusedDDPStrategy, {"start_method": "fork"}),
    ("fsdp2", FSDP2Strategy, {}),
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
    """Registers the flags for ``Trainer(strategy=...)``; one that is already taken keeps its meaning."""
    for flag, strategy, arguments in _FLAGS:
        packages.enter(StrategyRegistry, "strategy", flag, strategy, **arguments)
    packages.when_imported(_register_with_the_other)


def _register_with_the_other() -> None:
    """The same for the Trainer of ``pytorch_lightning``."""
    theirs = importlib.import_module(f"{packages.OTHER}.strategies")
    for ours in MOVABLE:
        theirs.Strategy.register(ours)
    for flag, strategy, arguments in _FLAGS:
        try:
            same = packages.derived(strategy) if strategy in MOVABLE else None
        except LookupError:
            same = None
        registered = same or packages.refused("strategy", flag, strategy)
        packages.enter(theirs.StrategyRegistry, "strategy", flag, registered, **arguments)
