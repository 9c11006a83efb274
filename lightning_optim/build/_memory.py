"""Bytes of optimizer state, counted from shapes without allocating anything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor

from lightning_optim.table import OptimizerSpec, Options, Quantization

_SCALE_BYTES = 4


def state_bytes(spec: OptimizerSpec, options: Options, groups: Iterable[dict[str, Any]]) -> int | None:
    """Returns the bytes of the full state for these param groups, or ``None`` if the row does not describe it.

    Allocator overhead and lookup tables shared by all tensors are not counted.
    """
    if spec.state is None:
        return None
    total = 0
    for group in groups:
        # A group may override an option that decides whether a buffer exists.
        own = dataclasses.replace(options, **{key: group[key] for key in options.select("group") if key in group})
        for parameter in group["params"]:
            shape = tuple(parameter.shape)
            bits, stack_dims = group.get("optim_bits"), group.get("stack_dims", 0)
            total += parameter_bytes(spec, own, shape, parameter.element_size(), bits, stack_dims)
    return total


def parameter_bytes(
    spec: OptimizerSpec,
    options: Options,
    shape: tuple[int, ...],
    element_size: int,
    bits: int | None = None,
    stack_dims: int = 0,
) -> int:
    """Returns the bytes of one parameter's state.

    Args:
        spec: The row; its ``state`` must be known.
        options: Its options.
        shape: Shape of the parameter.
        element_size: Bytes per element of the parameter.
        bits: The group's ``optim_bits``; 32 keeps the state unquantized.
        stack_dims: How many leading dimensions only count matrices.
    """
    assert spec.state is not None
    layout = spec.state
    quantization = layout.quantization
    if len(shape) >= 2 + stack_dims:
        count, shape = math.prod(shape[:stack_dims]), shape[stack_dims:]
    else:
        count = 1
    total = layout.scalar_bytes + layout.scalars_like_parameter * element_size
    for buffer in layout.buffers:
        if not buffer.exists(options, element_size):
            continue
        elements = count * (buffer.elements(shape, options) if buffer.elements else math.prod(shape))
        may_be_quantized = quantization if buffer.quantized and bits != 32 else None
        if may_be_quantized is not None and is_quantized(may_be_quantized, options, elements):
            per_copy = _quantized_bytes(may_be_quantized, options, elements)
        elif buffer.element_size is not None:
            per_copy = elements * buffer.element_size(options)
        else:
            per_copy = elements * (max(4, element_size) if buffer.is_float32(options, bits) else element_size)
        total += buffer.copies * per_copy
    return total


def is_quantized(quantization: Quantization, options: Options, elements: int) -> bool:
    """Whether a parameter with this many elements gets a quantized state."""
    block = _number(quantization.block_size, options)
    return elements >= _number(quantization.min_size, options) and not (quantization.whole_blocks and elements % block)


def _quantized_bytes(quantization: Quantization, options: Options, elements: int) -> int:
    block = _number(quantization.block_size, options)
    codes = elements * quantization.bits // 8
    return codes + -(-elements // block) * _SCALE_BYTES + quantization.table_bytes


def _number(value: int | str, options: Options) -> int:
    return int(getattr(options, value)) if isinstance(value, str) else value


def measured_bytes(state_dict: dict[str, Any], without: Collection[str] = ()) -> int:
    """Returns the bytes of all distinct tensors in an optimizer's ``state_dict()["state"]`` but for some keys."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storages[value.data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            for key, item in value.items():
                if key not in without:
                    visit(item)

    visit(state_dict["state"])
    return sum(storages.values())
