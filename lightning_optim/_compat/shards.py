"""Processes of torch.distributed that are not there, and what FSDP2 does with memory.

torch keeps its fake process group among what its own tests use, and does not say how ``fully_shard`` frees what it has
gathered. Without them ``lightning_optim.estimate_memory`` does not shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import UntypedStorage

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "COMMUNICATES",
    "absent_processes",
    "along",
    "give_mesh",
    "has_processes",
    "local_indices",
    "split_dim",
    "watch_resizes",
]

#: The namespaces of the operations that gather shards and reduce gradients.
COMMUNICATES = frozenset({"fsdp", "c10d"})


def has_processes() -> bool:
    """Whether this process belongs to a group already."""
    return dist.is_available() and dist.is_initialized()


@contextmanager
def absent_processes(count: int) -> Iterator[DeviceMesh]:
    """Makes this process the first of so many, of which there are no others; what they send is never waited for.

    Yields:
        Their mesh, with the dimensions that Lightning's ``ModelParallelStrategy`` names.
    """
    # Until it is imported, what a group sends takes no fake tensors in torch 2.9.
    import torch.distributed._tools.fake_collectives  # noqa: F401
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not has_processes(), "there is a process group"
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (count, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    finally:
        dist.destroy_process_group()


def give_mesh(module: LightningModule, mesh: DeviceMesh) -> None:
    """Sets ``module.device_mesh``, as ``ModelParallelStrategy`` does before ``configure_model``."""
    module._device_mesh = mesh


@contextmanager
def watch_resizes(resized: Callable[[Any], None]) -> Iterator[None]:
    """Calls a function with every storage that gets another size: FSDP2 frees what it has gathered so."""
    before: Any = UntypedStorage.resize_

    def resize_(self: UntypedStorage, size: int) -> Any:
        result = before(self, size)
        resized(self)
        return result

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = before  # type: ignore[method-assign]


def split_dim(placement: Any) -> int | None:
    """Returns which dimension a placement splits, ``None`` if none.

    ``is_shard()`` is false for the shards that FSDP2 makes of what tensor parallelism has split along the same
    dimension.
    """
    return getattr(placement, "dim", None)


def local_indices(mesh: DeviceMesh, placements: Sequence[Any], dim: int, entries: Tensor) -> Tensor:
    """Returns which of the entries of one dimension of a DTensor this process holds.

    Public functions say so only of shards that are contiguous, which those of FSDP2 over tensor parallelism are not.
    """
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this process belongs to the mesh"
    # A strided shard is a part of what a later dimension of the mesh has split.
    order = sorted(range(len(placements)), key=lambda index: hasattr(placements[index], "split_factor"))
    for index in order:
        if split_dim(placements[index]) == dim:
            # As torch.chunk, which leaves the last processes without any.
            size = -(-len(entries) // mesh.size(index))
            entries = entries[size * coordinate[index] : size * (coordinate[index] + 1)]
    return entries


def along(placement: Any, dim: int) -> Any:
    """Returns the same placement of another dimension."""
    factor = getattr(placement, "split_factor", None)
    return type(placement)(dim) if factor is None else type(placement)(dim, split_factor=factor)
