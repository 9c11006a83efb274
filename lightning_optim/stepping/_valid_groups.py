"""Groups that an optimizer is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.optim import Optimizer


@contextmanager
def only_valid_groups(optimizer: Optimizer) -> Iterator[None]:
    """Takes the groups out of ``optimizer`` again that are added inside, if a check that follows there raises."""
    before = len(optimizer.param_groups)
    try:
        yield
    except ValueError:
        del optimizer.param_groups[before:]
        raise
