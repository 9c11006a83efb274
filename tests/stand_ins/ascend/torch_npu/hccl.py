"""The process group backend "hccl": gloo, on the memory of the stand-in's tensors."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from torch_npu.device import to_cpu


def _on_cpu(tensors: Any) -> Any:
    return pytree.tree_map(lambda tensor: to_cpu(tensor) if tensor.device.type == "npu" else tensor, tensors)


class HCCL(dist.ProcessGroup):
    """Forwards what DDP and Lightning call."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        # torch asks what it can do.
        self._register_backend(torch.device("npu"), dist.ProcessGroup.BackendType.CUSTOM, self._gloo)

    def getBackendName(self) -> str:
        return "hccl"

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        return self._gloo.allreduce(_on_cpu(tensors), opts or dist.AllreduceOptions())

    def broadcast(self, tensors: Any, opts: Any) -> Any:
        return self._gloo.broadcast(_on_cpu(tensors), opts)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return self._gloo.allgather(_on_cpu(outputs), _on_cpu(inputs))

    def barrier(self, opts: Any) -> Any:
        opts.device_ids = []  # gloo knows none
        return self._gloo.barrier(opts)


def register_backend() -> None:
    """Makes ``init_process_group("hccl")`` work."""
    dist.Backend.register_backend("hccl", HCCL, devices=["npu", "cpu"])
