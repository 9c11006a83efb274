"""A row in sentences: how it groups and steps parameters, what it stores, what it is refused for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING

from lightning_optim.groups import override_keys
from lightning_optim.table import SUFFIX, Buffer, OptimizerSpec, describe

_WARMUP = {
    "schedule": "warmup_steps is the work of an lr_scheduler ('linear', 'cosine', 'constant_with_warmup', ...); "
    "without one it is refused.",
    "optimizer": "warmup_steps goes to the optimizer, which warms up itself.",
    "none": "It needs no warm-up: warmup_steps is refused.",
}


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


def policy(spec: OptimizerSpec) -> Iterator[str]:
    """Says what stands in for ``spec``, how it divides parameters, warms up and is stepped."""
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


def storage(buffer: Buffer, spec: OptimizerSpec) -> str:
    """Says in which bits or dtype ``buffer`` is stored, and how often."""
    dtype = "float32" if buffer.float32 else "the parameter's dtype"
    if callable(buffer.float32):
        dtype += " by default"
    copies = f"{buffer.copies} tensors, " if buffer.copies > 1 else ""
    quantized = spec.bits is not None and buffer.quantized
    return copies + (f"{spec.bits} bits ({dtype} where not quantized)" if quantized else dtype)


def quantization(spec: OptimizerSpec) -> Iterator[str]:
    """Says what of the state is quantized and what is not."""
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
