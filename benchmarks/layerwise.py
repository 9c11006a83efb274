"""Compares stepping layer by layer with plain steps, in time and memory, side by side in one process.

A round takes a few steps of every variant in random order, so that a machine's drift hits all alike; ratios are taken
within rounds. Nothing but torch is needed; Hugging Face's Trainer joins in where it is installed::

    python benchmarks/layerwise.py --rounds 20 --steps 8
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import platform
import random
import statistics
import time
import warnings
from dataclasses import replace
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read once, when torch is imported

import torch
from layerwise_variants import Block, Net, Row, Task, ViT, missing, rows_of
from torch import Tensor, nn
from torch.optim import Adam
from torch.profiler import ProfilerActivity, profile


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
    run(2)  # the state of the optimizer is there after that
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


def ratios(row: Row, baseline: Row) -> tuple[float, float, float]:
    """Returns the quartiles of the time ratio, the median in the middle."""
    each = [mine / other for mine, other in zip(row.seconds, baseline.seconds, strict=True)]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return low, middle, high


# What is printed.


def print_table(task: Task, rows: list[Row]) -> None:
    """Prints one row per variant."""
    parameters = [p.numel() for p in task.build().parameters()]
    print(f"\n{task.name}: {len(parameters)} parameters, {sum(parameters):,} elements, {task.optimizer.__name__}\n")
    form = "{:<37}{:>9}{:>8}{:>8}{:>14}{:>12}{:>10}{:>10}"
    columns = ("ms/step", "x plain", "x own", "(quartiles)", "live KiB", "bound", "peak KiB")
    print(form.format("variant", *columns))
    named = {row.name: row for row in rows}
    for row in rows:
        low, own, high = ratios(row, named[row.baseline])
        (_, all_alike, _), milliseconds = ratios(row, rows[0]), statistics.median(row.seconds) * 1e3
        bound = "-" if row.bucket is None else f"{(row.bucket + row.largest) / 1024:,.0f}"
        peak = f"{row.peak / 1024:,.0f}" if row.peak else "-"
        times = (f"{milliseconds:.2f}", f"{all_alike:.2f}", f"{own:.2f}", f"{low:.2f} - {high:.2f}")
        print(form.format(row.name, *times, f"{row.live / 1024:,.0f}", bound, peak))
    if task.trainers and missing():
        print(f"Hugging Face's Trainer is left out; it needs: pip install --no-deps {' '.join(missing())}")


def print_legend(device: torch.device, cpu_time: bool) -> None:
    """Prints what the columns mean, and where this ran."""
    source = "CUDA's allocator" if device.type == "cuda" else "the profiler's memory events"
    print(
        f"""
ms/step   forward, backward and optimizer step, median of the rounds' medians
x plain   time in units of the first row, median of the ratios within rounds
x own     the same in units of the plain row with the same kernel, or of the same Trainer
live      the most bytes of gradients alive at any moment of a backward, summed in a hook at every gradient
bound     one bucket and the largest gradient
peak      what a step allocates beyond parameters and state, activations included, by {source}
"""
    )
    names = ("torch", "lightning", "lightning-optim", "transformers", "accelerate", "galore-torch")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names if find_spec(name.replace("-", "_"))]
    gpu = f", {torch.cuda.get_device_name()}" if device.type == "cuda" else ""
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    print("CPU seconds of this process" if cpu_time else "wall-clock time", end=", ")
    print(f"{threads} thread(s) on {os.cpu_count()} CPU cores ({platform.machine()}, {capability}){gpu}")
    print(f"Python {platform.python_version()}, {', '.join(versions)}")


def print_targets(rows: list[Row]) -> None:
    """Prints whether the targets are met on the deep narrow model."""
    named = {row.name: row for row in rows}
    default, plain, hooks = (
        named[name] for name in ("layerwise default foreach", "plain foreach", "per parameter in hooks")
    )
    cost, gain = ratios(default, plain)[1], ratios(hooks, default)[1]
    within = all(row.live <= row.bucket + row.largest for row in rows if row.bucket is not None)
    print("\nTargets, on the deep narrow model:")
    for met, text in (
        (cost <= 1.15, f"the default bucket takes {cost:.2f} of the plain step (target: at most 1.15)"),
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
    parser.add_argument("--threads", type=int, default=1, help="torch's; one is steadier (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="count this process's CPU seconds: on a busy machine")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round: whether it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.steps = 1, 2
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")  # about workers, logging and GaLore's deprecated AdamW
    logging.disable(logging.WARNING)

    device, measured = torch.device(arguments.device), []
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    for model in tasks_for(device, arguments.quick):
        task = replace(model, clock=clock)
        rows = rows_of(task)
        for row in rows:
            measure_memory(task, row)
        measure_time(task, rows, arguments.rounds, arguments.steps)
        print_table(task, rows)
        measured.append(rows)
    print_legend(device, arguments.cpu_time)
    print_targets(measured[0])


if __name__ == "__main__":
    main()
