"""Counts the bytes of tensors while they live; those without memory count as if they had it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_optim._compat.fake import (
    DispatchMode,
    FakeTensor,
    answer_attribute,
    answer_in_place,
    answer_without_values,
    tensors_in,
)
from lightning_optim._compat.shards import COMMUNICATES, watch_resizes

Category = Literal["parameters", "buffers", "gradients", "state", "batch", "communication", "other"]
CATEGORIES: tuple[Category, ...] = get_args(Category)


@dataclass(frozen=True)
class Moment:
    """The bytes alive at one moment.

    Attributes:
        phase: What ran then, as :attr:`MemoryTracker.phase` said.
        live: Bytes by category.
    """

    phase: str
    live: Mapping[str, int]

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.live.values())

    @property
    def shares(self) -> dict[str, int]:
        """The bytes as an estimate names them, without what a step keeps and takes."""
        live = self.live
        kept = {name: live[name] for name in ("parameters", "buffers", "gradients", "communication")}
        return kept | {"activations": live["other"] + live["batch"]}


class MemoryTracker(DispatchMode):  # type: ignore[misc]
    """While it is entered, sees every tensor that an operation makes, until it dies.

    Bytes are those of storages, each counted once whatever views there are of it. What an operation takes and gives
    back inside of its kernel is not seen, and neither is what the allocator rounds up or keeps. What shards are
    gathered into, and gradients on their way to be reduced, are ``"communication"``.

    Args:
        without_values: Whether to answer code that reads values, where tensors have none.
        shapes_fit: Whether what runs is known to write into tensors what fits into them. Without values there is
            nothing left of such an operation to be run.

    Example:
        >>> import torch
        >>> with MemoryTracker() as tracker:
        ...     tensor = torch.ones(256)
        ...     del tensor
        >>> (tracker.live["other"], tracker.peak.total)
        (0, 1024)
    """

    def __init__(self, without_values: bool = False, shapes_fit: bool = False) -> None:
        super().__init__()
        self._without_values, self._in_place = without_values, without_values and shapes_fit
        #: What runs, for :attr:`Moment.phase`.
        self.phase = ""
        self.live: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
        self._known: dict[int, tuple[str, int]] = {}
        self._watching = ExitStack()
        self.restart()

    def __enter__(self) -> MemoryTracker:
        self._watching.enter_context(watch_resizes(self._resized))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._watching.close()

    def restart(self) -> None:
        """Forgets the peaks until now."""
        self.peak = self.now()
        #: The moment with most bytes of each phase, and the most bytes of each category.
        self.peaks: dict[str, Moment] = {}
        self.most: dict[str, int] = dict(self.live)

    def now(self) -> Moment:
        """Returns what is alive."""
        return Moment(self.phase, MappingProxyType(dict(self.live)))

    def add(self, tensors: Iterable[Tensor], category: Category = "other") -> None:
        """Counts tensors; those that are known already move to the category."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._known.get(id(storage))
            if known is None:
                self._count(storage, category)
            elif category not in ("other", known[0]):
                self.live[known[0]] -= known[1]
                self._set(id(storage), category, known[1])
        self._note()

    def rename(self, before: Category, category: Category) -> None:
        """Counts all that is alive of one category among another."""
        for key, (found, size) in self._known.items():
            if found == before:
                self._known[key] = category, size
        self.live[category] += self.live[before]
        self.live[before] = 0
        self.most[category] = max(self.most[category], self.live[category])

    def _count(self, storage: Any, category: str) -> None:
        weakref.finalize(storage, self._drop, id(storage)).atexit = False
        self._set(id(storage), category, storage.nbytes())

    def _set(self, key: int, category: str, size: int) -> None:
        self._known[key] = category, size
        self.live[category] += size
        self.most[category] = max(self.most[category], self.live[category])

    def _note(self) -> None:
        total = sum(self.live.values())
        best = self.peaks.get(self.phase)
        if best is None or total > best.total:
            self.peaks[self.phase] = self.now()
            if total > self.peak.total:
                self.peak = self.peaks[self.phase]

    def _drop(self, key: int) -> None:
        category, size = self._known.pop(key)
        self.live[category] -= size

    def _resized(self, storage: Any) -> None:
        known = self._known.get(id(storage))
        if known is None:
            # Made before this was entered.
            self._count(storage, "communication")
        else:
            self.live[known[0]] -= known[1]
            self._set(id(storage), known[0], storage.nbytes())
        self._note()

    def _communicated(self, tensors: Iterable[Tensor]) -> None:
        # Shards that are sent stay parameters.
        unclaimed = [t for t in tensors if self._known.get(id(t.untyped_storage()), ("other", 0))[0] == "other"]
        self.add(unclaimed, "communication")

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.namespace == "prim":
            return answer_attribute(operation, args)
        if self._without_values:
            answered, answer = answer_without_values(operation, args)
            if answered:
                return answer
            if kwargs and kwargs.get("generator") is not None:
                # FakeTensorMode keeps what it found out for each generator.
                kwargs = {**kwargs, "generator": None}
        if self._in_place:
            answered, answer = answer_in_place(operation, args)
            if answered:
                return answer
        result = operation(*args, **(kwargs or {}))
        self.add((result,) if type(result) is FakeTensor else tensors_in(result))
        if operation.namespace in COMMUNICATES:
            self._communicated(tensors_in((args, kwargs)))
        return result
