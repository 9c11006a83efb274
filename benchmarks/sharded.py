"""Compares optimizers on sharded parameters (FSDP2) with AdamW: bytes that a step sends, and its time.

Starts two processes with gloo, plain (``ModelParallelStrategy``) and under ``layerwise_fsdp2``. Bytes are counted at
the collectives themselves, in fits of their own. For times, fits of all optimizers take turns in the same processes, a
few steps each, in random order; ratios are taken within rounds, of CPU seconds of both processes. Those of wall-clock
time, which another process disturbs more, stand beside them::

    python benchmarks/sharded.py --output docs/bench              # what docs/sharded.md shows
    python benchmarks/sharded.py adafactor scale                  # of these only
"""

from __future__ import annotations

import argparse
import logging
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import ratios
import torch
from families import Turns
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from processes import RANK, Sent, from_all, say, start
from ratios import Ratio
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import LayerwiseFSDP2Strategy
from lightning_optim.bench import GPT
from lightning_optim.optimizers._base import OwnOptimizer

PROCESSES = 2
AGAINST = "adamw_torch"
OPTIMIZERS = (
    *("scale", "adafactor", "adalomo", "came"),
    *("galore_adamw", "apollo_adamw", "apollo_mini", "muon", "normuon"),
)
# A quarter of the width, as in GaLore's paper.
LOW_RANK = {"optim_target_modules": "all-linear", "optim_args": {"rank": 32}}
OPTIONS: dict[str, dict[str, Any]] = {
    "galore_adamw": LOW_RANK,
    "apollo_adamw": LOW_RANK,
    "apollo_mini": {"optim_target_modules": "all-linear"},
}
# What always steps during backward, by its class steps afterwards.
PLAIN = {"adalomo": "lightning_optim.optimizers.AdaLomo"}
#: By name: the strategy, and what it adds to an optimizer's name.
STRATEGIES: dict[str, tuple[Callable[[], ModelParallelStrategy], str]] = {
    "fsdp2": (partial(ModelParallelStrategy, data_parallel_size=PROCESSES, tensor_parallel_size=1), ""),
    "layerwise_fsdp2": (LayerwiseFSDP2Strategy, "_layerwise"),
}
# A layerwise optimizer is watched in its first three steps; the first of all refreshes subspaces.
WARM_UP = 4
STRETCH = 3  # steps per turn, the first of which warms the caches up
NEAR = 1.1  # what `scale` and `adafactor` must stay below


class Sharded(GPT):
    """The GPT of ``examples/``, every block sharded by itself and then the rest."""

    def configure_model(self) -> None:
        """Shards it."""
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)


class Noting(Callback):
    """Notes what every step has sent."""

    def __init__(self, sent: Sent) -> None:
        self._sent = sent
        self._at: list[dict[str, int]] = []

    @property
    def steps(self) -> list[dict[str, int]]:
        """What each step has sent, from one batch to the next."""
        return [{name: after[name] - before[name] for name in after} for before, after in pairwise(self._at)]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        names = ("gathered", "reduced", "optimizer", "other")
        counted = {name: self._sent.bytes[name] for name in names}
        self._at.append({**counted, "messages": self._sent.messages["optimizer"]})


@contextmanager
def counting_our_steps(sent: Sent) -> Iterator[None]:
    """Inside, what our optimizers send is counted as theirs. Those of torch send nothing."""
    step = OwnOptimizer._step

    def counted(optimizer: OwnOptimizer) -> None:
        with sent.on_behalf_of("optimizer"):
            step(optimizer)

    OwnOptimizer._step = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        OwnOptimizer._step = step  # type: ignore[method-assign]


def fit(
    build: Callable[..., LightningModule], batch: Tensor, optim: str, strategy: str, steps: int, callback: Callback
) -> None:
    """Trains on one batch over and over."""
    make, suffix = STRATEGIES[strategy]
    torch.manual_seed(0)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=PROCESSES,
        strategy=make(),
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    module = build(optim=optim + suffix if suffix else PLAIN.get(optim, optim), lr=1e-4, **OPTIONS.get(optim, {}))
    batches = TensorDataset(batch.expand(steps, *batch.shape))
    trainer.fit(module, DataLoader(batches, batch_size=None))


def count(build: Callable[..., LightningModule], batch: Tensor, optim: str, strategy: str) -> dict[str, Any]:
    """Returns what the process that sends most sends in a step, and what in the first, which finds subspaces."""
    sent = Sent()
    noting = Noting(sent)
    with sent, counting_our_steps(sent):
        fit(build, batch, optim, strategy, WARM_UP + 2, noting)
    first, last = noting.steps[0], noting.steps[-1]
    every = from_all((last, first["optimizer"]))
    most = {name: max(step[name] for step, _ in every) for name in last}
    messages = most.pop("messages")
    return {"bytes": most, "messages": messages, "first_bytes": max(size for _, size in every)}


