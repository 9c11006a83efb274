"""Compares stepping layer by layer with plain steps, in time and memory, side by side in one process.

A round takes a few steps of every variant in random order, so that a machine's drift hits all alike; ratios are taken
within rounds. Hugging Face's Trainer joins in where it is installed. Times are CPU seconds of this process, on a GPU
wall-clock time::

    python benchmarks/layerwise.py --rounds 20 --steps 8
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import random
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read once, when torch is imported

import ratios
import torch
from layerwise_variants import Block, Net, Row, Task, ViT, missing, rows_of
from ratios import Ratio
from torch import Tensor, nn
from torch.optim import Adam
from torch.profiler import ProfilerActivity, profile

from lightning_optim.layerwise._coupled import WATCHED_STEPS


def measure_memory(task: Task, row: Row) -> None:
    """Measures gradient bytes in a hook that comes before the variant's own, and what a step allocates."""

    def build() -> nn.Module:
        model = task.build()
        parameters = list(model.parameters())

        def hook(_: Tensor) -> None:
            row.live = max(row.live, sum(nbytes(p.grad) for p in parameters if p.grad is not None))

        for parameter in parameters:
            register: Any = parameter.register_post_accumulate_grad_hook
            register(hook)
        row.largest = max(map(nbytes, parameters))
        return model

    run = row.variant(replace(task, build=build))
    run(WATCHED_STEPS)  # in which the state of the optimizer is made, and copies of it are kept for comparison
    if "plain" not in row.baseline:
        return  # a Trainer allocates much else, and builds the optimizer's state anew
    if task.batch.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(1)
        row.peak = torch.cuda.max_memory_allocated() - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(1)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    row.peak = max(accumulate(event.nbytes() for event in events))


def nbytes(tensor: Tensor) -> int:
    """Returns the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def measure_time(task: Task, rows: list[Row], rounds: int, steps: int) -> None:
    """Takes a few steps of each variant per round; the first one in a round warms the caches up and does not count."""
    runs = [(row, row.variant(task)) for row in rows]
    order = random.Random(0)
    for number in range(-1, rounds):
        order.shuffle(runs)
        for row, run in runs:
            seconds = statistics.median(run(1 + steps)[1:])
            if number >= 0:  # the first round makes the state of the optimizers
                row.seconds.append(seconds)


# What is kept and printed.


def records_of(task: Task, rows: list[Row]) -> Iterator[ratios.Record]:
    """Yields a record per variant."""
    named = {row.name: row for row in rows}
    for row in rows:
        yield {
            "model": task.name,
            "optimizer": task.optimizer.__name__,
            "variant": row.name,
            "against": row.baseline,
            "milliseconds": round(statistics.median(row.seconds) * 1e3, 3),
            "of_plain": ratios.as_kept(Ratio.of(row.seconds, rows[0].seconds)),
            "ratio": ratios.as_kept(Ratio.of(row.seconds, named[row.baseline].seconds)),
            "live_bytes": row.live,
            "bound_bytes": None if row.bucket is None else row.bucket + row.largest,
            "peak_bytes": row.peak or None,
        }


def as_text(measured: ratios.Record) -> Iterator[str]:
    """Yields the lines of a table per model, and what the figures are."""
    form = "{:<37}{:>9}{:>21}{:>21}{:>10}{:>10}{:>10}"
    for model, described in measured["models"].items():
        yield f"\n{described}\n"
        yield form.format("variant", "ms/step", "x plain", "x own", "live KiB", "bound", "peak KiB")
        for one in measured["records"]:
            if one["model"] == model:
                sizes = (kibibytes(one[f"{name}_bytes"]) for name in ("live", "bound", "peak"))
                times = (f"{one['milliseconds']:.2f}", str(Ratio(**one["of_plain"])), str(Ratio(**one["ratio"])))
                yield form.format(one["variant"], *times, *sizes)
    source = "CUDA's allocator" if torch.cuda.is_available() else "the profiler's memory events"
    yield f"""
