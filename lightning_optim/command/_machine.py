"""What this machine has, and hence which identifiers can run on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_optim.build import rules
from lightning_optim.files import cannot_write, written_whole
from lightning_optim.table import ENTRY_POINT_GROUP, REGISTRY, XLA, OptimizerSpec, Requirement, availability

#: Facts about something, as ``--json`` shows them.
Facts = dict[str, Any]


class CommandError(Exception):
    """Ends the command with a text on stderr and a nonzero exit status."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def write_file(path: Path, write: Callable[[Path], object], new: bool = False) -> None:
    """Has a file written, whole or not at all.

    Args:
        path: The file.
        write: Writes it to the path that it is given.
        new: Whether to refuse to replace a file.

    Raises:
        CommandError: If it cannot be written.
    """
    try:
        with written_whole(path, new) as beside:
            write(beside)
    except OSError as error:
        raise CommandError(cannot_write(path, error)) from error


@contextmanager
def folder_is_searched() -> Iterator[None]:
    """Has modules in the current folder found, as ``python -m`` does."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def identifiers() -> dict[str, OptimizerSpec]:
    """Returns every identifier and its row, without the suffixed forms; raises CommandError for a broken plugin."""
    try:
        return dict(REGISTRY.plain)
    except RuntimeError as error:
        raise CommandError(str(error), status=1) from error


def package(requirement: Requirement) -> Facts:
    """Returns which version of an optional package is installed, and whether it can be used."""
    problem = requirement.problem()
    return {
        "distribution": requirement.distribution,
        "module": requirement.module,
        "versions": requirement.versions,
        "installed": requirement.installed_version(),
        "ok": problem is None,
        "problem": problem,
        "install": requirement.install_command,
    }


def device_types() -> frozenset[str]:
    """Returns the device types found here, without initializing any device."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = {"cpu", accelerator.type} if accelerator else {"cpu"}
    # torch.accelerator does not know XLA, and asking torch_xla would initialize it.
    return frozenset(found | {"xla"} if availability.check(XLA) else found)


def devices() -> list[Facts]:
    """Returns the devices found here, with their names."""
    found: list[tuple[str, int | None, str]] = [("cpu", None, platform.processor() or platform.machine())]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        # MPS has no device names.
        name_of = getattr(torch.get_device_module(accelerator), "get_device_name", lambda index: "")
        found += [(accelerator.type, index, name_of(index)) for index in range(torch.accelerator.device_count())]
    if "xla" in device_types():
        chosen = os.environ.get("PJRT_DEVICE", "not set")
        found.append(("xla", None, f"what torch_xla finds (PJRT_DEVICE: {chosen})"))
    return [{"type": kind, "index": index, "name": name} for kind, index, name in found]


def compiler() -> str | None:
    """Returns the path of the C++ compiler that torch.compile uses on a CPU, or ``None`` if it is not installed."""
    return shutil.which(rules.cpp_compiler())


def problems(spec: OptimizerSpec) -> tuple[str, ...]:
    """Returns every reason why ``spec`` cannot run here, each with its remedy; empty if it can."""
    found = list(spec.availability().reasons)
    present = device_types()
    usable = present if spec.devices is None else present & spec.devices
    brought = {requirement.device for requirement in spec.requirements if requirement.problem()}
    if not usable and spec.devices is not None and spec.devices <= brought:
        # The missing package provides the device.
        return tuple(found)
    if not usable:
        found.append(
            f"runs on {', '.join(sorted(spec.devices or ()))}, and torch finds only {', '.join(sorted(present))} here: "
            "use another identifier, or a machine with such a device and a torch built for it"
        )
    elif spec.compiles and usable == {"cpu"} and compiler() is None:
        found.append(
            f"compiles its step, which on a CPU needs a C++ compiler, and {rules.cpp_compiler()!r} is not on "
            "the PATH: install it (apt-get install g++) or set CXX"
        )
    return tuple(found)


def plugins() -> list[Facts]:
    """Returns the entry points that add identifiers, without loading them."""
    return [
        {"name": point.name, "value": point.value, "distribution": point.dist.name if point.dist else None}
        for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    ]
