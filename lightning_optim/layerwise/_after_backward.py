"""What a layerwise optimizer does with gradients that are still alive after backward."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_optim.layerwise._buckets import AgreedBuckets, ArrivalBuckets, largest_shard_bytes
from lightning_optim.layerwise._clips import Clips
from lightning_optim.layerwise._hooks import GradientHooks
from lightning_optim.layerwise._passes import Observer, Step
from lightning_optim.layerwise._replicas import AgreedOrder, Replicas, refuse_unused
from lightning_optim.layerwise._split_parts import Watches
from lightning_optim.stepping import Clipping, norms_of, total_norm, uncompiled

MIB = 2**20
# Without bucket_mb: an eighth of all gradients, between these limits. A bucket costs the time of a hundred small
# operations whatever its size, so a small model gets fewer, but two at least.
_PARTS, _SMALLEST, _LARGEST = 8, MIB // 4, 32 * MIB


class AfterBackward:
    """The part of :class:`~lightning_optim.Layerwise` that averages, clips and steps gradients after backward.

    Gradients wait until then if micro-batches have accumulated and a decision depends on all of them, and if a loop
    that knows nothing of the engine runs backward.
    """

    optimizer: Optimizer
    bucket_mb: float | None
    replicas: Replicas | None
    names: dict[Tensor, str]
    gradient_norm: Tensor | None
    wants_norm: bool
    norm_budget_mb: float | None
    accumulated: bool
    stepped: bool
    observers: list[Observer]
    _hooks: GradientHooks
    _averaged: bool
    _watches: Watches
    _order: AgreedOrder

    @uncompiled
    def average_alive(self) -> None:
        """Averages over the processes the gradients that a backward without steps has left, unless already done.

        Raises:
            IncompatibleTrainer: If a parameter got no gradient.
        """
        if self.replicas is None or self._averaged:
            return
        # A parameter may have been frozen since it got its gradient.
        alive = self._alive()
        order = list(dict.fromkeys([*self._trainable(), *alive]))
        buckets = AgreedBuckets(order, self.bucket_bytes, self.replicas.average)
        for _ in buckets.flush(alive):
            pass
        self._averaged = True
        refuse_unused(buckets.unused, "in this process", self._name)

    @uncompiled
    def measure_alive(self) -> None:
        """Sets :attr:`gradient_norm` to the total norm of the live gradients."""
        self.gradient_norm = total_norm(norms_of(self._alive()))

    @uncompiled
    def clip_alive(self, clipping: Clipping) -> None:
        """Clips the live gradients but those of parts that do so themselves; by the norm of this step."""
        clipping.clip(Clips(self.optimizer).shared(self._alive()))

    def has_gradients(self) -> bool:
        """Whether there are live gradients."""
        return bool(self._alive())

    @uncompiled
    def _step_alive(self) -> None:
        alive = self._alive()
        # Without gradients, too: an optimizer may count its steps in its groups.
        if alive or not self.stepped:
            if alive:
                self.average_alive()
            clips = Clips(self.optimizer)
            measures = "norm" in clips.kinds
            step = Step(
                ArrivalBuckets(self.bucket_bytes),
                self._name,
                self.optimizer,
                clips,
                totals=clips.totals(dict(zip(alive, norms_of(alive), strict=True)), alive) if measures else None,
                watches=self._watches.begin(self.optimizer),
                observers=self.observers,
            )
            step.finish(alive)
            step.commit()
        self.stepped = self.accumulated = self._averaged = False
        self._order.arrivals.clear()

    def _step_after_backward(self, clipping: Clipping | None, scaler: GradScaler | None) -> None:
        self.average_alive()
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if self.wants_norm or (clipping is not None and clipping.kind in ("norm", "previous")):
            self.measure_alive()
        if clipping is not None:
            self.clip_alive(clipping)
        if scaler is not None:
            scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        # An overflow leaves the gradients alive.
        self.accumulated = self._averaged = False
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def bucket_bytes(self) -> int:
        """Bytes of gradients that may be alive in addition to the arriving one."""
        if self.bucket_mb is not None:
            return int(self.bucket_mb * MIB)
        hooked = self._hooks.bytes
        return min(max(hooked // _PARTS, min(hooked // 2, _SMALLEST)), _LARGEST)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients in the process with the most of them."""
        return sum(map(largest_shard_bytes, self._trainable()))

    def fits_budget(self) -> bool:
        """Whether all gradients may stay alive until their norm is known; every process says the same."""
        return self.norm_budget_mb is not None and self.gradient_bytes <= self.norm_budget_mb * MIB

    def _parameters(self) -> Iterator[Tensor]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def _trainable(self) -> list[Tensor]:
        # Asked in every step: a generator around another takes twice as long.
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _alive(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _name(self, parameter: Tensor) -> str:
        return repr(self.names.get(parameter, f"a parameter of shape {tuple(parameter.shape)}"))