ms/step   forward, backward and optimizer step, median of the rounds' medians
x plain   time in units of the first row
x own     the same in units of the plain row with the same kernel, or of the same Trainer
live      the most bytes of gradients alive at any moment of a backward, summed in a hook at every gradient
bound     one bucket and the largest gradient
peak      what a step allocates beyond what it found, activations included, by {source}
"""
    yield ratios.legend(measured)


def kibibytes(size: int | None) -> str:
    """Returns a size for a table."""
    return "-" if size is None else f"{size / 1024:,.0f}"


def print_targets(rows: list[Row]) -> None:
    """Prints whether the targets are met on the deep narrow model."""
    named = {row.name: row for row in rows}
    default, plain = named["layerwise default foreach"], named["plain foreach"]
    by_hand, hooks = named["default buckets by hand"], named["per parameter in hooks"]
    pairs = ((default, plain), (default, by_hand), (hooks, default))
    cost, own, gain = (Ratio.of(one.seconds, other.seconds).median for one, other in pairs)
    within = all(row.live <= row.bucket + row.largest for row in rows if row.bucket is not None)
    print("\nTargets, on the deep narrow model:")
    for met, text in (
        (cost <= 1.15, f"the default bucket takes {cost:.2f} of the plain step (target: at most 1.15)"),
        (own <= 1.05, f"it takes {own:.2f} of such buckets written by hand (target: at most 1.05)"),
        (gain >= 1.4, f"it is {gain:.2f} times faster than stepping per parameter (target: at least 1.4)"),
        (within, "live gradients are within one bucket and the largest gradient"),
    ):
        print(f"{'PASS' if met else 'MISS'}  {text}")


def tasks_for(device: torch.device, quick: bool) -> list[Task]:
    """Returns the models to train."""

    def deep() -> nn.Module:
        return Net(nn.Sequential(*(Block(96) for _ in range(8 if quick else 49))), 96).to(device)

    size = 128 if quick else 1024

    def wide() -> nn.Module:
        layers = (nn.Linear(size, size), nn.GELU(), nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
        return Net(nn.Sequential(*layers), size).to(device)

    def batch(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    tasks = [
        Task("deep and narrow", deep, batch(16, 96), buckets_mb=(0.5, 0.25, 0.125, 0.0625), trainers=True),
        Task("wide", wide, batch(16, size), buckets_mb=(4.0,)),
    ]
    if device.type == "cuda" and not quick:
        tasks.append(Task("ViT-L/16", lambda: ViT().to(device), batch(16, 3, 224, 224), Adam, (256.0, 128.0, 8.0)))
    return tasks


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="rounds of all variants (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps per variant and round (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round: whether it runs")
    ratios.add_options(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.steps = 1, 2
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")  # about workers, logging and GaLore's deprecated AdamW
    logging.disable(logging.WARNING)

    device, all_rows, records, models = torch.device(arguments.device), [], [], {}
    for model in tasks_for(device, arguments.quick):
        task = replace(model, clock=ratios.clock(arguments.wall))
        rows = rows_of(task)
        for row in rows:
            measure_memory(task, row)
        measure_time(task, rows, arguments.rounds, arguments.steps)
        sizes = [p.numel() for p in task.build().parameters()]
        models[task.name] = f"{task.name}: {len(sizes)} tensors, {sum(sizes):,} elements, {task.optimizer.__name__}"
        records += records_of(task, rows)
        all_rows.append(rows)
    measured = ratios.report(records, arguments.wall)
    measured["models"] = models
    for name in ("transformers", "galore-torch"):
        if find_spec(name.replace("-", "_")):
            measured["machine"]["versions"][name] = importlib.metadata.version(name)
    print(*as_text(measured), sep="\n")
    if missing():
        print(f"Hugging Face's Trainer is left out; it needs: pip install --no-deps {' '.join(missing())}")
    print_targets(all_rows[0])
    ratios.finish(measured, arguments, "layerwise")


if __name__ == "__main__":
    main()
