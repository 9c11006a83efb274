"""Adding param groups, all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer


@contextmanager
def only_valid_groups(optimizer: Optimizer) -> Iterator[None]:
    """Removes the groups added to ``optimizer`` inside if a check raises."""
    before = len(optimizer.param_groups)
    try:
        yield
    except ValueError:
        del optimizer.param_groups[before:]
        raise


def as_group(param_group: Any) -> dict[str, Any]:
    """Returns a group that is to be added, for who looks into it before torch does.

    Raises:
        TypeError: As torch does, if it is no dict.
    """
    if not isinstance(param_group, dict):
        raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
    return param_group
