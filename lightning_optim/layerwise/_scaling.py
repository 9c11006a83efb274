"""Loss scaling around optimizers that were stepped during backward."""

from __future__ import annotations

from typing import Any

from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_optim.layerwise._engine import Layerwise


class OuterScaler:
    """A ``GradScaler`` that leaves alone what was unscaled and stepped during backward, bucket by bucket.

    The scaler has seen every bucket as a separate optimizer: its ``update()`` lowers the scale if one of them
    overflowed. Only the outer optimizer, whose gradients are gone, must not reach it.

    Args:
        scaler: The scaler that does the work; all other attributes are forwarded to it.
    """

    def __init__(self, scaler: GradScaler) -> None:
        self.inner = scaler

    def unscale_(self, optimizer: Optimizer) -> None:
        """Unscales the live gradients; see ``GradScaler.unscale_``."""
        if not _stepped(optimizer):
            self.inner.unscale_(optimizer)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Steps unless a gradient overflowed; see ``GradScaler.step``."""
        if _stepped(optimizer):
            return optimizer.step(*args, **kwargs)
        return self.inner.step(optimizer, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet, as in unpickling
            raise AttributeError(name)
        return getattr(self.inner, name)


def _stepped(optimizer: Optimizer) -> bool:
    layerwise = Layerwise.of(optimizer)
    return layerwise is not None and layerwise.stepped
