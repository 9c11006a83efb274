"""Adding param groups, all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
