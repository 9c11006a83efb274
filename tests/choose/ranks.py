"""Real training in two processes whose memory is measured: copies of a model (ddp), and shards of one (FSDP2).

``test_processes.py`` starts both and compares what the first wrote with the estimates.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from lightning_optim import FSDP2Strategy, LayerwiseDDPStrategy, LayerwiseFSDP2Strategy, OptimMixin
from lightning_optim._compat.fake import tensors_in
from lightning_optim.choose import MemoryTracker
from tests.choose.real import LENGTH, VOCABULARY, Block, tokens
from tests.models import trainer

# The measured step, after those in which couplings are looked for and buckets are made anew.
MEASURED, STEPS = 4, 5
BATCH = (4, LENGTH)
STRATEGIES: dict[str, type[Strategy]] = {
    "ddp": DDPStrategy,
    "layerwise_ddp": LayerwiseDDPStrategy,
    "fsdp2": FSDP2Strategy,
    "layerwise_fsdp2": LayerwiseFSDP2Strategy,
}


@dataclass(frozen=True)
class Case:
    """What is trained how."""

    strategy: str
    optim: str
    precision: str = "32-true"
    setting: dict[str, Any] = field(default_factory=dict)
    batch: tuple[int, int] = BATCH
    #: Whether the module leaves to the strategy how it is sharded.
    left: bool = False

    def __str__(self) -> str:
        own = [f"{key}={value}" for key, value in self.setting.items()] + ["without configure_model"] * self.left
        return " ".join([self.strategy, self.optim, self.precision, *own])


# One token beside which the step is most, and many beside which the activations are.
CASES = (
    Case("fsdp2", "adamw_torch", "bf16-true", {"accumulate_grad_batches": 2}),
    Case("fsdp2", "grokadamw", batch=(1, 2)),
    Case("layerwise_fsdp2", "adamw_torch_layerwise", setting={"gradient_clip_val": 1.0}),
    Case("layerwise_fsdp2", "adamw_torch_layerwise", setting={"accumulate_grad_batches": 2}),
    Case("layerwise_fsdp2", "lomo", "bf16-true", batch=(1, 2), left=True),
    Case("fsdp2", "adamw_torch", "bf16-mixed", left=True),
    Case("ddp", "adamw_torch"),
    Case("ddp", "adafactor", "bf16-true", batch=(1, 2)),
    Case("layerwise_ddp", "adafactor_layerwise", batch=(1, 2)),
)


class Text(nn.Module):
    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, batch: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(batch)))


class LitCopies(OptimMixin, L.LightningModule):
    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        self.model = Text()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch).flatten(0, 1).float(), batch.flatten())


class LitShards(LitCopies):
    def configure_model(self) -> None:
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def module_of(case: Case) -> LitCopies:
    """Returns a module for the strategy."""
    kind = LitShards if case.strategy.endswith("fsdp2") and not case.left else LitCopies
    return kind(optim=case.optim)


class Watch(L.Callback):
    """Measures a step by the tracker and by the allocator's profile."""

    def __init__(self, accumulate: int) -> None:
        self.before, self.first = (MEASURED - 1) * accumulate, MEASURED * accumulate
        self.last = self.first + accumulate - 1
        self.tracker = MemoryTracker()
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Tensor, index: int) -> None:
        if index == self.before:
            # A step earlier, to see what is kept from one to the next: gradients, and the buckets of ddp.
            (optimizer,) = trainer.optimizers
            self.tracker.add(tensors_in(list(pl_module.parameters())), "parameters")
            self.tracker.add(tensors_in(list(optimizer.state.values())), "state")
            self.tracker.add([batch], "batch")
            self.start = self.tracker.now().total
            self.tracker.__enter__()
            self.profiler.__enter__()
        if index == self.first:
            self.tracker.restart()
            if isinstance(trainer.strategy, DDPStrategy):
                # Made before the profile.
                self.start += self.tracker.live["communication"]
        self.tracker.phase = "forward"

    def on_before_backward(self, *_: Any) -> None:
        self.tracker.phase = "backward"

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.tracker.phase = "step"

    def on_train_batch_end(self, *args: Any) -> None:
        if args[4] == self.last:
            self.profiler.__exit__(None, None, None)
            self.tracker.__exit__(None, None, None)

    def allocated(self) -> int:
        """Returns the most bytes that the allocator had given away at once."""
        found = self.profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        sizes = sorted((event.start_ns(), event.nbytes()) for event in found if event.name() == "[memory]")
        return self.start + max(accumulate(size for _, size in sizes))


def measure(case: Case) -> dict[str, Any]:
    """Trains and measures."""
    micro = case.setting.get("accumulate_grad_batches", 1)
    watch = Watch(micro)
    batch = tokens(*case.batch)
    run = trainer(
        max_steps=STEPS,
        strategy=STRATEGIES[case.strategy](),
        devices=2,
        precision=case.precision,
        callbacks=[watch],
        use_distributed_sampler=False,
        **case.setting,
    )
    run.fit(module_of(case), DataLoader([batch] * STEPS * micro, batch_size=None))
    return {
        "tracked": watch.tracker.peak.total,
        "at_peak": dict(watch.tracker.peak.live),
        "moment": watch.tracker.peak.phase,
        "allocated": watch.allocated(),
        "state": watch.tracker.most["state"],
    }


def settled(case: Case) -> dict[str, Any]:
    """Measures until the allocator has seen gloo's threads free what they have sent, on a busy machine a few times.

    They do so a moment after they have said that they are done; until then a process has more than it needs.
    """
    found = [measure(case)]
    while len(found) < 4 and wanted_by_any(found[-1]["allocated"] > 1.03 * found[-1]["tracked"]):
        found.append(measure(case))
    return min(found, key=lambda one: one["allocated"])


def wanted_by_any(wanted: bool) -> bool:
    """Whether any process wants something."""
    flag = torch.tensor(float(wanted))
    dist.all_reduce(flag)
    return bool(flag)


if __name__ == "__main__":
    measured = {str(case): settled(case) for case in CASES}
    if os.environ["LOCAL_RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(measured))
