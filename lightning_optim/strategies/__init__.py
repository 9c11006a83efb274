"""Lightning strategies, one per file; their public names are in :mod:`lightning_optim`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import Strategy, StrategyRegistry

from lightning_optim.strategies.layerwise import LayerwiseStrategy
from lightning_optim.strategies.layerwise_ddp import LayerwiseDDPStrategy
from lightning_optim.strategies.layerwise_fsdp2 import LayerwiseFSDP2Strategy

__all__ = ["LayerwiseDDPStrategy", "LayerwiseFSDP2Strategy", "LayerwiseStrategy", "register"]

_FLAGS: tuple[tuple[str, type[Strategy], dict[str, Any]], ...] = (
    ("layerwise", LayerwiseStrategy, {}),
    ("layerwise_ddp", LayerwiseDDPStrategy, {"start_method": "popen"}),
    ("layerwise_ddp_spawn", LayerwiseDDPStrategy, {"start_method": "spawn"}),
    ("layerwise_ddp_fork", LayerwiseDDPStrategy, {"start_method": "fork"}),
    ("layerwise_ddp_notebook", LayerwiseDDPStrategy, {"start_method": "fork"}),
    ("layerwise_fsdp2", LayerwiseFSDP2Strategy, {}),
)


def register() -> None:
    """Makes ``Trainer(strategy=...)`` know the flags; safe to call twice."""
    for flag, strategy, arguments in _FLAGS:
        StrategyRegistry.register(flag, strategy, (strategy.__doc__ or "").splitlines()[0], override=True, **arguments)
