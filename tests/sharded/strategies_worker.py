"""Fits of every name under every strategy, all in the same processes; each writes what came of it to ``rank<n>.pt``.

The loss is linear in the weights, and its gradients are sums of few binary digits: exact in whatever order they are
added. What differs between strategies comes from the step alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import LayerwiseFSDP2Strategy, OptimMixin
from tests.models import trainer
from tests.processes import EVERY
from tests.sharded.cases import ALONE, GRID, GRID_NAMES, WAYS, Way, strategy_case

RANK = int(os.environ.get("LOCAL_RANK", 0))
STEPS, BATCH, LENGTH, WIDTH, TOKENS = 3, 16, 8, 64, 13


class Exact(OptimMixin, L.LightningModule):
    """Layers side by side; two processes do not divide 13 rows."""

    #: Factor on the learning rate.
    pace = 1.0

    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS)
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.device_mesh is None or isinstance(next(self.parameters()), DTensor):
            return
        split, shards = self.device_mesh["tensor_parallel"], self.device_mesh["data_parallel"]
        if split.size() > 1:
            plan = {
                "up": ColwiseParallel(output_layouts=Replicate()),
                "down": RowwiseParallel(input_layouts=Replicate()),
            }
            parallelize_module(self, split, plan)
        if shards.size() > 1:
            for layer in list(self.children()):
                fully_shard(layer, mesh=shards)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        tokens, inputs, factors = share(self, batch)
        outputs = self.embedding(tokens), self.up(inputs), self.down(inputs), self.head(inputs)
        loss = torch.stack([(each * factors[..., : each.shape[-1]]).sum(-1).mean() for each in outputs]).sum()
        self.losses.append(loss.item())
        return loss


class Block(nn.Module):
    """Attention and MLP. Keys have no bias, whose gradient is nothing but rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.queries, self.values = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.keys = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.first(hidden)
        heads = (
            each(normed).unflatten(-1, (-1, 16)).transpose(1, 2) for each in (self.queries, self.keys, self.values)
        )
        hidden = hidden + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return hidden + self.down(F.gelu(self.up(self.second(hidden))))


class Transformer(Exact):
    """Its linear layers are split by tensor parallelism, and all is sharded; norms are left whole by the former."""

    # What a step makes of the rounding of small gradients is in proportion.
    pace = 0.01

    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        del self.up, self.down

    def configure_model(self) -> None:
        if self.device_mesh is None or isinstance(next(self.parameters()), DTensor):
            return
        columns = dict.fromkeys(("queries", "keys", "values", "up"), ColwiseParallel())
        for block in self.blocks:
            plan = {**columns, "out": RowwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, self.device_mesh["tensor_parallel"], plan)
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        for layer in (self.embedding, self.norm, self.head):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        tokens, *_ = share(self, batch)
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        loss = F.cross_entropy(logits.flatten(0, 1), (3 * tokens.flatten() + 1) % TOKENS)
        self.losses.append(loss.item())
        return loss


def share(module: L.LightningModule, batch: tuple[Tensor, ...]) -> list[Tensor]:
    """Returns this process's part of a batch; Lightning's sampler would shuffle."""
    parts = getattr(module.trainer.strategy, "distributed_sampler_kwargs", {"num_replicas": 1, "rank": 0})
    return [each[parts["rank"] :: parts["num_replicas"]] for each in batch]


def batches() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    shape = STEPS * BATCH, LENGTH
    tokens = torch.randint(0, TOKENS, shape, generator=generator)
    inputs, factors = (torch.randint(-2, 3, (*shape, WIDTH), generator=generator).float() for _ in range(2))
    return DataLoader(TensorDataset(tokens, inputs, factors), batch_size=BATCH)


class Begun(Callback):
    """Counts batches, and takes the whole weights when all is over."""

    def __init__(self) -> None:
        self.batches = 0
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches += 1

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            self.weights[name] = whole.detach().clone()


def strategy_of(way: Way) -> Strategy | str:
    if way.tensor_parallel is None:
        return way.flag
    if way.layerwise:
        return LayerwiseFSDP2Strategy(tensor_parallel_size=way.tensor_parallel)
    # Lightning's default would make all processes a tensor-parallel group.
    return ModelParallelStrategy(way.processes // way.tensor_parallel, way.tensor_parallel)


def fit(name: str, way: Way, kind: type[Exact] = Exact) -> dict[str, Any]:
    """Trains a few steps; returns the weights and losses, or the error."""
    case, begun = strategy_case(name), Begun()
    torch.manual_seed(0)
    try:
        module = kind(
            optim=case.layerwise if way.layerwise and not case.row.coupled else name,
            lr=case.lr * kind.pace,
            weight_decay=0.1 if case.row.decays else None,
            lr_scheduler=case.schedule,
            optim_args=case.options,
            optim_target_modules="all-linear" if case.projects else None,
        )
        run = trainer(
            max_steps=STEPS,
            strategy=strategy_of(way),
            devices=way.processes,
            use_distributed_sampler=False,
            callbacks=[begun],
        )
        run.fit(module, batches())
    except (ValueError, ImportError) as error:
        return {"error": type(error).__name__, "text": str(error), "batches": begun.batches}
    return {"weights": begun.weights, "losses": module.losses, "batches": begun.batches}


def fits(names: list[str], processes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields what came of every name, by strategy and name."""
    for way in WAYS.values():
        if way.processes == processes:
            for name in names:
                yield f"{way.name}, {name}", fit(name, way)
    for way in GRID if EVERY else ():
        if processes in (1, way.processes):
            for name in GRID_NAMES:
                yield f"{way.name}, {name}", fit(name, ALONE if processes == 1 else way, Transformer)


if __name__ == "__main__":
    size, folder, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(",")
    torch.save(dict(fits(names, size)), folder / f"{size}-rank{RANK}.pt")
