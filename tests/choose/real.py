"""Real training whose memory is measured in two ways: by the tracker, and by what the CPU's allocator reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from lightning_optim import OptimMixin
from lightning_optim._compat.fake import tensors_in
from lightning_optim.choose import MemoryTracker
from tests.models import trainer

VOCABULARY, LENGTH = 512, 64
# Which of the steps are measured: those after the ones in which couplings are looked for. The profile begins a step
# earlier than it counts, with the gradients that Lightning drops after the forward of the step that counts.
TRACKED, PROFILED, STEPS = 4, 5, 7
# What bitsandbytes keeps once for all parameters.
SHARED = {"qmap1", "qmap2"}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.qkv(self.norm(hidden)).chunk(3, dim=-1)
        heads = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts)
        hidden = hidden + F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        return hidden + self.down(F.gelu(self.up(hidden)))


class LitText(OptimMixin, L.LightningModule):
    """A small language model that logs, keeps a buffer and has a frozen parameter."""

    def __init__(self, width: int = 128, layers: int = 3, **optim: Any) -> None:
        super().__init__(**optim)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.head = nn.Linear(width, VOCABULARY)
        self.frozen = nn.Parameter(torch.zeros(width, width), requires_grad=False)
        self.register_buffer("positions", torch.zeros(LENGTH, width))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden = self.blocks(self.embedding(batch) + self.positions[: batch.shape[1]])
        loss = F.cross_entropy(self.head(hidden).flatten(0, 1).float(), batch.flatten())
        self.log("loss", loss)
        return loss


def tokens(sequences: int, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (sequences, length))


@dataclass
class Measured:
    """What one step took: the tracker, the peak that the allocator saw, and the state before the step."""

    tracker: MemoryTracker
    allocated: int
    state: int


class _Watch(L.Callback):
    """Measures from the start of a batch to its end."""

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate
        self.tracker = MemoryTracker()
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Tensor, index: int) -> None:
        if index == TRACKED * self.accumulate:
            (optimizer,) = trainer.optimizers
            self.tracker.add(pl_module.parameters(), "parameters")
            self.tracker.add(pl_module.buffers(), "buffers")
            for state in optimizer.state.values():
                own = [value for name, value in state.items() if name not in SHARED]
                self.tracker.add(tensors_in(own), "state")
            self.state = self.tracker.live["state"]
            self.tracker.add([batch], "batch")
            self.before = self.tracker.now().total
            old = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
            self.tracker.add(old, "gradients")
            del old
            self.tracker.__enter__()
        if index == PROFILED * self.accumulate:
            self.profiler.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        index = args[2]
        if index + 1 == (TRACKED + 1) * self.accumulate:
            self.tracker.__exit__(None, None, None)
        if index + 1 == STEPS * self.accumulate:
            self.profiler.__exit__(None, None, None)


def measure(
    module: L.LightningModule, batch: Tensor, precision: str = "32-true", accumulate: int = 1, **settings: Any
) -> Measured:
    """Trains on a CPU and measures by each of the two."""
    watch = _Watch(accumulate)
    quiet = trainer(
        max_steps=STEPS, precision=precision, accumulate_grad_batches=accumulate, callbacks=[watch], **settings
    )
    quiet.fit(module, DataLoader([batch] * STEPS * accumulate, batch_size=None))
    found = watch.profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = sorted((event.start_ns(), event.nbytes()) for event in found if event.name() == "[memory]")
    alive = peak = 0
    for _, size in events:
        alive += size
        peak = max(peak, alive)
    return Measured(watch.tracker, watch.before + peak, watch.state)
