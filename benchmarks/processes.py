"""Starts a benchmark anew in several processes of torch.distributed, and counts what these send to each other."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

RANK = int(os.environ.get("LOCAL_RANK", 0))


def start(processes: int) -> None:
    """Runs the script with its arguments in so many processes, and exits with their status; in them, does nothing."""
    if "LOCAL_RANK" in os.environ:
        return
    run = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes))
    local = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    # Where it is not set, torch says at length that it sets it.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    sys.exit(subprocess.run([sys.executable, *run, *local, *sys.argv], env=environment).returncode)


def say(*lines: str) -> None:
    """Prints lines, once for all processes."""
    if RANK == 0:
        print(*lines, sep="\n", flush=True)


def from_all(value: Any) -> list[Any]:
    """Returns what each process has passed."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


class Sent(TorchDispatchMode):
    """Counts the bytes that leave this process, of every collective that is called inside, by who calls it.

    Sizes are those of the tensors that the collectives are given. What of them leaves a process is what the usual
    algorithms send: a ring's, or, of an exchange, what is meant for others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self._caller: str | None = None

    @contextmanager
    def on_behalf_of(self, caller: str) -> Iterator[None]:
        """Inside, what is sent is counted as this caller's, not by what it is."""
        before, self._caller = self._caller, caller
        try:
            yield
        finally:
            self._caller = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            # Its parts come here by themselves.
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func._schema.name.partition("::")[2], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name in _SEND_NOTHING:
            return
        # What is not known is an error, not nothing.
        kind, leaving = _LEAVING[name]
        self.bytes[self._caller or kind] += round(leaving(args, dist.get_world_size()))
        self.messages[self._caller or kind] += 1


def _given(tensors: Tensor | list[Tensor]) -> int:
    return sum(each.nbytes for each in ([tensors] if isinstance(tensors, Tensor) else tensors))


def _to_others(args: Any, processes: int) -> float:
    """Returns the bytes of an exchange that are not meant for the process itself."""
    sizes = args[4] or [len(args[1]) // processes] * processes
    others = sum(sizes) - sizes[dist.get_rank()]
    return others * math.prod(args[1].shape[1:]) * args[1].element_size()


_SEND_NOTHING = frozenset({"barrier", "wait_tensor"})
_Leaving = Callable[[Any, int], float]
#: By the name of a collective: what it does, and the bytes that leave a process, of its arguments and of how many
#: processes take part.
_LEAVING: dict[str, tuple[str, _Leaving]] = {
    "_allgather_base_": ("gathered", lambda args, n: _given(args[1]) * (n - 1)),
    "allgather_": ("other", lambda args, n: _given(args[1]) * (n - 1)),
    "all_gather_into_tensor": ("other", lambda args, n: _given(args[0]) * (n - 1)),
    "_reduce_scatter_base_": ("reduced", lambda args, n: _given(args[1]) * (n - 1) / n),
    "allreduce_": ("other", lambda args, n: 2 * _given(args[0]) * (n - 1) / n),
    "all_reduce": ("other", lambda args, n: 2 * _given(args[0]) * (n - 1) / n),
    "alltoall_base_": ("other", _to_others),
    "broadcast_": ("other", lambda args, n: _given(args[0])),
}
