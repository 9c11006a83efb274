"""``lightning-optim doctor``: what is installed here, what is wrong with it, what cannot run because of that."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from lightning_optim import __version__
from lightning_optim.build import rules
from lightning_optim.command import _machine as machine
from lightning_optim.command import _output as output
from lightning_optim.command._machine import Device, Package, Plugin
from lightning_optim.command._output import CommandError
from lightning_optim.table import ROWS, OptimizerSpec, Requirement


@dataclass(frozen=True)
class PackageUse(Package):
    """An optional package and the identifiers that need it."""

    identifiers: tuple[str, ...]


@dataclass(frozen=True)
class Compiler:
    """The C++ compiler that some identifiers need on a CPU.

    Attributes:
        path: The one found, or ``None``.
        looked_for: The command that torch.compile takes.
        identifiers: The identifiers that compile their step.
    """

    path: str | None
    looked_for: str
    identifiers: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What ``doctor`` shows.

    Attributes:
        ok: Whether every identifier for the devices here can run and every plugin loads.
        versions: Versions of what is always needed.
        devices: The devices torch finds.
        packages: The optional packages.
        compiler: The C++ compiler.
        plugins: Entry points that add identifiers.
        plugin_problem: Why a plugin cannot be loaded, or ``None``.
        unavailable: Why not, by identifier that is for a device found here and cannot run.
        elsewhere: The same for identifiers that are for other devices only.
        count: Number of identifiers.
        notes: What to know of packages that are installed beside ours.
    """

    ok: bool
    versions: Mapping[str, str]
    devices: tuple[Device, ...]
    packages: tuple[PackageUse, ...]
    compiler: Compiler
    plugins: tuple[Plugin, ...]
    plugin_problem: str | None
    unavailable: Mapping[str, tuple[str, ...]]
    elsewhere: Mapping[str, tuple[str, ...]]
    count: int
    notes: tuple[str, ...]


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the subcommand ``doctor``."""
    parser = subparsers.add_parser(
        "doctor",
        help="versions, devices and packages here, and what to install",
        description="Shows versions, devices and packages here. Exits with 1 if an identifier for these devices cannot "
        "run.",
    )
    output.add_json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs ``doctor``."""
    diagnosis = collect()
    output.show(diagnosis, render, arguments.json)
    return 0 if diagnosis.ok else 1


def collect() -> Diagnosis:
    """Looks at this machine."""
    plugin_problem = None
    try:
        specs = machine.identifiers()
    except CommandError as error:
        # What we bring along can be examined whatever a plugin does.
        plugin_problem = str(error)
        specs = {name: row for row in ROWS for name in (row.name, *row.aliases)}
    failing = {name: problems for name, spec in specs.items() if (problems := machine.problems(spec))}
    present = machine.device_types()
    elsewhere = {name: failing[name] for name in failing if not present & (specs[name].devices or present)}
    unavailable = {name: failing[name] for name in failing if name not in elsewhere}
    return Diagnosis(
        ok=not unavailable and plugin_problem is None,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": importlib.metadata.version("lightning"),
            "lightning_optim": __version__,
        },
        devices=tuple(machine.devices()),
        packages=_packages(specs),
        compiler=Compiler(
            path=machine.compiler(),
            looked_for=rules.cpp_compiler(),
            identifiers=tuple(name for name, spec in specs.items() if spec.compiles),
        ),
        plugins=tuple(machine.plugins()),
        plugin_problem=plugin_problem,
        unavailable=unavailable,
        elsewhere=elsewhere,
        count=len(specs),
        notes=_notes(),
    )


def _packages(specs: Mapping[str, OptimizerSpec]) -> tuple[PackageUse, ...]:
    users: dict[Requirement, list[str]] = {}
    for name, spec in specs.items():
        for requirement in spec.requirements:
            users.setdefault(requirement, []).append(name)
    return tuple(
        PackageUse(**vars(Package.of(requirement)), identifiers=tuple(names)) for requirement, names in users.items()
    )


