"""A row in words: how it groups parameters, what it stores, code to start from."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from typing import Any

from lightning_optim.build import parameter_bytes
from lightning_optim.errors import InvalidOption
from lightning_optim.groups import override_keys
from lightning_optim.table import SUFFIX, Buffer, OptimizerSpec, OptionInfo, Options, describe, parse

# The parameter whose state is counted: large enough to be quantized, of the commonest dtype.
_SHAPE = (1024, 1024)
_ELEMENT_SIZE = 4
_PARAMETER = "1024x1024 float32"
_ELEMENTS = math.prod(_SHAPE)

# For the example of a row that has no default.
_EXAMPLE_LR = 1e-3


@dataclass(frozen=True)
class Grouping:
    """How parameters are divided and stepped.

    Attributes:
        policy: Sentences: weight decay, embeddings, warm-up, modes.
        param_groups_keys: What a pattern of ``param_groups`` may set.
        embeddings_in_32_bits: Whether the states of embeddings stay in 32 bits by default.
        warmup: Who warms the learning rate up: ``"schedule"``, ``"optimizer"`` or ``"none"``.
        averages_weights: Whether evaluation and checkpoints use averaged weights.
    """

    policy: tuple[str, ...]
    param_groups_keys: tuple[str, ...]
    embeddings_in_32_bits: bool
    warmup: str
    averages_weights: bool


@dataclass(frozen=True)
class BufferEntry:
    """A tensor of the parameter's shape that is stored.

    Attributes:
        name: Key in the optimizer's state.
        storage: Bits or dtype of its elements, in words.
        copies: How many tensors of the parameter's shape it holds.
        by_default: Whether it exists when all options have their defaults.
    """

    name: str
    storage: str
    copies: int
    by_default: bool


@dataclass(frozen=True)
class State:
    """What is stored per parameter.

    Attributes:
        parameter: The parameter for which bytes are counted.
        bytes: Bytes of its state with default options; ``None`` if an option must be given.
        bytes_per_element: The same per element.
        bits: Bits per element of quantized states, or ``None``.
        buffers: The tensors of the parameter's shape.
        quantization: Sentences: what is quantized and what is not.
    """

    parameter: str
    bytes: int | None
    bytes_per_element: float | None
    bits: int | None
    buffers: tuple[BufferEntry, ...]
    quantization: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """Code that builds the optimizer with its defaults, in Python and for a shell."""

    python: str
    command_line: str


def cannot_step(spec: OptimizerSpec) -> tuple[str, ...]:
    """Returns the kinds of gradients and parameters that ``spec`` is refused for."""
    able = {
        "sparse gradients": spec.sparse,
        "complex parameters": spec.complex,
        "sharded parameters (FSDP2)": spec.sharded,
        "float16 parameters": spec.half_weights,
        "parameters on XLA devices": spec.runs_on({"xla"}),
    }
    return tuple(kind for kind, steps in able.items() if not steps)


def grouping(spec: OptimizerSpec) -> Grouping:
    """Describes how ``spec`` groups and steps parameters."""
    keys = override_keys(spec)
    return Grouping(
        policy=(
            *_stand_ins(spec),
            *_decay(spec),
            *_embeddings(spec),
            *_overrides(keys),
            *_warmup(spec),
            *_modes(spec),
            *_layerwise(spec),
        ),
        param_groups_keys=keys,
        embeddings_in_32_bits=spec.bits is not None,
        warmup=spec.warmup,
        averages_weights=spec.averages_weights,
    )


def _stand_ins(spec: OptimizerSpec) -> Iterator[str]:
    if spec.choices:
        yield f"It builds the first of these that can run on the parameters' device: {', '.join(spec.choices)}."
    if spec.fallbacks:
        which = f"the first of {', '.join(spec.fallbacks)} that can" if len(spec.fallbacks) > 1 else spec.fallbacks[0]
        yield f"Where it cannot run, optim_fallback=True takes {which}."


def _decay(spec: OptimizerSpec) -> Iterator[str]:
    if spec.decays:
        yield (
            "weight_decay reaches the group 'decay'. Biases, parameters of norm layers and others with fewer than two "
            "dimensions form the group 'no_decay', with weight_decay 0."
        )
    else:
        yield "It takes no weight_decay: all parameters form one group."


def _embeddings(spec: OptimizerSpec) -> Iterator[str]:
    if spec.bits is None:
        return
    by_option = any(info.name == "quantize_embeddings" for info in describe(spec.options))
    change = f"optim_args={{'quantize_embeddings': True}} stores them in {spec.bits} bits, too; " if by_option else ""
    yield (
        "The states of embeddings (nn.Embedding, nn.EmbeddingBag) stay in 32 bits, in groups named '.../32bit'. "
        f"{change}param_groups={{PATTERN: {{'optim_bits': 32}}}} keeps those of other parameters in 32 bits."
    )


def _overrides(keys: tuple[str, ...]) -> Iterator[str]:
    yield (
        f"param_groups={{PATTERN: {{NAME: VALUE}}}} may set {', '.join(keys)}. PATTERN is a regular expression over "
        "whole parameter names; the first that matches wins."
    )


def _warmup(spec: OptimizerSpec) -> Iterator[str]:
    match spec.warmup:
        case "schedule":
            yield (
                "warmup_steps is the work of an lr_scheduler ('linear', 'cosine', 'constant_with_warmup', ...); "
                "without one it is refused."
            )
        case "optimizer":
            yield "warmup_steps goes to the optimizer, which warms up itself."
        case "none":
            yield "It needs no warm-up: warmup_steps is refused."


def _modes(spec: OptimizerSpec) -> Iterator[str]:
    if spec.averages_weights:
        yield "It averages its iterates instead of following a schedule: an lr_scheduler is refused."
        yield (
            "It is in train mode exactly while training; validation, test, prediction and checkpoints see the averaged "
            "weights. Under a Trainer that is taken care of; in a loop of your own call optimizer.train() and "
            "optimizer.eval()."
        )


def _layerwise(spec: OptimizerSpec) -> Iterator[str]:
    if spec.layerwise:
        yield (
            "Buckets of parameters are stepped during backward, and their gradients are freed at once. On several "
            "devices it needs Trainer(strategy='layerwise_ddp') or 'layerwise_fsdp2'."
        )
    elif spec.coupled:
        yield f"It cannot be stepped during backward: {spec.coupled}."
    else:
        yield f"optim='{spec.name}{SUFFIX}' steps it during backward and frees each gradient at once."


def state(spec: OptimizerSpec) -> State | None:
    """Describes what ``spec`` stores per parameter, or ``None`` if the row does not say."""
    if spec.state is None:
        return None
    defaults = _defaults(spec)
    size = None if defaults is None else parameter_bytes(spec, defaults, _SHAPE, _ELEMENT_SIZE)
    return State(
        parameter=_PARAMETER,
        bytes=size,
        bytes_per_element=None if size is None else size / _ELEMENTS,
        bits=spec.bits,
        buffers=tuple(
            BufferEntry(
                name=buffer.name,
                storage=_storage(buffer, spec),
                copies=buffer.copies,
                by_default=defaults is not None and buffer.exists(defaults, _ELEMENT_SIZE),
            )
            for buffer in spec.state.buffers
        ),
        quantization=tuple(_quantization(spec)),
    )


def _defaults(spec: OptimizerSpec) -> Options | None:
    try:
        return parse(spec.options, None, spec.name)
    except InvalidOption:  # An option must be given.
        return None


def _storage(buffer: Buffer, spec: OptimizerSpec) -> str:
    dtype = "float32" if buffer.float32 else "the parameter's dtype"
    if callable(buffer.float32):
        dtype += " by default"
    copies = f"{buffer.copies} tensors, " if buffer.copies > 1 else ""
    quantized = spec.bits is not None and buffer.quantized
    return copies + (f"{spec.bits} bits ({dtype} where not quantized)" if quantized else dtype)


def _quantization(spec: OptimizerSpec) -> Iterator[str]:
    quantization = spec.state.quantization if spec.state else None
    if quantization is None:
        return
    block, smallest = (_number(value, spec) for value in (quantization.block_size, quantization.min_size))
    yield f"Quantized in blocks of {block} elements, which share a float32 scale."
    whole = ", or whose size is no multiple of the block" if quantization.whole_blocks else ""
    yield f"Not quantized: parameters with fewer elements than {smallest}{whole}; embeddings, see above."


def _number(value: int | str, spec: OptimizerSpec) -> str:
    if isinstance(value, int):
        return str(value)
    default = next(info.default for info in describe(spec.options) if info.name == value)
    return f"{value} (an option)" if default is MISSING else f"{value} ({default} by default)"


def example(name: str, spec: OptimizerSpec) -> Example:
    """Returns code that builds ``name`` with its defaults; ``...`` stands for options that must be given."""
    arguments = {"lr": _EXAMPLE_LR if spec.default_lr is None else spec.default_lr}
    if spec.decays:
        arguments["weight_decay"] = spec.default_weight_decay
    options = _shown_options(spec)
    return Example(_python(name, arguments, options), _command_line(name, arguments, options))


def _shown_options(spec: OptimizerSpec) -> dict[str, Any]:
    """Returns the options that must be given; if there are none, the first whose default can be written down."""
    infos = describe(spec.options)
    required: dict[str, Any] = {info.name: ... for info in infos if info.default is MISSING}
    return required or dict([(info.name, info.default) for info in infos if _is_telling(info)][:1])


def _is_telling(info: OptionInfo) -> bool:
    parts = info.default if isinstance(info.default, tuple) else (info.default,)
    return all(
        isinstance(part, (bool, int, str)) or (isinstance(part, float) and math.isfinite(part)) for part in parts
    )


def _python(name: str, arguments: dict[str, float], options: dict[str, Any]) -> str:
    given = {"optim": repr(name).replace("'", '"')} | {key: repr(value) for key, value in arguments.items()}
    if options:
        pairs = (f'"{key}": {"..." if value is ... else repr(value)}' for key, value in options.items())
        given["optim_args"] = f"{{{', '.join(pairs)}}}"
    lines = [
        "import lightning as L",
        "import torch",
        "from lightning_optim import OptimMixin",
        "",
        "class LitModel(OptimMixin, L.LightningModule):",
        "    def __init__(self, **optim):",
        "        super().__init__(**optim)",
        "        self.layer = torch.nn.Linear(64, 64)",
        "",
        "model = LitModel(",
        *(f"    {key}={value}," for key, value in given.items()),
        ")",
        "optimizer = model.configure_optimizers()  # what L.Trainer.fit(model) calls",
    ]
    return "\n".join(lines)


def _command_line(name: str, arguments: dict[str, float], options: dict[str, Any]) -> str:
    words = ["python", "train.py", "fit", "--optim", name]
    for key, value in arguments.items():
        words += [f"--{key}", repr(value)]
    for key, value in options.items():
        # YAML, of which JSON is a part.
        words += [f"--optim_args.{key}", "..." if value is ... else json.dumps(value)]
    return shlex.join(words)
