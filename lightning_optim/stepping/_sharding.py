"""How parameters are sharded."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_optim._compat.shards import along, local_indices, split_dim

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is a DTensor, as FSDP2 and tensor parallelism make it."""
    # Importing DTensor is slow, and none exists before its module is imported.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(parameter, module.DTensor)


@dataclass(frozen=True)
class Layout:
    """How one parameter is spread over processes; without a mesh, this process holds all of it.

    Dimensions are those of the parameter; negative ones count from its end.

    Attributes:
        shape: The shape of the whole parameter.
        mesh: The processes, a ``DeviceMesh``.
        placements: What each dimension of the mesh does, as of a DTensor.
    """

    shape: tuple[int, ...]
    mesh: Any = None
    placements: tuple[Any, ...] = ()

    @classmethod
    def of(cls, tensor: Any) -> Layout:
        """Returns the layout of a DTensor, or of a tensor that is whole."""
        if is_sharded(tensor):
            return cls(tuple(tensor.shape), tensor.device_mesh, tuple(tensor.placements))
        return cls(tuple(tensor.shape))

    @property
    def spread(self) -> tuple[Any, ...] | None:
        """What parameters that are spread alike have in common; ``None`` for whole ones."""
        return None if self.mesh is None else (self.mesh, self.placements)

    def splitting(self, dims: Iterable[int] | None = None) -> tuple[int, ...]:
        """Returns which dimensions of the mesh split one of these dimensions, or any with ``None``."""
        wanted = None if dims is None else {dim % len(self.shape) for dim in dims}
        return tuple(i for i, dim in enumerate(self._split) if dim is not None and (wanted is None or dim in wanted))

    @cached_property
    def _split(self) -> tuple[int | None, ...]:
        """The dimension of the parameter that each of the mesh splits; ``None`` where there is nothing to split."""
        return tuple(split_dim(each) if self.mesh.size(i) > 1 else None for i, each in enumerate(self.placements))

    def groups(self, dims: Iterable[int] | None = None) -> tuple[ProcessGroup, ...]:
        """Returns the groups of processes that hold different parts along these dimensions, or any with ``None``."""
        return tuple(self.mesh.get_group(index) for index in self.splitting(dims))

    def parts(self, dims: Iterable[int] | None = None) -> int:
        """Returns into how many parts these dimensions are split, or all with ``None``; processes may share a part."""
        return math.prod(self.mesh.size(index) for index in self.splitting(dims))

    @cached_property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this process's part."""
        split = (dim for dim in range(len(self.shape)) if self.splitting((dim,)))
        return tuple({**dict(enumerate(self.shape)), **{dim: len(self.indices(dim)) for dim in split}}.values())

    @cached_property
    def largest(self) -> int:
        """How many elements the process with the most of them has; the same number in every process."""
        return math.prod(-(-size // self.parts((dim,))) for dim, size in enumerate(self.shape))

    def indices(self, dim: int, device: torch.device | None = None) -> Tensor:
        """Returns which entries of a dimension this process holds, ascending."""
        dim %= len(self.shape)
        found = torch.arange(self.shape[dim], device=device)
        return found if self.mesh is None else local_indices(self.mesh, self.placements, dim, found)

    def share(self, tensor: Tensor) -> Tensor:
        """Returns this process's part of a whole tensor."""
        for dim in range(len(self.shape)):
            if self.splitting((dim,)):
                tensor = tensor.index_select(dim, self.indices(dim, tensor.device))
        return tensor

    def followed(self, dims: Sequence[int | None], shape: Sequence[int]) -> Layout:
        """Returns the layout of a tensor whose dimensions are spread as the parameter's.

        Args:
            dims: The dimension of the parameter that each of the tensor's follows; ``None`` for one that is not split.
            shape: The tensor's shape; only the sizes of what is not split count.
        """
        sizes = tuple(size if dim is None else self.shape[dim] for size, dim in zip(shape, dims, strict=True))
        if self.mesh is None:
            return Layout(sizes)
        from torch.distributed.tensor import Replicate

        placements = []
        for placement in self.placements:
            dim = split_dim(placement)
            placements.append(along(placement, dims.index(dim)) if dim is not None and dim in dims else Replicate())
        return Layout(sizes, self.mesh, tuple(placements))

    def wrap(self, tensor: Tensor) -> Tensor:
        """Returns the DTensor with this layout of which this process has ``tensor``."""
        if self.mesh is None:
            return tensor
        from torch.distributed.tensor import DTensor

        strides = tuple(math.prod(self.shape[index + 1 :]) for index in range(len(self.shape)))
        made: Tensor = DTensor.from_local(
            tensor, self.mesh, self.placements, run_check=False, shape=torch.Size(self.shape), stride=strides
        )
        return made

    def entries(self, tensor: Tensor, dim: int) -> Tensor:
        """Returns this process's rows of a whole tensor whose first dimension is spread as ``dim`` is."""
        return tensor[self.indices(dim, tensor.device)] if self.splitting((dim,)) else tensor

    def place(self, dim: int) -> tuple[int, int]:
        """Returns this process's number among those that a dimension is split over, and how many they are."""
        number = 0
        for index in self.splitting((dim,)):
            number = number * self.mesh.size(index) + self.mesh.get_local_rank(index)
        return number, self.parts((dim,))


def spread_alike(tensor: Any, parameter: Any) -> Tensor:
    """Returns a DTensor spread as a parameter is, as gradients usually are."""
    alike: Tensor = tensor
    if tensor.placements != parameter.placements:
        alike = tensor.redistribute(parameter.device_mesh, parameter.placements)
    return alike


def local(value: Any) -> Any:
    """Returns this process's part of a DTensor, in the same memory, and anything else as it is."""
    return value.to_local().detach() if is_sharded(value) else value


def forget_gathered(module: nn.Module) -> None:
    """Has ``fully_shard`` gather parameters anew before they are used: they were changed outside of a step."""
    if "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule

        for own in module.modules():
            if isinstance(own, FSDPModule):
                own.reshard()


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
