"""What is shown of a row, as plain facts."""

from __future__ import annotations

import dataclasses
import math

from lightning_optim.build import parameter_bytes
from lightning_optim.command import _machine as machine
from lightning_optim.command import _words as words
from lightning_optim.command._example import example
from lightning_optim.command._machine import Facts
from lightning_optim.errors import InvalidOption
from lightning_optim.groups import override_keys
from lightning_optim.table import OptimizerSpec, Options, describe, parse

# The parameter whose state is counted: large enough to be quantized, of the commonest dtype.
_SHAPE = (1024, 1024)
_ELEMENT_SIZE = 4
_PARAMETER = "1024x1024 float32"


def view(name: str, spec: OptimizerSpec, declared: bool = True) -> Facts:
    """Returns what is shown of a row under one of its names, as ``info --json`` prints it.

    What has the name of a row's field means the same; ``None`` stands for what the row leaves empty or nobody knows.

    Args:
        name: The row's name or an alias.
        spec: The row.
        declared: False if it was made for a dotted path, so that nothing is known of what it cannot step.
    """
    problems = machine.problems(spec)
    return {
        "identifier": name,
        "alias_of": None if name == spec.name else spec.name,
        "aliases": spec.aliases,
        "summary": spec.summary,
        "implementation": spec.implementation,
        "target": spec.target.replace(":", "."),
        "fixed": spec.fixed,
        "source": spec.source,
        "packages": tuple(map(machine.package, spec.requirements)),
        "extra": spec.extra or None,
        "available": not problems,
        "problems": problems,
        "devices": None if spec.devices is None else tuple(sorted(spec.devices)),
        "cannot_step": words.cannot_step(spec) if declared else None,
        "lr": spec.default_lr,
        "weight_decay": spec.default_weight_decay if spec.decays else None,
        "options": options(spec.options),
        "grouping": {
            "policy": tuple(words.policy(spec)),
            "param_groups_keys": override_keys(spec),
            "embeddings_in_32_bits": spec.bits is not None,
            "warmup": spec.warmup,
            "averages_weights": spec.averages_weights,
        },
        "state": _state(spec),
        "note": spec.note or None,
        "example": example(name, spec),
    }


def options(declared: type[Options]) -> tuple[Facts, ...]:
    """Describes the options of a row or a schedule."""
    return tuple(
        {
            "name": info.name,
            "type": info.type,
            "required": info.default is dataclasses.MISSING,
            "default": None if info.default is dataclasses.MISSING else info.default,
            "range": info.range or None,
            "help": info.help,
            "scope": info.scope,
            "per_group": info.scope == "group",
        }
        for info in describe(declared)
    )


def _state(spec: OptimizerSpec) -> Facts | None:
    if spec.state is None:
        return None
    try:
        defaults = parse(spec.options, None, spec.name)
    except InvalidOption:  # An option must be given.
        defaults = None
    size = None if defaults is None else parameter_bytes(spec, defaults, _SHAPE, _ELEMENT_SIZE)
    return {
        "parameter": _PARAMETER,
        "bytes": size,
        "bytes_per_element": None if size is None else size / math.prod(_SHAPE),
        "bits": spec.bits,
        "buffers": [
            {
                "name": buffer.name,
                "storage": words.storage(buffer, spec),
                "copies": buffer.copies,
                "by_default": defaults is not None and buffer.exists(defaults, _ELEMENT_SIZE),
            }
            for buffer in spec.state.buffers
        ],
        "quantization": tuple(words.quantization(spec)),
    }
