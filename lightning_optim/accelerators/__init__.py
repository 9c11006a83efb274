"""Lightning accelerators, one per file; their public names are in :mod:`lightning_optim`."""

from __future__ import annotations

from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry

from lightning_optim.accelerators.npu import NPUAccelerator
from lightning_optim.accelerators.pjrt import PJRTAccelerator
from lightning_optim.packages import is_free

__all__ = ["NPUAccelerator", "PJRTAccelerator", "register"]

_ACCELERATORS: tuple[type[Accelerator], ...] = (NPUAccelerator, PJRTAccelerator)


def register() -> None:
    """Makes ``Trainer(accelerator=...)`` know them by name; a name that somebody else has taken stays theirs."""
    for accelerator in _ACCELERATORS:
        if is_free(AcceleratorRegistry, "accelerator", accelerator.name(), accelerator):
            description = (accelerator.__doc__ or "").splitlines()[0]
            AcceleratorRegistry.register(accelerator.name(), accelerator, description, override=True)
