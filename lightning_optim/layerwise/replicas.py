"""Processes that train copies of one model: averaging gradients, agreeing on an order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor


class Replicas:
    """The processes of a process group that hold the same parameters and different data.

    Args:
        process_group: The group; ``None`` means all processes.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self._group = process_group

    @property
    def size(self) -> int:
        """Number of processes."""
        return dist.get_world_size(self._group)

    def average(self, flat: Tensor) -> Callable[[], object]:
        """Starts averaging a tensor over the processes in place; returns the function that waits for it."""
        # Divided before the sum, as DistributedDataParallel does it: equal to it bit for bit.
        flat.mul_(1 / self.size)
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        assert work is not None
        wait: Callable[[], object] = work.wait
        return wait

    def exchange(self, order: Sequence[int]) -> list[list[int]]:
        """Returns the ``order`` of every process, by rank."""
        orders: list[list[int]] = [[] for _ in range(self.size)]
        dist.all_gather_object(orders, list(order), group=self._group)
        return orders