def _notes() -> tuple[str, ...]:
    texts = {
        # lightning itself depends on it, so that it is no problem to be installed, only to be mixed.
        "pytorch-lightning": "pytorch_lightning {} is installed, too. It and lightning do not know each other's "
        "classes: module, Trainer and callbacks have to come from the same of them. OptimMixin, OptimCallback and the "
        "strategies work with both; OptimCLI and the accelerators npu and pjrt with lightning.pytorch (`import "
        "lightning as L`).",
        "bitsandbytes": "bitsandbytes {} says on some CPUs, when it is imported, that it failed to load "
        "gemm_4bit_forward. That is harmless: the kernel is for 4-bit layers, and no optimizer uses it.",
    }
    notes = []
    for distribution, text in texts.items():
        with suppress(importlib.metadata.PackageNotFoundError):
            notes.append(text.format(importlib.metadata.version(distribution)))
    return tuple(notes)


def render(diagnosis: Diagnosis) -> str:
    """Returns the diagnosis, section by section, the verdict last."""
    sections = [
        ["Versions", *output.properties(list(diagnosis.versions.items()), "  ")],
        ["Devices", *output.columns([_device(device) for device in diagnosis.devices], "  ")],
        ["Packages", *(line for package in diagnosis.packages for line in _package(package, diagnosis.elsewhere))],
        ["C++ compiler", *_compiler(diagnosis.compiler)],
        ["Plugins", *_plugins(diagnosis)],
        *([["Notes", *_wrapped(diagnosis.notes)]] if diagnosis.notes else []),
        _verdict(diagnosis),
    ]
    return "\n\n".join("\n".join(section) for section in sections)


def _device(device: Device) -> tuple[str, str]:
    return device.type if device.index is None else f"{device.type}:{device.index}", device.name


def _package(package: PackageUse, elsewhere: Mapping[str, tuple[str, ...]]) -> list[str]:
    if package.ok:
        text = f"{package.distribution} {package.installed}: ok ({package.versions or 'any version'} is needed)"
    elif set(package.identifiers) <= set(elsewhere):
        text = f"for other devices only: {package.problem}"
    else:
        text = f"problem: {package.problem}"
    lines = output.wrap(text, "  ", "  ")
    return [*lines, *output.wrap(f"for {', '.join(package.identifiers)}", "    ")]


def _compiler(compiler: Compiler) -> list[str]:
    found = compiler.path or f"none (looked for {compiler.looked_for}): apt-get install g++, or set CXX"
    users = f"on a CPU, for {', '.join(compiler.identifiers)}"
    return [*output.wrap(found, "  "), *output.wrap(users, "    ")]


def _plugins(diagnosis: Diagnosis) -> list[str]:
    rows = [(plugin.name, plugin.value, plugin.distribution or "-") for plugin in diagnosis.plugins]
    lines = output.columns(rows, "  ") if rows else ["  none"]
    return lines + (output.wrap(diagnosis.plugin_problem, "  ") if diagnosis.plugin_problem else [])


def _wrapped(texts: tuple[str, ...]) -> list[str]:
    return [line for text in texts for line in output.wrap(text, "  ")]


def _verdict(diagnosis: Diagnosis) -> list[str]:
    lines = []
    if diagnosis.elsewhere:
        count = f"{len(diagnosis.elsewhere)} of {diagnosis.count}"
        lines = output.wrap(f"{count} identifiers are for other devices: {', '.join(diagnosis.elsewhere)}.")
    if not diagnosis.unavailable:
        which = "others" if diagnosis.elsewhere else "identifiers"
        return [*lines, f"All {diagnosis.count - len(diagnosis.elsewhere)} {which} can run here."]
    lines.append(f"{len(diagnosis.unavailable)} of {diagnosis.count} identifiers cannot run here:")
    by_reason: dict[tuple[str, ...], list[str]] = {}
    for name, problems in diagnosis.unavailable.items():
        by_reason.setdefault(problems, []).append(name)
    for problems, names in by_reason.items():
        lines += output.wrap(", ".join(names), "  ")
        lines += [line for problem in problems for line in output.wrap(problem, "    ")]
    return lines
