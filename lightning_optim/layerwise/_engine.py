"""``Layerwise``: makes an optimizer step each bucket of parameters during backward and free its gradients at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_optim._compat.torch import SCALES, mark_as_stepped, mark_as_wrapped
from lightning_optim.errors import IncompatibleTrainer, InvalidOption
from lightning_optim.layerwise._after_backward import AfterBackward
from lightning_optim.layerwise._buckets import AgreedBuckets, ArrivalBuckets, Buckets
from lightning_optim.layerwise._clips import Clips, Totals
from lightning_optim.layerwise._coupled import refuse_coupled
from lightning_optim.layerwise._hooks import GradientHooks
from lightning_optim.layerwise._passes import Measurement, Observation, Observer, Pass, Step, without_gradients
from lightning_optim.layerwise._probe import ask
from lightning_optim.layerwise._refusals import fabric_scales, not_here, stepped_too_early
from lightning_optim.layerwise._replicas import AgreedOrder, Replicas, refuse_separate_processes, refuse_unused
from lightning_optim.layerwise._split_parts import Watches
from lightning_optim.layerwise._split_step import ATTACHED
from lightning_optim.stepping import Clipping, averaging_parts, parts_of, uncompiled


class Layerwise(AfterBackward):
    """Steps an optimizer during backward, bucket by bucket, and frees each bucket's gradients at once.

    The optimizer keeps its param groups, state and state dict, and checkpoints move freely between layerwise and plain
    stepping. Only its ``step`` changes while this is attached: ``step(closure)`` runs the closure and then steps the
    live gradients, if any (bucket by bucket, freeing them). So a loop that knows nothing of this engine still trains
    correctly; memory is saved where a backward runs through :meth:`backward` or inside :meth:`stepping`::

        optimizer = build_optimizer(model, "adamw_8bit")
        layerwise = Layerwise(optimizer)
        for batch in batches:
            layerwise.backward(model(batch).mean(), clipping=Clipping("norm", 1.0))
        layerwise.detach()

    Args:
        optimizer: Any optimizer that steps each parameter on its own.
        bucket_mb: MiB of gradients that may be alive in addition to the arriving one; 0 steps one parameter at a time,
            ``None`` takes an eighth of all gradients, at least 256 KiB (or half of them) and at most 32 MiB.
        replicas: The processes to average gradients over, for copies of one model trained without
            ``DistributedDataParallel``; ``None`` for one process, and where gradients are already reduced (FSDP2).
        names: The parameters' names, for error texts.

    Raises:
        InvalidOption: If ``bucket_mb`` is negative.
        IncompatibleTrainer: If the optimizer steps its parameters together, or is already layerwise.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        bucket_mb: float | None = None,
        *,
        replicas: Replicas | None = None,
        names: Mapping[Tensor, str] | None = None,
    ) -> None:
        if bucket_mb is not None and not 0 <= bucket_mb < float("inf"):
            raise InvalidOption(
                f"bucket_mb={bucket_mb!r} is not a size: give MiB, 0 for single parameters, or None", code="LO204"
            )
        for part in parts_of(optimizer):
            refuse_coupled(part)
            ask(part)
        if Layerwise.of(optimizer) is not None:
            raise IncompatibleTrainer(
                f"this {type(optimizer).__name__} is already layerwise: Layerwise.of(optimizer)", code="LO611"
            )
        self.optimizer = optimizer
        self.bucket_mb = bucket_mb
        self.replicas = replicas
        self.names = dict(names or {})
        #: 2-norm of the last step's gradients before clipping, unscaled and averaged, 0-dim; ``None`` until needed.
        self.gradient_norm: Tensor | None = None
        #: Whether to take the norm at every step, even if clipping does not need it.
        self.wants_norm = False
        #: MiB of gradients that may stay alive until backward is over; if all fit, no backward measures them first.
        self.norm_budget_mb: float | None = None
        #: Whether an overflow under loss scaling skips the whole step, as in PyTorch, by a backward that only measures.
        self.skips_whole_steps = False
        #: Whether micro-batches have accumulated; to be set where ``parameter.grad`` does not show it, as with FSDP2.
        self.accumulated = False
        #: What scales the losses, for :meth:`stepping`; set by training frameworks that scale them.
        self.scaler: GradScaler | None = None
        #: Who sees every bucket before and after its step.
        self.observers: list[Observer] = []
        #: True while ``optimizer.step`` runs its closure: the current backward is the one to step in.
        self.in_closure = False
        #: True if a backward has stepped since the last ``optimizer.step``, which then has nothing to do.
        self.stepped = False
        #: True if the last step was abandoned, with some parameters stepped and others not.
        self.torn = False

        self._hooks = GradientHooks(self._on_gradient)
        self._pass: Pass | None = None
        # Kept until the next step ends: a GradScaler tells the inner optimizers apart by their id().
        self._passes: list[Pass] = []
        self._measured: Totals | None = None
        self._averaged = False
        self._watches = Watches()
        self._order = AgreedOrder()
        self._lock = threading.Lock()  # a model on two devices has two backward threads
        self._instead_of: dict[str, Any] = {}
        self._replace("step", MethodType(_step, optimizer))
        self._replace(ATTACHED, self)
        if getattr(optimizer, SCALES, False):
            # A fused optimizer would unscale gradients in its step, when they are gone.
            self._replace(SCALES, False)
        self._hooks.add(self._trainable())  # also what was added or unfrozen since

    @staticmethod
    def of(optimizer: Optimizer) -> Layerwise | None:
        """Returns the ``Layerwise`` attached to this optimizer, or ``None`` if it steps plainly."""
        # Lightning's and Fabric's wrappers forward attributes of the optimizer.
        return getattr(optimizer, ATTACHED, None)

    def detach(self) -> None:
        """Removes all hooks and restores the optimizer's ``step``; safe to call twice."""
        self.abort()
        self._hooks.remove()
        self._passes.clear()
        attributes = vars(self.optimizer)
        for name, value in self._instead_of.items():
            if value is None:
                del attributes[name]
            else:
                attributes[name] = value
        self._instead_of.clear()

    # --- for training loops ---

    def backward(
        self,
        loss: Tensor,
        *,
        clipping: Clipping | None = None,
        scaler: GradScaler | None = None,
        backward: Callable[..., Any] = Tensor.backward,
    ) -> None:
        """Runs backward and steps: replaces ``loss.backward()``, clipping, ``optimizer.step()`` and ``zero_grad()``.

        For accumulation call ``loss.backward()`` on the earlier micro-batches and this on the last one.

        Args:
            loss: The unscaled loss.
            clipping: How to clip.
            scaler: Loss scaling for float16; call ``scaler.update()`` afterwards.
            backward: Runs backward; it is called with the loss, and with ``retain_graph=True`` if another backward
                follows. Pass ``fabric.backward`` under Fabric.

        Raises:
            IncompatibleTrainer: If a parameter gets a gradient twice, or none while processes average it; if there are
                several processes and nothing averages; if ``backward`` itself scales the loss.
        """
        fabric = getattr(backward, "__self__", None)
        precision = getattr(getattr(fabric, "strategy", None), "precision", None)
        if getattr(precision, "scaler", None) is not None:
            raise fabric_scales()
        if scaler is not None:
            loss = scaler.scale(loss)
        if self.must_wait(clipping, scaler):
            backward(loss)
            self._step_after_backward(clipping, scaler)
            return
        self.prepare(lambda: backward(loss, retain_graph=True), clipping, scaler)
        self.begin(clipping, scaler)
        with self._aborting():
            backward(loss)
        self.end()
        # Nothing is left to step; this runs the hooks registered on it.
        self.optimizer.step()

    @contextmanager
    def stepping(self, *, clipping: Clipping | None = None, scaler: GradScaler | None = None) -> Iterator[None]:
        """Steps during the backward that runs inside; for manual optimization and custom loops.

        Args:
            clipping: How to clip, by value or per parameter; the other kinds need :meth:`backward`.
            scaler: The scaler that scaled the loss; call its ``update()`` afterwards. Lightning does both.

        Raises:
            IncompatibleTrainer: If ``clipping`` or ``skips_whole_steps`` needs a backward that measures, or processes
                have not yet agreed on an order.
        """
        if self.replicas is not None and not self._order.covers(self._trainable()):
            raise not_here(
                "the processes do not yet know in which order gradients arrive: run the first step through", "loss"
            )
        scaler = scaler or self.scaler
        if scaler is not None and self.skips_whole_steps:
            raise not_here(
                "skips_whole_steps needs to know of an overflow before the gradients are stepped: call",
                "loss, scaler=...",
            )
        self.begin(clipping, scaler)
        with self._aborting():
            yield
        self.end()

    # --- for drivers: before, at the start and at the end of the backward that steps ---

    def must_wait(self, clipping: Clipping | None, scaler: GradScaler | None) -> bool:
        """Whether the step must wait for the end of backward.

        That is so if the decision depends on all gradients (their total norm, or an overflow in one of them) and they
        are all alive anyway, after accumulation, or may be: they fit into :attr:`norm_budget_mb`.
        """
        by_norm = self._must_measure(Clips(self.optimizer, clipping))
        if (by_norm or (scaler is not None and self.skips_whole_steps)) and self.fits_budget():
            return True
        return (by_norm or scaler is not None) and (self.accumulated or self.has_gradients())

    @uncompiled
    def prepare(
        self, backward: Callable[[], Any], clipping: Clipping | None = None, scaler: GradScaler | None = None
    ) -> None:
        """Runs the backward passes that must precede the one that steps, if any; ``backward`` retains the graph.

        Raises:
            IncompatibleTrainer: If a parameter gets no gradient in a process and others average it.
        """
        if self.replicas is not None and not self._order.covers(self._trainable()):
            # Accumulated micro-batches have shown the order already; a parameter may still get a gradient in the last.
            complete = not self._order.arrivals
            if complete:
                # Gradients that a checkpoint brought must not be freed.
                with without_gradients(self._parameters()):
                    self._run(Observation(ArrivalBuckets(0), self._name, self._order.arrivals), backward)
            self._order.agree(self.replicas, list(self._parameters()), self._name, complete)
        clips = Clips(self.optimizer, clipping)
        if self._must_measure(clips):
            self._measured = self._measure(backward, clips, scaler)
            return
        if "previous" in clips.kinds and self.gradient_norm is not None:
            self._measured = Totals.of_all(self.gradient_norm)
        if scaler is not None and self.skips_whole_steps:
            totals = self._measure(backward, clips, scaler)
            if not bool(torch.isfinite(totals.whole)):
                # Makes the step skip.
                self._measured = totals

    @uncompiled
    def begin(self, clipping: Clipping | None = None, scaler: GradScaler | None = None) -> None:
        """Has the next backward pass step the optimizer."""
        self.torn = False
        self._hooks.add(self._trainable())  # also what was added or unfrozen since
        if self.replicas is None:
            refuse_separate_processes(self._parameters())
        clips = Clips(self.optimizer, clipping)
        if not clips.kinds.isdisjoint(("norm", "previous")) and self._measured is None:
            what = "a part's own clipping by norm" if clipping is None else f"Clipping({clipping.kind!r}, ...)"
            raise not_here(f"{what} needs the norm before the gradients are stepped: call", "loss, clipping=...")
        self._pass = Step(
            self._buckets(),
            self._name,
            self.optimizer,
            clips,
            scaler,
            self._measured,
            self.wants_norm,
            self._watches.begin(self.optimizer),
            self.observers,
        )
        self._passes.append(self._pass)

    @uncompiled
    def end(self) -> None:
        """Steps the remaining gradients and ends the step.

        Raises:
            IncompatibleTrainer: If a parameter got no gradient while other processes average it.
        """
        step = self._pass
        assert isinstance(step, Step), "end() without begin()"
        with self._aborting():
            self._finish(step)
            step.commit()
        self._pass, self._measured = None, None
        self._passes = [step]
        self._order.arrivals.clear()
        self.stepped = True
        norm = step.norm()
        if norm is not None:
            self.gradient_norm = norm

    @property
    def is_stepping(self) -> bool:
        """True from :meth:`begin` to :meth:`end`."""
        return isinstance(self._pass, Step)

    @uncompiled
    def abort(self) -> None:
        """Abandons the current backward and drops its gradients; what was stepped stays stepped."""
        if self._pass is not None:
            self.torn = self.is_stepping
            self._pass, self._measured = None, None
            self.optimizer.zero_grad(set_to_none=True)

    # Inside.

    def _replace(self, name: str, value: Any) -> None:
        attributes = vars(self.optimizer)
        self._instead_of[name] = attributes.get(name)
        attributes[name] = value

    @contextmanager
    def _aborting(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            stepping = self.is_stepping
            self.abort()
            if stepping and "modified by an inplace operation" in str(error):
                raise stepped_too_early() from error
            raise

    def _outer_step(self, closure: Callable[[], Any] | None) -> Any:
        """What ``optimizer.step`` does: runs the closure, then steps the live gradients."""
        mark_as_stepped(self.optimizer)
        loss = None
        if closure is not None:
            for part in averaging_parts(self.optimizer):
                part.train()
            self.in_closure = True
            try:
                with torch.enable_grad(), self._aborting():
                    loss = closure()
            finally:
                self.in_closure = False
        self._step_alive()
        return loss

    def _must_measure(self, clips: Clips) -> bool:
        """Whether clipping the first gradient takes a total norm that is not known yet."""
        if "previous" in clips.kinds and (self.gradient_norm is None or not bool(torch.isfinite(self.gradient_norm))):
            return True
        return "norm" in clips.kinds

    def _measure(self, backward: Callable[[], Any], clips: Clips, scaler: GradScaler | None) -> Totals:
        """Runs a backward that only measures; returns the total norms."""
        measurement = Measurement(self._buckets(), self._name, self.optimizer, clips, scaler)
        self._passes.append(measurement)
        self._run(measurement, backward)
        return measurement.totals()

    def _run(self, run: Pass, backward: Callable[[], Any]) -> None:
        """Runs a backward that does not step."""
        self._hooks.add(self._trainable())
        self._pass = run
        with self._aborting():
            backward()
            self._finish(run)
        self._pass = None

    def _finish(self, run: Pass) -> None:
        with self._lock:
            run.finish(self._alive())
        if isinstance(run.buckets, AgreedBuckets):
            refuse_unused(run.buckets.unused, "in this process", self._name)

    def _on_gradient(self, parameter: Tensor) -> None:
        if self._pass is not None:
            with self._lock:
                self._pass.arrive(parameter)
            return
        self._averaged = False
        if self.replicas is not None:
            self._order.arrivals[parameter] = None

    def _buckets(self) -> Buckets:
        if self.replicas is None:
            return ArrivalBuckets(self.bucket_bytes)
        return AgreedBuckets(self._order.parameters, self.bucket_bytes, self.replicas.average)


@Optimizer.profile_hook_step
def _step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
    """The ``step`` of an optimizer that is stepped during backward."""
    layerwise = Layerwise.of(optimizer)
    assert layerwise is not None
    return layerwise._outer_step(closure)


mark_as_wrapped(_step)
