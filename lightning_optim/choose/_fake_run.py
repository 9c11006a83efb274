"""One training step of a module's own code on tensors without memory: what is alive when."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from torch.utils.hooks import RemovableHandle

from lightning_optim._compat.fake import NEEDS_VALUES, fake_tensors, tensors_in
from lightning_optim.choose._cuda import LikeCuda
from lightning_optim.choose._fakes import Precision, fake_batch, fake_module
from lightning_optim.choose._tracker import MemoryTracker
from lightning_optim.errors import IncompatibleTrainer, InvalidOption
from lightning_optim.stepping import is_sharded

#: Computes the loss of a batch.
Loss = Callable[[Any, Any], Tensor]
Recorded = TypeVar("Recorded")


@dataclass(frozen=True)
class Arrival:
    """A gradient that arrives in backward.

    Attributes:
        parameter: Whose it is.
        before: Most bytes alive since the arrival before it, of what is no parameter, gradient or batch; its own
            gradient among them.
        after: Bytes alive of that at its arrival, without it.
    """

    parameter: Tensor
    before: int
    after: int


@dataclass(frozen=True)
class Timeline:
    """What forward and backward keep alive besides parameters, gradients and the batch.

    Attributes:
        fixed: Bytes of parameters, buffers and the batch.
        forward: Most bytes in forward.
        arrivals: The gradients in their order.
        end: Most bytes after the last of them.
        left: Live bytes after backward.
    """

    fixed: Mapping[str, int]
    forward: int
    arrivals: Sequence[Arrival]
    end: int
    left: int


class FakeTraining:
    """A module and a batch without memory, ready to run.

    Args:
        module: Any module; it is left alone.
        batch: What its loss is computed of; ``None`` counts no activations.
        loss: Computes the loss from the module and the batch; ``None`` takes ``training_step``, or what the module
            returns.
        precision: The Trainer's precision.
        accelerator: ``"cuda"`` keeps for backward what CUDA would; others what a CPU does.
    """

    def __init__(
        self, module: nn.Module, batch: Any, loss: Loss | None, precision: Precision, accelerator: str
    ) -> None:
        self.precision, self.accelerator = precision, accelerator
        self._like_cuda = accelerator == "cuda"
        self._mode = fake_tensors()
        with self._mode:
            self.module = fake_module(module, precision)
            self.batch = fake_batch(batch, precision)
            self._configure()
        self.module.train()
        self._loss = _no_batch if batch is None else loss or _loss_of(self.module)
        self._timelines: dict[bool, Timeline] = {}

    def _configure(self) -> None:
        if not isinstance(self.module, LightningModule):
            return
        with torch.device("cpu"), _default_dtype(self.precision.weights or torch.get_default_dtype()):
            self.module.configure_model()

    @cached_property
    def parameters(self) -> list[Tensor]:
        """All parameters, tied ones once."""
        return list(self.module.parameters())

    @contextmanager
    def without_memory(self, parameters: Sequence[Tensor] | None = None) -> Iterator[MemoryTracker]:
        """Inside, tensors have no memory, code that reads their values goes on, and the tracker counts.

        Args:
            parameters: Those that are used inside; ``None`` for all.
        """
        own = parameters is not None
        with (
            quiet(),
            self._mode,
            torch.compiler.set_stance("force_eager"),
            MemoryTracker(without_values=True, shapes_fit=own) as tracker,
        ):
            tracker.add(tensors_in(self.parameters if parameters is None else parameters), "parameters")
            yield tracker

    def timeline(self, retain_graph: bool = False) -> Timeline:
        """Runs forward and backward, each way once.

        Args:
            retain_graph: Whether backward keeps what another one would need.

        Raises:
            IncompatibleTrainer: If the module optimizes manually, or its step depends on values.
            InvalidOption: If no loss comes out.
        """
        if retain_graph not in self._timelines:
            self._timelines[retain_graph] = self.run(lambda tracker: _record(self, tracker, retain_graph))
        return self._timelines[retain_graph]

    def run(self, record: Callable[[MemoryTracker], Recorded]) -> Recorded:
        """Returns what is recorded of the module's step, for which it has a Trainer; gradients are dropped after it.

        Raises:
            IncompatibleTrainer: If the step depends on values.
        """
        with quiet(), _attached(self.module):
            try:
                return self._recorded(record)
            except NEEDS_VALUES as error:
                raise IncompatibleTrainer(
                    f"the training step of {type(self.module).__name__} does what depends on values ({error}), and "
                    "memory is estimated without any. Estimate with loss=lambda module, batch: ... that leaves it "
                    "out, or with batch=None, which counts all but activations",
                    code="LO904",
                ) from error
            finally:
                self.module.zero_grad(set_to_none=True)

    def _recorded(self, record: Callable[[MemoryTracker], Recorded]) -> Recorded:
        try:
            with self.without_memory() as tracker:
                return self._record(record, tracker)
        except CheckpointError:
            if not self._like_cuda:
                raise
            # What backward runs again it runs outside of the mode, and dropout kept something else in forward.
            self._like_cuda = False
            self.module.zero_grad(set_to_none=True)
            with self.without_memory() as tracker:
                return self._record(record, tracker)

    def _record(self, record: Callable[[MemoryTracker], Recorded], tracker: MemoryTracker) -> Recorded:
        tracker.add(self.module.buffers(), "buffers")
        tracker.add(tensors_in(self.batch), "batch")
        return record(tracker)

    def loss(self) -> Tensor:
        """Runs forward; returns the loss."""
        with ExitStack() as stack:
            for context in self._contexts():
                stack.enter_context(context)
            return self._loss(self.module, self.batch)

    def _contexts(self) -> Iterator[AbstractContextManager[Any]]:
        if self._like_cuda:
            yield LikeCuda()
        if self.precision.weights is not None:
            yield _default_dtype(self.precision.weights)
        if self.precision.autocast is not None:
            yield torch.autocast("cpu", dtype=self.precision.autocast)


def _record(training: FakeTraining, tracker: MemoryTracker, retain_graph: bool) -> Timeline:
    fixed = dict(tracker.live)
    arrivals: list[Arrival] = []

    def arrived(parameter: Tensor) -> None:
        assert parameter.grad is not None
        before = tracker.most["other"]
        tracker.add([parameter.grad], "gradients")
        arrivals.append(Arrival(parameter, before, tracker.live["other"]))
        tracker.restart()

    hooks = [on_gradient(p, arrived) for p in training.parameters if p.requires_grad]
    try:
        loss = training.loss()
        forward = tracker.most["other"]
        tracker.restart()
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        end = tracker.most["other"]
        del loss
        return Timeline(fixed, forward, tuple(arrivals), end, tracker.live["other"])
    finally:
        for hook in hooks:
            hook.remove()


def on_gradient(parameter: Any, arrived: Callable[[Tensor], None]) -> RemovableHandle:
    """Calls a function whenever the gradient of a parameter has been accumulated."""
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(arrived)
    return handle


def _loss_of(module: nn.Module) -> Loss:
    if not isinstance(module, LightningModule):
        return _module_loss
    name = type(module).__name__
    if not module.automatic_optimization:
        raise IncompatibleTrainer(
            f"{name} optimizes manually: which backward runs when is known to its training_step alone. Estimate with "
            "loss=lambda module, batch: ... for one of its losses, or with batch=None, which counts all but "
            "activations",
            code="LO904",
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise IncompatibleTrainer(
            f"training_step of {name} takes a dataloader_iter in place of a batch. Estimate with "
            "loss=lambda module, batch: ...",
            code="LO904",
        )
    return _training_step_loss


def _training_step_loss(module: Any, batch: Any) -> Tensor:
    takes_index = "batch_idx" in inspect.signature(module.training_step).parameters
    return _as_loss(module, module.training_step(batch, *((0,) if takes_index else ())), "training_step")


def _module_loss(module: Any, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        output = module(**batch)
    else:
        output = module(*batch) if isinstance(batch, (tuple, list)) else module(batch)
    return _as_loss(module, output, "forward")


def _as_loss(module: Any, output: Any, method: str) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if isinstance(loss, Tensor) and loss.requires_grad:
        # What a criterion would do to the outputs is not known; a sum keeps nothing.
        return loss if loss.ndim == 0 else loss.float().sum()
    raise InvalidOption(
        f"{method} of {type(module).__name__} returned {type(output).__name__}, and a tensor that depends on "
        "parameters is needed, or a mapping or object with such a 'loss'. Say what the loss is: "
        "loss=lambda module, batch: ...",
        code="LO904",
    )


def _no_batch(module: Any, batch: Any) -> Tensor:
    """Has gradients arrive from the last parameter to the first, without activations."""
    shards = (parameter.to_local() if is_sharded(parameter) else parameter for parameter in module.parameters())
    return torch.stack([shard.sum().float() for shard in shards if shard.requires_grad]).sum()


@contextmanager
def _attached(module: nn.Module) -> Iterator[None]:
    """Gives a LightningModule a Trainer, for ``self.log`` and ``self.trainer``."""
    if not isinstance(module, LightningModule):
        yield
        return
    module.trainer = Trainer(barebones=True, accelerator="cpu", devices=1)
    try:
        yield
    finally:
        module.trainer = None


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning says of a Trainer that nobody asked for, and modules of values that mean nothing."""
    with lightning_says(logging.ERROR), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def lightning_says(at_least: int) -> Iterator[None]:
    """Silences what Lightning, and we through its loggers, log below a level."""
    # Its messages go where the package that was imported last says: pytorch_lightning has its own logger.
    names = ("lightning.pytorch", "lightning.fabric", "lightning_utilities", "pytorch_lightning")
    loggers = [logger for logger in map(logging.getLogger, names) if logger.level != at_least]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(at_least)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
