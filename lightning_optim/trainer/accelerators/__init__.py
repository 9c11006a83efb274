"""Lightning accelerators, one per file; their public names are in :mod:`lightning_optim`."""

from __future__ import annotations

import importlib

from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry

from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer.accelerators._npu import NPUAccelerator
from lightning_optim.trainer.accelerators._pjrt import PJRTAccelerator

__all__ = ["NPUAccelerator", "PJRTAccelerator", "register"]

_ACCELERATORS: tuple[type[Accelerator], ...] = (NPUAccelerator, PJRTAccelerator)


def register() -> None:
    """Registers the names for ``Trainer(accelerator=...)``; one that is already taken keeps its meaning."""
    for accelerator in _ACCELERATORS:
        packages.enter(AcceleratorRegistry, "accelerator", accelerator.name(), accelerator)
    packages.when_imported(_register_with_the_other)


def _register_with_the_other() -> None:
    theirs = importlib.import_module(f"{packages.OTHER}.accelerators")
    for accelerator in _ACCELERATORS:
        flag = accelerator.name()
        refused = packages.refused("accelerator", flag, accelerator)
        packages.enter(theirs.AcceleratorRegistry, "accelerator", flag, refused)
