"""What happens to the gradients of one backward: recording their order, taking their norms, or stepping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_optim.errors import IncompatibleTrainer
from lightning_optim.layerwise._buckets import Bucket, Buckets
from lightning_optim.layerwise._clips import Clips, Totals
from lightning_optim.layerwise._coupled import Watch
from lightning_optim.layerwise._split_parts import SplitParts
from lightning_optim.stepping import norms_of


@contextmanager
def without_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, parameters have no gradients; afterwards they have those from before."""
    alive = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in alive:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in alive:
            parameter.grad = gradient


class Observer(Protocol):
    """Sees the buckets of every step, which an optimizer's own step hooks see too late."""

    def see_gradients(self, parameters: Sequence[Tensor], scaler: GradScaler | None = None) -> None:
        """Sees gradients before they are clipped; they are still scaled if a scaler is given."""

    def see_step(self, parameters: Sequence[Tensor]) -> None:
        """Sees parameters right after their step, their gradients still there."""


class Pass:
    """One backward whose gradients are used bucket by bucket and freed; ``name`` names a parameter in error texts."""

    def __init__(self, buckets: Buckets, name: Callable[[Tensor], str]) -> None:
        self.buckets = buckets
        # By id: Tensor.__hash__ is a Python function, and this is asked for every gradient.
        self._seen: set[int] = set()
        self._name = name

    def arrive(self, parameter: Tensor) -> None:
        """Takes a parameter whose gradient has been accumulated."""
        if id(parameter) in self._seen:
            raise IncompatibleTrainer(
                f"{self._name(parameter)} got a gradient twice in one backward, so stepping it at the first one was "
                "too early. Reentrant activation checkpointing does that to tied parameters (use "
                "checkpoint(..., use_reentrant=False)), and so do two backward calls in one step (add the losses). Or "
                "use the optimizer without _layerwise.",
                code="LO615",
            )
        self._seen.add(id(parameter))
        if full := self.buckets.add(parameter):
            self._take(full)

    def finish(self, alive: Iterable[Tensor]) -> None:
        """Takes what is left at the end of backward; ``alive`` are the parameters with gradients."""
        self._take(self.buckets.flush([parameter for parameter in alive if id(parameter) not in self._seen]))

    def _take(self, buckets: Iterable[Bucket]) -> None:
        for bucket in buckets:
            self.take(bucket)
            for parameter in bucket:
                parameter.grad = None

    def take(self, bucket: Bucket) -> None:
        """Uses the gradients of a bucket, which are freed afterwards."""
        raise NotImplementedError


class Observation(Pass):
    """Records the order in which gradients arrive."""

    def __init__(self, buckets: Buckets, name: Callable[[Tensor], str], arrivals: dict[Tensor, None]) -> None:
        super().__init__(buckets, name)
        self._arrivals = arrivals

    def take(self, bucket: Bucket) -> None:
        self._arrivals.update(dict.fromkeys(bucket))


class Measurement(Pass):
    """Takes the norms that ``clips`` needs, unscaled; overflows are recorded with the scaler."""

    def __init__(
        self,
        buckets: Buckets,
        name: Callable[[Tensor], str],
        optimizer: Optimizer,
        clips: Clips,
        scaler: GradScaler | None,
    ) -> None:
        super().__init__(buckets, name)
        self._split = SplitParts(optimizer)
        self._clips = clips
        self._scaler = scaler
        self._norms: dict[Tensor, Tensor] = {}

    def totals(self) -> Totals:
        """Returns the total norms."""
        return self._clips.totals(self._norms, self._split.parameters)

    def take(self, bucket: Bucket) -> None:
        if self._scaler is not None:
            for inner in self._split.inners_for(bucket):
                self._scaler.unscale_(inner)
        self._norms.update(zip(bucket, norms_of(bucket), strict=True))


class Step(Pass):
    """Unscales, clips and steps.

    ``totals`` are the norms that ``clips`` scales by; a non-finite one with a scaler skips the whole step. Otherwise
    the scaler skips the buckets that overflow. ``wants_norm`` takes the norm even if ``clips`` does not need it.
    ``watches`` undo the step if an optimizer couples its parameters, one for each part; without them nobody checks.
    ``observers`` see every bucket before and after its step.
    """

    def __init__(
        self,
        buckets: Buckets,
        name: Callable[[Tensor], str],
        optimizer: Optimizer,
        clips: Clips,
        scaler: GradScaler | None = None,
        totals: Totals | None = None,
        wants_norm: bool = False,
        watches: Sequence[Watch | None] = (),
        observers: Sequence[Observer] = (),
    ) -> None:
        super().__init__(buckets, name)
        self._observers = observers
        self._split = SplitParts(optimizer, watches)
        self._clips = clips
        self._scaler = scaler
        self._totals = totals
        self._exact = "norm" in clips.kinds
        self._skips = scaler is not None and totals is not None and not bool(torch.isfinite(totals.whole))
        # Known already where they were measured.
        self._takes_norms = "per_parameter" in clips.kinds or (
            not self._exact and (wants_norm or "previous" in clips.kinds)
        )
        self._norms: dict[Tensor, Tensor] = {}

    def take(self, bucket: Bucket) -> None:
        inners = self._split.inners_for(bucket)
        if self._skips:
            for observer in self._observers:
                observer.see_gradients(bucket, self._scaler)
            return
        if self._scaler is not None:
            for inner in inners:
                self._scaler.unscale_(inner)
        for observer in self._observers:
            observer.see_gradients(bucket)
        norms = norms_of(bucket) if self._takes_norms else []
        self._norms.update(zip(bucket, norms, strict=self._takes_norms))
        if self._clips:
            self._clips.apply(bucket, norms, self._totals)
        for inner in inners:
            if self._scaler is not None:
                self._scaler.step(inner)
            else:
                inner.step()
        # For kernels that bypass autograd: backward must not silently use a stepped value.
        torch.autograd.graph.increment_version(bucket)
        for observer in self._observers:
            observer.see_step(bucket)

    def commit(self) -> None:
        """See :meth:`SplitParts.commit`."""
        self._split.commit()

    def norm(self) -> Tensor | None:
        """Returns the total norm before clipping, 0-dim, or ``None`` if nobody needed it."""
        if self._exact or self._skips:
            return self._totals.whole if self._totals is not None else None
        return self._clips.totals(self._norms, self._split.parameters).whole if self._takes_norms else None
