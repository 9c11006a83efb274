"""Copies of modules and batches that have shapes and no memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optim._compat.fake import map_tensors
from lightning_optim.errors import InvalidOption, listing


@dataclass(frozen=True)
class Precision:
    """What one of Lightning's precisions does.

    Attributes:
        name: Lightning's name.
        weights: The dtype that parameters, buffers and batches are cast to; ``None`` leaves them.
        autocast: The dtype of autocast; ``None`` for none.
    """

    name: str
    weights: torch.dtype | None = None
    autocast: torch.dtype | None = None


_PRECISIONS = (
    Precision("32-true"),
    Precision("64-true", weights=torch.float64),
    Precision("bf16-true", weights=torch.bfloat16),
    Precision("16-true", weights=torch.float16),
    Precision("bf16-mixed", autocast=torch.bfloat16),
    Precision("16-mixed", autocast=torch.float16),
)
PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {one.name: one for one in _PRECISIONS}
    # What Lightning takes for them, too.
    | {"32": _PRECISIONS[0], "64": _PRECISIONS[1], "bf16": _PRECISIONS[4], "16": _PRECISIONS[5]}
)


def find_precision(name: str | int) -> Precision:
    """Returns what a precision of Lightning's does.

    Raises:
        InvalidOption: If it is none, or one that needs a plugin.
    """
    found = PRECISIONS.get(str(name))
    if found is None:
        raise InvalidOption(f"precision={name!r}: memory is estimated for {listing(PRECISIONS)}", code="LO901")
    return found


def fake_module(module: nn.Module, precision: Precision) -> nn.Module:
    """Returns a deep copy whose parameters and buffers have no memory; to be called inside of ``fake_tensors()``.

    The module stays as it is, and its memory is not copied. Tied parameters are tied in the copy.

    Raises:
        InvalidOption: If a parameter has no shape yet, or something in the module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise InvalidOption(
                f"{name!r} has no shape yet (a Lazy module): run a batch through the module before its memory is "
                "estimated",
                code="LO307",
            )
        memo.setdefault(id(tensor), _fake(tensor, precision))
    try:
        return copy.deepcopy(module, memo)
    except (RuntimeError, TypeError) as error:
        raise InvalidOption(
            f"{type(module).__name__} cannot be copied ({error}), and its memory is estimated on a copy without any. "
            "Estimate it before the first forward, and without what cannot be copied (locks, open files, loaders)",
            code="LO904",
        ) from error


def fake_batch(batch: Any, precision: Precision) -> Any:
    """Returns the batch with tensors that have no memory; to be called inside of ``fake_tensors()``."""
    return map_tensors(lambda tensor: _fake(tensor, precision), batch)


def _fake(tensor: Tensor, precision: Precision) -> Tensor:
    dtype = tensor.dtype
    if precision.weights is not None and dtype.is_floating_point:
        dtype = precision.weights
    # Whatever device it is on: where it will be is asked for by name.
    made = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made
