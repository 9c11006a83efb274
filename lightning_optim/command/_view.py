"""What is shown of a row: plain facts, and sentences about how it groups, steps and stores parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING

from lightning_optim.build import parameter_bytes
from lightning_optim.command import _machine as machine
from lightning_optim.command._example import example
from lightning_optim.command._machine import Facts
from lightning_optim.errors import InvalidOption
from lightning_optim.groups import override_keys
from lightning_optim.table import (
    STRATEGIES,
    SUFFIX,
    Buffer,
    OptimizerSpec,
    Options,
    Support,
    describe,
    parse,
    strategies,
)

# The parameter whose state is counted: large enough to be quantized, in the most common dtype.
_SHAPE = (1024, 1024)
_ELEMENT_SIZE = 4
_PARAMETER = "1024x1024 float32"

_WARMUP = {
    "schedule": "warmup_steps is the work of an lr_scheduler ('linear', 'cosine', 'constant_with_warmup', ...); "
    "without one it is refused.",
    "optimizer": "warmup_steps goes to the optimizer, which warms up itself.",
    "none": "It needs no warm-up: warmup_steps is refused.",
}


def view(name: str, spec: OptimizerSpec, declared: bool = True) -> Facts:
    """Returns what is shown of a row under one of its names, as ``info --json`` prints it.

    Keys with the name of a row's field have its meaning; ``None`` means empty or unknown.

    Args:
        name: The row's name or an alias.
        spec: The row.
        declared: False if the row was made for a dotted path, so that what it cannot step is unknown.
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
        "cannot_step": _cannot_step(spec) if declared else None,
        "strategies": {key: _strategy(support, declared) for key, support in strategies(spec).items()},
        "lr": spec.default_lr,
        "weight_decay": spec.default_weight_decay if spec.decays else None,
        "options": options(spec.options),
        "grouping": {
            "policy": tuple(_policy(spec)),
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
            "required": info.default is MISSING,
            "default": None if info.default is MISSING else info.default,
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
    except InvalidOption:  # An option is required.
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
                "storage": _storage(buffer, spec),
                "copies": buffer.copies,
                "by_default": defaults is not None and buffer.exists(defaults, _ELEMENT_SIZE),
            }
            for buffer in spec.state.buffers
        ],
        "quantization": tuple(_quantization(spec)),
    }


def _cannot_step(spec: OptimizerSpec) -> tuple[str, ...]:
    """Returns the kinds of gradients and parameters that ``spec`` cannot step."""
    able = {
        "sparse gradients": spec.sparse,
        "complex parameters": spec.complex,
        "sharded parameters (FSDP2)": spec.sharded,
        "float16 parameters": spec.half_weights,
        "parameters on XLA devices": spec.runs_on({"xla"}),
    }
    return tuple(kind for kind, steps in able.items() if not steps)


def _strategy(support: Support, declared: bool) -> Facts:
    """Describes whether a strategy trains it; ``None`` where only its first step shows."""
    return {"trains": support.trains if declared or not support.trains else None, "why": support.why or None}


def strategy_lines(report: Facts) -> Iterator[tuple[str, str]]:
    """Yields in which strategies what is described trains, and for each reason where it is refused."""
    by_answer: dict[tuple[bool | None, str | None], list[str]] = {}
    for key, answer in report["strategies"].items():
        by_answer.setdefault((answer["trains"], answer["why"]), []).append(STRATEGIES[key].name)
    for (trains, why), names in by_answer.items():
        if trains is not None:
            reason = "" if why is None else f" {why}" if trains else f": {why}"
            yield "trains by" if trains else "refused by", ", ".join(names) + reason


def _policy(spec: OptimizerSpec) -> Iterator[str]:
    """Describes what stands in for ``spec``, and how it groups parameters, warms up and is stepped."""
    if spec.choices:
        yield f"It builds the first of these that can run on the parameters' device: {', '.join(spec.choices)}."
    if spec.fallbacks:
        which = f"the first of {', '.join(spec.fallbacks)} that can" if len(spec.fallbacks) > 1 else spec.fallbacks[0]
        yield f"Where it cannot run, optim_fallback=True takes {which}."

    if spec.decays:
        yield (
            "weight_decay reaches the group 'decay'. Biases, parameters of norm layers and others with fewer than two "
            "dimensions form the group 'no_decay', with weight_decay 0."
        )
    else:
        yield "It takes no weight_decay: all parameters form one group."
    if spec.bits is not None:
        by_option = any(info.name == "quantize_embeddings" for info in describe(spec.options))
        change = f"optim_args={{'quantize_embeddings': True}} stores them in {spec.bits} bits, too; "
        yield (
            "The states of embeddings (nn.Embedding, nn.EmbeddingBag) stay in 32 bits, in groups named '.../32bit'. "
            f"{change if by_option else ''}"
            "param_groups={PATTERN: {'optim_bits': 32}} keeps those of other parameters in 32 bits."
        )
    yield (
        f"param_groups={{PATTERN: {{NAME: VALUE}}}} may set {', '.join(override_keys(spec))}. PATTERN is a regular "
        "expression over whole parameter names; the first that matches wins."
    )

    yield _WARMUP[spec.warmup]
    if spec.averages_weights:
        yield "It averages its iterates instead of following a schedule: an lr_scheduler is refused."
        yield (
            "It is in train mode exactly while training; validation, test, prediction and checkpoints see the averaged "
            "weights. Under a Trainer that is taken care of; in a loop of your own call optimizer.train() and "
            "optimizer.eval()."
        )
    if spec.layerwise:
        yield (
            "Buckets of parameters are stepped during backward, and their gradients are freed at once. On several "
            "devices it needs Trainer(strategy='layerwise_ddp') or 'layerwise_fsdp2'."
        )
    elif spec.coupled:
        yield f"It cannot be stepped during backward: {spec.coupled}."
    else:
        yield f"optim='{spec.name}{SUFFIX}' steps it during backward and frees each gradient at once."


def _storage(buffer: Buffer, spec: OptimizerSpec) -> str:
    """Describes in which bits or dtype ``buffer`` is stored, and in how many copies."""
    dtype = "float32" if buffer.float32 else "the parameter's dtype"
    if callable(buffer.float32):
        dtype += " by default"
    copies = f"{buffer.copies} tensors, " if buffer.copies > 1 else ""
    quantized = spec.bits is not None and buffer.quantized
    return copies + (f"{spec.bits} bits ({dtype} where not quantized)" if quantized else dtype)


def _quantization(spec: OptimizerSpec) -> Iterator[str]:
    """Describes which part of the state is quantized and which is not."""
    quantization = spec.state.quantization if spec.state else None
    if quantization is None:
        return
    block, smallest = (_number(value, spec) for value in (quantization.block_size, quantization.min_size))
    yield f"Quantized in blocks of {block} elements, which share a float32 scale."
    whole = ", or whose size is not a multiple of the block" if quantization.whole_blocks else ""
    yield f"Not quantized: parameters with fewer elements than {smallest}{whole}; embeddings, see above."


def _number(value: int | str, spec: OptimizerSpec) -> str:
    if isinstance(value, int):
        return str(value)
    default = next(info.default for info in describe(spec.options) if info.name == value)
    return f"{value} (an option)" if default is MISSING else f"{value} ({default} by default)"
