"""``lightning-optim doctor``: what is installed here, what is wrong with it, and what therefore cannot run."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress

import torch

from lightning_optim import __version__
from lightning_optim.build import rules
from lightning_optim.command import _machine as machine
from lightning_optim.command import _render as render
from lightning_optim.command._machine import CommandError, Facts
from lightning_optim.table import ROWS, OptimizerSpec, Requirement

#: By device type, on what this release has run; a test holds docs/hardware.md to it.
VERIFIED: Mapping[str, str | None] = {
    "cpu": "x86-64",
    "xla": "PJRT on a CPU, not on a TPU",
    "cuda": None,
    "npu": None,
    "mps": None,
    "xpu": None,
}

# What to know about other installed packages.
_NOTES = {
    # lightning itself depends on it: having both is fine, mixing them is not.
    "pytorch-lightning": "pytorch_lightning {} is installed, too. It and lightning do not know each other's "
    "classes: module, Trainer and callbacks have to come from the same of them. OptimMixin, OptimCallback and the "
    "strategies work with both; OptimCLI and the accelerators npu and pjrt with lightning.pytorch (`import "
    "lightning as L`).",
    "bitsandbytes": "bitsandbytes {} says on some CPUs, when it is imported, that it failed to load "
    "gemm_4bit_forward. That is harmless: the kernel is for 4-bit layers, and no optimizer uses it.",
}


def collect(arguments: argparse.Namespace) -> Facts:
    """Examines this machine.

    ``unavailable`` gives the reasons for each identifier that supports a device found here but cannot run,
    ``elsewhere`` those for identifiers that support other devices only.
    """
    plugin_problem = None
    try:
        specs = machine.identifiers()
    except CommandError as error:
        # Our own rows can be examined even if a plugin is broken.
        plugin_problem = str(error)
        specs = {name: row for row in ROWS for name in (row.name, *row.aliases)}
    failing = {name: problems for name, spec in specs.items() if (problems := machine.problems(spec))}
    present = machine.device_types()
    elsewhere = {name: failing[name] for name in failing if not present & (specs[name].devices or present)}
    unavailable = {name: failing[name] for name in failing if name not in elsewhere}
    return {
        "ok": not unavailable and plugin_problem is None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": importlib.metadata.version("lightning"),
            "lightning_optim": __version__,
        },
        "devices": [{**device, "verified": VERIFIED.get(device["type"])} for device in machine.devices()],
        "not_verified": [kind for kind, where in VERIFIED.items() if where is None],
        "packages": _packages(specs),
        "compiler": {
            "path": machine.compiler(),
            "looked_for": rules.cpp_compiler(),
            "identifiers": [name for name, spec in specs.items() if spec.compiles],
        },
        "plugins": machine.plugins(),
        "plugin_problem": plugin_problem,
        "unavailable": unavailable,
        "elsewhere": elsewhere,
        "count": len(specs),
        "notes": list(_notes()),
    }


def _packages(specs: Mapping[str, OptimizerSpec]) -> list[Facts]:
    users: dict[Requirement, list[str]] = {}
    for name, spec in specs.items():
        for requirement in spec.requirements:
            users.setdefault(requirement, []).append(name)
    return [machine.package(requirement) | {"identifiers": names} for requirement, names in users.items()]


def _notes() -> Iterator[str]:
    for distribution, text in _NOTES.items():
        with suppress(importlib.metadata.PackageNotFoundError):
            yield text.format(importlib.metadata.version(distribution))


def as_text(diagnosis: Facts) -> str:
    """Returns the diagnosis in sections, with the verdict last."""
    devices = [
        (
            device["type"] if device["index"] is None else f"{device['type']}:{device['index']}",
            device["name"],
            f"verified on {device['verified']}" if device["verified"] else "not verified",
        )
        for device in diagnosis["devices"]
    ]
    never = f"Not verified, since no test of this release ran there: {', '.join(diagnosis['not_verified'])}."
    plugins = [(plugin["name"], plugin["value"], plugin["distribution"] or "-") for plugin in diagnosis["plugins"]]
    notes = [line for note in diagnosis["notes"] for line in render.wrap(note, "  ")]
    return render.sections(
        ["Versions", *render.properties(list(diagnosis["versions"].items()))],
        ["Devices", *render.table(devices, "  "), *render.wrap(never, "  ")],
        ["Packages", *(line for one in diagnosis["packages"] for line in _package(one, diagnosis["elsewhere"]))],
        ["C++ compiler", *_compiler(**diagnosis["compiler"])],
        [
            "Plugins",
            *(render.table(plugins, "  ") or ["  none"]),
            *render.wrap(diagnosis["plugin_problem"] or "", "  "),
        ],
        *([["Notes", *notes]] if notes else []),
        list(_verdict(diagnosis)),
    )


def _package(package: Facts, elsewhere: Mapping[str, tuple[str, ...]]) -> list[str]:
    if package["ok"]:
        needed = package["versions"] or "any version"
        text = f"{package['distribution']} {package['installed']}: ok ({needed} is needed)"
    elif set(package["identifiers"]) <= set(elsewhere):
        text = f"for other devices only: {package['problem']}"
    else:
        text = f"problem: {package['problem']}"
    return [*render.wrap(text, "  ", "  "), *render.wrap(f"for {', '.join(package['identifiers'])}", "    ")]


def _compiler(path: str | None, looked_for: str, identifiers: list[str]) -> list[str]:
    found = path or f"none (looked for {looked_for}): apt-get install g++, or set CXX"
    return [*render.wrap(found, "  "), *render.wrap(f"on a CPU, for {', '.join(identifiers)}", "    ")]


def _verdict(diagnosis: Facts) -> Iterator[str]:
    count, elsewhere, unavailable = diagnosis["count"], diagnosis["elsewhere"], diagnosis["unavailable"]
    if elsewhere:
        names = ", ".join(elsewhere)
        yield from render.wrap(f"{len(elsewhere)} of {count} identifiers are for other devices: {names}.")
    if not unavailable:
        yield f"All {count - len(elsewhere)} {'others' if elsewhere else 'identifiers'} can run here."
        return
    yield f"{len(unavailable)} of {count} identifiers cannot run here:"
    by_reason: dict[tuple[str, ...], list[str]] = {}
    for name, problems in unavailable.items():
        by_reason.setdefault(problems, []).append(name)
    for problems, sharing in by_reason.items():
        yield from render.wrap(", ".join(sharing), "  ")
        for problem in problems:
            yield from render.wrap(problem, "    ")
