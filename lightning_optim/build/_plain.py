"""Plain values: what a checkpoint, a YAML file and another program can read."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from numbers import Number
from typing import Any

import torch
from torch import Tensor


def plain(value: Any) -> Any:
    """Returns Python's own strings, numbers, mappings and lists in place of enums, dtypes, numpy's and torch's scalars.

    Hugging Face's enums are subclasses of str and work like strings, but a checkpoint that holds one cannot be read
    with ``weights_only=True``. Any other value is returned unchanged.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else [plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 else value
    # numpy's; Python's own numbers have no item().
    is_scalar = isinstance(value, Number) or type(value).__name__ == "bool"
    return value.item() if is_scalar and hasattr(value, "item") else value


def storable(value: Any) -> Any:
    """Returns :func:`plain` values with tuples as lists: YAML would tag tuples as Python objects."""
    value = plain(value)
    if isinstance(value, dict):
        return {key: storable(item) for key, item in value.items()}
    return [storable(item) for item in value] if isinstance(value, (list, tuple)) else value