def clocks() -> Tensor:
    """Returns the wall-clock time and this process's CPU seconds."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def measure(
    build: Callable[..., LightningModule], batch: Tensor, optims: list[str], strategy: str, rounds: int
) -> dict[str, Tensor]:
    """Returns, for each optimizer, ``[rounds, 2]``: a step's wall-clock time, and the CPU seconds of all processes."""
    warm_up = -(-WARM_UP // STRETCH)
    steps = (warm_up + rounds) * STRETCH + 1  # one more, with which the last turn ends
    turns = {optim: Turns(STRETCH, clocks) for optim in optims}
    for optim, turn in turns.items():
        turn.start(partial(fit, build, batch, optim, strategy, steps, turn))
    seconds: dict[str, list[Tensor]] = {optim: [] for optim in optims}
    # The same order in all processes.
    order, names = random.Random(0), list(optims)
    for number in range(warm_up + rounds):
        order.shuffle(names)
        for name in names:
            each = turns[name].take()[1:]
            if number >= warm_up:
                seconds[name].append(torch.stack(each).mean(0))
    for turn in turns.values():
        turn.take()
    own = {optim: torch.stack(each) for optim, each in seconds.items()}
    every = [{optim: each.tolist() for optim, each in found.items()} for found in from_all(own)]
    together = {optim: torch.tensor([found[optim] for found in every], dtype=torch.float64) for optim in optims}
    return {optim: torch.stack([each[..., 0].amax(0), each[..., 1].sum(0)], -1) for optim, each in together.items()}


def records_of(
    build: Callable[..., LightningModule], batch: Tensor, optims: list[str], strategy: str, rounds: int, wall: bool
) -> Iterator[ratios.Record]:
    """Yields a record for each optimizer."""
    sent = {optim: count(build, batch, optim, strategy) for optim in optims}
    seconds = measure(build, batch, optims, strategy, rounds)
    for optim in optims:
        elapsed, worked = (
            Ratio.of(seconds[optim][:, kind].tolist(), seconds[AGAINST][:, kind].tolist()) for kind in (0, 1)
        )
        yield {
            "model": "gpt",
            "optimizer": optim,
            "variant": strategy,
            "against": AGAINST,
            "milliseconds": round(float(seconds[optim][:, 0 if wall else 1].median()) * 1e3, 3),
            "ratio": ratios.as_kept(elapsed if wall else worked),
            "wall_ratio": ratios.as_kept(elapsed),
            **sent[optim],
        }


def as_text(measured: ratios.Record) -> Iterator[str]:
    """Yields the lines of a table per strategy, and what the figures are."""
    for strategy in STRATEGIES:
        own = [record for record in measured["records"] if record["variant"] == strategy]
        fsdp2 = own[0]["bytes"]
        yield f"\n{measured['models']['gpt']}; {strategy}: FSDP2 sends {_size(fsdp2['gathered'])} of gathered "
        yield f"parameters and {_size(fsdp2['reduced'])} of reduced gradients per step and process, whatever steps.\n"
        yield (
            f"{'':<16}{'optimizer sends':>18}{'messages':>10}{'first step':>14}{'ms':>9}"
            f"{f'x {AGAINST}':>24}{'wall-clock time':>22}"
        )
        for one in own:
            yield (
                f"{one['optimizer']:<16}{_size(one['bytes']['optimizer']):>18}{one['messages']:>10}"
                f"{_size(one['first_bytes']):>14}{one['milliseconds']:>9.1f}"
                f"{Ratio(**one['ratio'])!s:>24}{Ratio(**one['wall_ratio'])!s:>22}"
            )
    yield ""
    for strategy in STRATEGIES:
        for one in measured["records"]:
            if one["variant"] == strategy and one["optimizer"] in ("scale", "adafactor"):
                kept = "PASS" if one["ratio"]["median"] <= NEAR else "MISSED"
                yield f"{kept:<8}{one['optimizer']} under {strategy} takes at most {NEAR} of {AGAINST}'s time"
    yield "\n" + ratios.legend(measured)


def _size(count: int) -> str:
    return f"{count / 1024:,.1f} KiB"


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("optimizers", nargs="*", metavar="OPTIMIZER", help=f"(default: {', '.join(OPTIMIZERS)})")
    parser.add_argument("--rounds", type=int, default=21, help="of all optimizers (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: whether it runs")
    ratios.add_options(parser)
    arguments = parser.parse_args()
    start(PROCESSES)
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)

    sizes = {"layers": 1, "width": 64, "heads": 2} if arguments.quick else {}
    build: Callable[..., LightningModule] = partial(Sharded, **sizes)
    batch = torch.randint(
        0, 256, (2, 9) if arguments.quick else (8, 129), generator=torch.Generator().manual_seed(RANK)
    )
    optims = [AGAINST, *(name for name in arguments.optimizers or OPTIMIZERS if name != AGAINST)]
    rounds = 2 if arguments.quick else arguments.rounds
    records: list[ratios.Record] = []
    for strategy in STRATEGIES:
        records += records_of(build, batch, optims, strategy, rounds, arguments.wall)
        say(*(f"{strategy}, {one['optimizer']}: {Ratio(**one['ratio'])}" for one in records[-len(optims) :]))
    measured = ratios.report(records, arguments.wall)
    if not arguments.wall:
        measured["time"] = "CPU seconds of both processes"
    parameters = [parameter.numel() for parameter in build(optim="sgd", lr=1.0).parameters()]
    tokens = batch.shape[0] * (batch.shape[1] - 1)
    measured["models"] = {
        "gpt": f"gpt, {len(parameters)} tensors, {sum(parameters):,} elements, {tokens} tokens per process"
    }
    measured["processes"] = f"{PROCESSES}, gloo"
    say(*as_text(measured))
    if RANK == 0:
        ratios.finish(measured, arguments, "sharded")


if __name__ == "__main__":
    main()
