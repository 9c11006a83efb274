"""Lightning accelerators, one per file; their public names are in :mod:`lightning_optim`."""

from __future__ import annotations

import importlib
from typing import Any

from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry

from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer.accelerators._npu import NPUAccelerator
from lightning_optim.trainer.accelerators._pjrt import PJRTAccelerator

__all__ = ["NPUAccelerator", "PJRTAccelerator", "register"]

_ACCELERATORS: tuple[type[Accelerator], ...] = (NPUAccelerator, PJRTAccelerator)


def register() -> None:
    """Makes ``Trainer(accelerator=...)`` know them by name; a name that somebody else has taken stays theirs."""
    for accelerator in _ACCELERATORS:
        _enter(AcceleratorRegistry, accelerator.name(), accelerator)
    packages.when_imported(_register_with_the_other)


def _register_with_the_other() -> None:
    theirs = importlib.import_module(f"{packages.OTHER}.accelerators")
    for accelerator in _ACCELERATORS:
        flag = accelerator.name()
        _enter(theirs.AcceleratorRegistry, flag, packages.refused("accelerator", flag, accelerator))


def _enter(registry: Any, flag: str, accelerator: type) -> None:
    if packages.is_free(registry, "accelerator", flag, accelerator):
        description = (accelerator.__doc__ or "").partition("\n")[0]
        registry.register(flag, accelerator, description, override=True)
