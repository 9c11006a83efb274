"""What this machine has, and so which identifiers can run on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass

import torch

from lightning_optim.build import rules
from lightning_optim.command._output import CommandError
from lightning_optim.table import ENTRY_POINT_GROUP, REGISTRY, XLA, OptimizerSpec, Requirement, availability


@dataclass(frozen=True)
class Package:
    """An optional package and whether it can be used here.

    Attributes:
        distribution: Name on PyPI.
        module: Name that ``import`` takes.
        versions: PEP 440 specifier of the versions needed.
        installed: The version found, or ``None``.
        ok: Whether it can be used.
        problem: Why it cannot, and the command that helps; ``None`` if it can.
        install: The command that installs it.
    """

    distribution: str
    module: str
    versions: str
    installed: str | None
    ok: bool
    problem: str | None
    install: str

    @classmethod
    def of(cls, requirement: Requirement) -> Package:
        """Looks up what is installed."""
        problem = requirement.problem()
        return cls(
            distribution=requirement.distribution,
            module=requirement.module,
            versions=requirement.versions,
            installed=requirement.installed_version(),
            ok=problem is None,
            problem=problem,
            install=requirement.install_command,
        )


@dataclass(frozen=True)
class Device:
    """A device that torch can compute on."""

    type: str
    index: int | None
    name: str


@dataclass(frozen=True)
class Plugin:
    """An entry point that adds identifiers."""

    name: str
    value: str
    distribution: str | None


def identifiers() -> dict[str, OptimizerSpec]:
    """Returns every identifier and its row, without the forms derived by a suffix.

    Raises:
        CommandError: If a plugin cannot be loaded.
    """
    try:
        return dict(REGISTRY.plain)
    except RuntimeError as error:
        raise CommandError(str(error), status=1) from error


def device_types() -> frozenset[str]:
    """Returns the types of device found here, without starting any of them."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = {"cpu", accelerator.type} if accelerator else {"cpu"}
    # torch.accelerator does not know XLA, and to ask torch_xla would start it.
    return frozenset(found | {"xla"} if availability.check(XLA) else found)


def devices() -> list[Device]:
    """Returns the devices found here, with their names."""
    found = [Device("cpu", None, platform.processor() or platform.machine())]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        # MPS knows no names.
        name_of = getattr(torch.get_device_module(accelerator), "get_device_name", lambda index: "")
        found += [Device(accelerator.type, index, name_of(index)) for index in range(torch.accelerator.device_count())]
    if "xla" in device_types():
        chosen = os.environ.get("PJRT_DEVICE", "not set")
        found.append(Device("xla", None, f"what torch_xla finds (PJRT_DEVICE: {chosen})"))
    return found


def compiler() -> str | None:
    """Returns the path of the C++ compiler that torch.compile takes on a CPU, or ``None`` if it is not installed."""
    return shutil.which(rules.cpp_compiler())


def problems(spec: OptimizerSpec) -> tuple[str, ...]:
    """Returns every reason why ``spec`` cannot run here, each with its remedy; none if it can."""
    found = list(spec.availability().reasons)
    present = device_types()
    usable = present if spec.devices is None else present & spec.devices
    brought = {requirement.device for requirement in spec.requirements if requirement.problem()}
    if not usable and spec.devices is not None and spec.devices <= brought:
        # The package that is missing brings the device.
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


def plugins() -> list[Plugin]:
    """Returns the entry points that add identifiers, without loading them."""
    return [
        Plugin(point.name, point.value, point.dist.name if point.dist else None)
        for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    ]
