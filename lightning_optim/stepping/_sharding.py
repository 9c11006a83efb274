"""How parameters are sharded."""

from __future__ import annotations

import sys

from torch import Tensor


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is a DTensor, as FSDP2 and tensor parallelism make it."""
    # Importing DTensor is slow, and none exists before its module is imported.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(parameter, module.DTensor)
