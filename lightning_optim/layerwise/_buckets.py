"""Which gradients are handed on together: in order of arrival, or as all processes have agreed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim.stepping import Layout

Bucket = list[Tensor]

#: Averages a flat buffer over all processes in place; returns the function that waits for it.
Average = Callable[[Tensor], Callable[[], object]]


class Buckets(Protocol):
    """Collects the parameters whose gradient has arrived and returns them in buckets."""

    def add(self, parameter: Tensor) -> Iterable[Bucket]:
        """Takes a parameter whose gradient has arrived; returns the buckets that can be stepped now."""

    def flush(self, leftover: Iterable[Tensor]) -> Iterator[Bucket]:
        """Ends a backward; ``leftover`` have gradients of earlier micro-batches and got none in this one."""


def nbytes(tensor: Tensor) -> int:
    """Returns the bytes of a tensor in this process; for a DTensor, those of its shard."""
    # hasattr on a Parameter is slow, and a sharded one is a DTensor by type.
    if type(tensor) is not Parameter and hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    return tensor.nbytes


def largest_shard_bytes(tensor: Tensor) -> int:
    """Returns the bytes of a tensor in the process with the largest shard: the same number in every process."""
    return Layout.of(tensor).largest * tensor.element_size()


class ArrivalBuckets:
    """Buckets in order of arrival, full at ``limit`` bytes: less is alive when the next gradient arrives."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending: Bucket = []
        self._bytes = 0

    def add(self, parameter: Tensor) -> Iterable[Bucket]:
        self._pending.append(parameter)
        self._bytes += parameter.nbytes if type(parameter) is Parameter else nbytes(parameter)
        return (self._take(),) if self._bytes >= self._limit else ()

    def flush(self, leftover: Iterable[Tensor]) -> Iterator[Bucket]:
        for parameter in leftover:
            yield from self.add(parameter)
        if self._pending:
            yield self._take()

    def _take(self) -> Bucket:
        bucket, self._pending, self._bytes = self._pending, [], 0
        return bucket


class AgreedBuckets:
    """Buckets that are the same in every process, averaged over the processes before they are returned.

    While one bucket is being averaged the next one fills, so each may have half of the limit; one with a larger
    gradient has to come back before another is started. An arriving gradient is copied into its bucket's flat buffer
    and becomes a view of it: only the buffer of a bucket stays alive.

    Args:
        order: The parameters in the order that the processes agreed on.
        limit: Bytes of gradients alive at any moment, in addition to the arriving one.
        average: Averages a flat buffer over the processes.
    """

    def __init__(self, order: Sequence[Tensor], limit: int, average: Average) -> None:
        self._average = average
        self._limit = limit
        self._plan = list(_partition(order, limit // 2))
        self._place = {
            parameter: (number, offset)
            for number, bucket in enumerate(self._plan)
            for parameter, offset in zip(bucket, _offsets(bucket), strict=True)
        }
        self._awaited = set(order)
        self._incomplete = [len(bucket) for bucket in self._plan]
        #: After :meth:`flush`, the parameters that got no gradient in this process.
        self.unused: list[Tensor] = []
        self._buffers: dict[int, Tensor] = {}
        self._launched = 0
        self._flying: deque[tuple[Bucket, Callable[[], object]]] = deque()

    def add(self, parameter: Tensor) -> Iterator[Bucket]:
        number, _ = self._place[parameter]
        if number not in self._buffers:
            size = sum(map(nbytes, self._plan[number]))
            while self._flying and self._alive_bytes() + size > self._limit:
                yield self._land()
        self._receive(parameter)
        yield from self._launch()

    def flush(self, leftover: Iterable[Tensor]) -> Iterator[Bucket]:
        for parameter in leftover:
            yield from self.add(parameter)
        self.unused = [parameter for bucket in self._plan for parameter in bucket if parameter in self._awaited]
        for parameter in self.unused:
            # The other processes must not wait forever for this one.
            parameter.grad = torch.zeros_like(parameter)
            yield from self.add(parameter)
        while self._flying:
            yield self._land()

    def _receive(self, parameter: Tensor) -> None:
        number, offset = self._place[parameter]
        gradient = parameter.grad
        assert gradient is not None
        # A dense gradient keeps its parameter's strides: fused kernels read both in memory order.
        strides = gradient.stride() if gradient.is_contiguous() else torch.empty_like(gradient, device="meta").stride()
        if len(self._plan[number]) == 1 and strides == gradient.stride():
            self._buffers[number] = gradient.as_strided((gradient.numel(),), (1,))
        else:
            if number not in self._buffers:
                elements = sum(member.numel() for member in self._plan[number])
                self._buffers[number] = gradient.new_empty(elements)
            view = self._buffers[number].as_strided(gradient.shape, strides, offset)
            view.copy_(gradient)
            parameter.grad = view
        self._awaited.discard(parameter)
        self._incomplete[number] -= 1

    def _launch(self) -> Iterator[Bucket]:
        """Starts averaging every complete bucket, in the agreed order; yields those that are done."""
        while self._launched < len(self._plan) and not self._incomplete[self._launched]:
            wait = self._average(self._buffers.pop(self._launched))
            self._flying.append((self._plan[self._launched], wait))
            self._launched += 1
            while len(self._flying) > 1:
                yield self._land()

    def _alive_bytes(self) -> int:
        """Returns the bytes of all buckets that are being averaged or filled."""
        flying = sum(nbytes(parameter) for bucket, _ in self._flying for parameter in bucket)
        return flying + sum(map(nbytes, self._buffers.values()))

    def _land(self) -> Bucket:
        bucket, wait = self._flying.popleft()
        wait()
        return bucket


def _partition(order: Sequence[Tensor], limit: int) -> Iterator[Bucket]:
    """Splits parameters into buckets of at most ``limit`` bytes, each of one dtype on one device."""
    bucket: Bucket = []
    size = 0
    for parameter in order:
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (parameter.dtype, parameter.device)
        if bucket and (not alike or size + nbytes(parameter) > limit):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += nbytes(parameter)
    if bucket:
        yield bucket


def _offsets(bucket: Bucket) -> Iterator[int]:
    offset = 0
    for parameter in bucket:
        yield offset
        offset += parameter.numel()
