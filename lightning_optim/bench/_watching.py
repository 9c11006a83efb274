"""Callbacks of a trial: losses, seconds and samples of each step; the bytes it needs."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_optim._compat.fake import tensors_in
from lightning_optim.build import measured_bytes
from lightning_optim.choose import MemoryTracker

# The first steps fill caches and make states.
_WARM = 0.1
_POINTS = 50


class Recorder(Callback):
    """Keeps the loss and the times of every training batch, without waiting for the device in between.

    Args:
        on_step: Called after each optimizer step.
    """

    def __init__(self, on_step: Any = None) -> None:
        self._on_step = on_step
        self._times: list[tuple[Any, Any]] = []
        self._steps: list[int] = []
        self._losses: list[Tensor] = []
        self.samples: int | None = None
        self.tokens: int | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._times:
            self.samples, self.tokens = _sizes(batch)
        self._times.append((_now(pl_module.device), None))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._times[-1] = (self._times[-1][0], _now(pl_module.device))
        if self._on_step is not None and trainer.global_step > (self._steps[-1] if self._steps else 0):
            self._on_step()
        self._steps.append(trainer.global_step)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())

    def losses(self) -> list[float]:
        """Returns the training loss of each step, the mean of its batches; empty if the module returns none."""
        if len(self._losses) != len(self._steps) or not self._losses:
            return []
        each = torch.stack(self._losses).float().tolist()
        return [statistics.fmean(each[begin:end]) for begin, end in self._spans()]

    def curve(self) -> list[tuple[int, float]]:
        """Returns the training loss as at most 50 points, each the mean of the steps up to it."""
        losses = self.losses()
        count = min(_POINTS, len(losses))
        ends = [len(losses) * (number + 1) // count for number in range(count)]
        return [(end, statistics.fmean(losses[begin:end])) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]

    def step_seconds(self) -> float:
        """Returns the median time of a step: its batches from the forward to the optimizer, data loading left out."""
        each = _seconds(self._times)
        steps = [sum(each[begin:end]) for begin, end in self._spans()]
        return statistics.median(steps[int(_WARM * len(steps)) + (len(steps) > 1) :])

    def batches_per_step(self) -> float:
        """Returns how many batches a step takes, on average."""
        return len(self._steps) / max(1, len(self._spans()))

    def _spans(self) -> list[tuple[int, int]]:
        """Returns the batches of each step, as ranges; a beginning without its step is left out."""
        spans, begin = [], 0
        for index, step in enumerate(self._steps):
            if step > (self._steps[index - 1] if index else 0):
                spans.append((begin, index + 1))
                begin = index + 1
        return spans


def _now(device: torch.device) -> Any:
    """Returns a point in time; on CUDA an event that the device reaches when it has done what came before."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds(times: list[tuple[Any, Any]]) -> list[float]:
    if times and not isinstance(times[0][0], float):
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in times]
    return [end - begin for begin, end in times]


def _sizes(batch: Any) -> tuple[int | None, int | None]:
    """Returns how many samples a batch has, and how many tokens if it is a matrix of whole numbers."""
    first = next(iter(tensors_in(batch)), None)
    if first is None:
        return None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = extract_batch_size(batch)
    is_text = first.dim() == 2 and not (first.is_floating_point() or first.is_complex())
    return samples, first.numel() if is_text else None


class MemoryWatch(Callback):
    """Measures the most bytes that are allocated for training at once, and those of the optimizer's state.

    On CUDA the allocator says it. On a CPU the storages are counted that parameters, buffers, batches, gradients,
    states and activations have: see :class:`MemoryTracker`. On other devices the peak stays ``None``.

    Args:
        compiles: Whether the optimizer compiles its step, which torch does not do while operations are counted. What
            is alive is counted before and after it then, and its kernels make nothing large in between.
        in_backward: Whether the optimizer steps during backward. If it compiles, too, the peak stays ``None``.
    """

    def __init__(self, compiles: bool, in_backward: bool) -> None:
        self._live: MemoryTracker | None = None
        self._compiles, self._in_backward = compiles, in_backward
        self._is_counting = False
        self._before = 0
        self.peak: int | None = None
        self.state = 0
        self.method: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            self.method = "torch.cuda.max_memory_allocated"
        elif device.type == "cpu" and not (self._compiles and self._in_backward):
            self._live = MemoryTracker()
            self.method = "live storages, counted in every operation"

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._live is not None:
            self._live.add((*pl_module.buffers(), *tensors_in(batch)))
            self._watch_lasting(trainer)
            self._live.__enter__()
            self._is_counting = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self._compiles:
            self._stop_counting()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._stop_counting()
        if self._live is not None:
            self._watch_lasting(trainer)

    def on_exception(self, *_: Any) -> None:
        self._stop_counting()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = sum(measured_bytes({"state": dict(one.state)}) for one in trainer.optimizers)
        if self._live is not None:
            self.peak = self._live.peak.total
        elif pl_module.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(pl_module.device) - self._before

    def _watch_lasting(self, trainer: Trainer) -> None:
        assert self._live is not None
        parameters = list(trainer.lightning_module.parameters())
        gradients = tensors_in([parameter.grad for parameter in parameters])
        states = tensors_in([list(one.state.values()) for one in trainer.optimizers])
        self._live.add((*parameters, *gradients, *states))

    def _stop_counting(self) -> None:
        if self._is_counting:
            assert self._live is not None
            self._live.__exit__(None, None, None)
            self._is_counting = False
