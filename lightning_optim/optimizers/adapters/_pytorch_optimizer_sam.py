"""SAM and bSAM of pytorch_optimizer by torch's protocol.

They want gradients before ``step(closure)``. Torch's protocol, which Lightning follows, has them computed inside: SAM
would take those of the last batch in silence, bSAM fails.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_optimizer
import torch
from torch.optim import Optimizer

from lightning_optim.errors import InvalidOption


class BSAM(pytorch_optimizer.BSAM):
    """``pytorch_optimizer.BSAM`` whose first step finds out by itself which parameters have gradients."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps all parameters; the closure is called twice, in the first step three times."""
        if closure is not None and not any(p.grad is not None for group in self.param_groups for p in group["params"]):
            with torch.enable_grad():
                closure()
        return super().step(closure)


class SAM(pytorch_optimizer.SAM):
    """``pytorch_optimizer.SAM`` by torch's protocol: ``step(closure)`` alone is a step, and calls the closure twice.

    Args:
        params: Parameters or param groups.
        lr: The base optimizer's learning rate.
        base_optimizer: Its class, or the dotted path of its class.
        base_args: Its other arguments.
        weight_decay: Its weight decay.
        **options: Those of ``pytorch_optimizer.SAM``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        base_optimizer: Any = "torch.optim.SGD",
        base_args: Mapping[str, Any] | None = None,
        weight_decay: float = 0.0,
        rho: float = 0.05,
        adaptive: bool = False,
        use_gc: bool = False,
        perturb_eps: float = 1e-12,
    ) -> None:
        try:
            base = pkgutil.resolve_name(base_optimizer) if isinstance(base_optimizer, str) else base_optimizer
        except (ImportError, AttributeError, ValueError):
            base = None
        if not (isinstance(base, type) and issubclass(base, Optimizer)):
            raise InvalidOption(
                f"base_optimizer={base_optimizer!r} is neither an optimizer class nor the dotted path of one, such as "
                "'torch.optim.SGD'",
                code="LO203",
            )
        own: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, **(base_args or {})}
        own = {key: value for key, value in own.items() if value or key in inspect.signature(base).parameters}
        super().__init__(params, base, rho=rho, adaptive=adaptive, use_gc=use_gc, perturb_eps=perturb_eps, **own)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step; returns the loss at the weights that it begins with."""
        if closure is None:
            return super().step(None)
        with torch.enable_grad():
            loss = closure()
        super().step(closure)
        return loss
