"""How parameters are sharded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is a DTensor, as FSDP2 and tensor parallelism make it."""
    # Importing DTensor is slow, and none exists before its module is imported.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(parameter, module.DTensor)


@contextmanager
def without_reduction(module: nn.Module) -> Iterator[None]:
    """Inside, what ``fully_shard`` has sharded accumulates whole gradients in each process and reduces none."""
    from torch.distributed.fsdp import FSDPModule

    sharded = [own for own in module.modules() if isinstance(own, FSDPModule)]
    for own in sharded:
        own.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for own in sharded:
            own.set_requires_gradient_sync(True, recurse=False)
