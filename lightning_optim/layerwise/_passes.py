"""What happens to the gradients of one backward: recording their order, taking their norms, or stepping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_optim.errors import IncompatibleTrainer
from lightning_optim.layerwise._buckets import Bucket, Buckets
from lightning_optim.layerwise._clipping import Clipping, norms_of, total_norm
from lightning_optim.layerwise._coupled import Watch
from lightning_optim.layerwise._split_parts import SplitParts


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
                "use the optimizer without _layerwise."
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
    """Takes the norm of all gradients, unscaled; overflows are recorded with the scaler."""

    def __init__(
        self, buckets: Buckets, name: Callable[[Tensor], str], optimizer: Optimizer, scaler: GradScaler | None
    ) -> None:
        super().__init__(buckets, name)
        self._split = SplitParts(optimizer)
        self._scaler = scaler
        self._norms: dict[Tensor, Tensor] = {}

    def norm(self) -> Tensor:
        """Returns the total norm, 0-dim."""
        return total_norm(_in_order(self._norms, self._split.parameters))

    def take(self, bucket: Bucket) -> None:
        if self._scaler is not None:
            for inner in self._split.inners_for(bucket):
                self._scaler.unscale_(inner)
        self._norms.update(zip(bucket, norms_of(bucket), strict=True))


class Step(Pass):
    """Unscales, clips and steps.

    ``total`` is the norm that ``clipping`` scales by; a non-finite one with a scaler skips the whole step. Otherwise
    the scaler skips the buckets that overflow. ``wants_norm`` takes the norm even if ``clipping`` does not need it.
    ``watches`` undo the step if an optimizer couples its parameters, one for each part; without them nobody checks.
    ``observers`` see every bucket before and after its step.
    """

    def __init__(
        self,
        buckets: Buckets,
        name: Callable[[Tensor], str],
        optimizer: Optimizer,
        clipping: Clipping | None = None,
        scaler: GradScaler | None = None,
        total: Tensor | None = None,
        wants_norm: bool = False,
        watches: Sequence[Watch | None] = (),
        observers: Sequence[Observer] = (),
    ) -> None:
        super().__init__(buckets, name)
        self._observers = observers
        self._split = SplitParts(optimizer, watches)
        self._clipping = clipping
        self._scaler = scaler
        self._total = total
        self._exact = clipping is not None and clipping.kind == "norm"
        self._skips = scaler is not None and total is not None and not bool(torch.isfinite(total))
        self._takes_norms = not self._exact and (
            wants_norm or (clipping is not None and clipping.kind in ("previous", "per_parameter"))
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
        if self._clipping is not None:
            self._clipping.apply(bucket, norms, self._total)
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
            return self._total
        return total_norm(_in_order(self._norms, self._split.parameters)) if self._takes_norms else None


def _in_order(norms: dict[Tensor, Tensor], parameters: Iterable[Tensor]) -> list[Tensor]:
    """Orders norms like the param groups, so that sums round as in torch.nn.utils.clip_grad_norm_."""
    return [norms[parameter] for parameter in parameters if parameter in norms]
