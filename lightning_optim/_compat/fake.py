"""Tensors of torch that have a shape and no memory, and modes that see every operation. All are in torch 2.9.

torch exports them by private names only. Without them there is no ``lightning_optim.estimate_memory``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "NEEDS_VALUES",
    "DispatchMode",
    "FakeTensor",
    "answer_attribute",
    "answer_in_place",
    "answer_without_values",
    "fake_tensors",
    "map_tensors",
    "tensors_in",
    "without_modes",
]

#: The base of modes whose ``__torch_dispatch__`` is given every operation, below autograd.
DispatchMode: Any = TorchDispatchMode

#: What an operation raises whose result depends on values that there are not.
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)

# What ``item()``, ``bool()`` and ``float()`` of a tensor call.
_READ = torch.ops.aten._local_scalar_dense.default
_DEVICE = torch.ops.prim.device.default


def fake_tensors() -> Any:
    """Returns the mode inside of which new tensors have no memory; real ones that meet them are taken for such."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def answer_attribute(operation: Any, arguments: tuple[Any, ...]) -> Any:
    """Answers what a mode is asked of a tensor and computes nothing; asked more often than anything is computed."""
    if operation is _DEVICE and type(arguments[0]) is FakeTensor:
        # What FakeTensorMode would say, without dispatching once more.
        return arguments[0].fake_device
    return operation(*arguments)


def answer_without_values(operation: Any, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    """Returns whether an operation can be answered where there are no values, and the answer.

    A truth value that is read is true, so that code that looks for finite values finds some. A whole number is 1, any
    other number a half: what is divided by it, or by 1 without it, is finite. The kernels of other packages that write
    into what they are given leave it as it is.
    """
    if operation is _READ:
        dtype = arguments[0].dtype
        return True, True if dtype is torch.bool else 0.5 if dtype.is_floating_point else 1
    schema = operation._schema
    return operation.namespace not in ("aten", "prims", "prim") and not schema.returns, None


def answer_in_place(operation: Any, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    """Returns whether an operation only writes into fake tensors that it is given, and what it gives back.

    Whether the shapes fit is not looked at, which is what FakeTensorMode would take its time for.
    """
    if not _writes_in_place(operation):
        return False, None
    written = arguments[0]
    tensors = written if isinstance(written, (list, tuple)) else (written,)
    if not all(type(tensor) is FakeTensor for tensor in tensors):
        return False, None
    return True, written if operation._schema.returns else None


@cache
def _writes_in_place(operation: Any) -> bool:
    schema = operation._schema
    if operation.namespace != "aten" or not schema.name.endswith("_") or torch.Tag.inplace_view in operation.tags:
        return False
    # The first may be of another size afterwards.
    if "resize" in schema.name or schema.name == "aten::set_" or not schema.arguments:
        return False
    alias = schema.arguments[0].alias_info
    return alias is not None and bool(alias.is_write)


def tensors_in(value: Any) -> list[Tensor]:
    """Returns the tensors in lists, tuples, mappings and whatever else torch knows to hold some."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if hasattr(leaf, "__tensor_flatten__"):
            # A subclass that consists of others (torchao's states), whose own storage is none.
            found += tensors_in([getattr(leaf, name) for name in leaf.__tensor_flatten__()[0]])
        elif isinstance(leaf, Tensor) and leaf.layout is torch.sparse_coo:
            found += [leaf._indices(), leaf._values()]
        elif isinstance(leaf, Tensor):
            found.append(leaf)
    return found


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Returns the same lists, tuples and mappings with other tensors."""
    return tree_map_only(Tensor, function, value)


def without_modes() -> AbstractContextManager[Any]:
    """Runs outside of all modes; what is made inside is real, for what outlives them (a table that is cached)."""
    context: AbstractContextManager[Any] = _disable_current_modes()
    return context
