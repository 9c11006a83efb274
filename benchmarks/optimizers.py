"""Compares the optimizers that we own with those they stand in for, side by side in one process, on CPU.

A round takes a few steps with every optimizer, in random order, so that a machine's drift hits all alike. Upstream
packages that are missing are left out, with the commands that install them::

    python benchmarks/optimizers.py           # training takes most of the time
    python benchmarks/optimizers.py --fast    # one round, no training

``--output FOLDER`` writes ``optimizers.json`` there, from which ``make figures`` makes tables of the pages.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from optimizers_upstream import DISTRIBUTIONS, Load, Pair, Running, adamw, pairs

from lightning_optim.bench._run import machine
from lightning_optim.optimizers._projection import find_bases
from lightning_optim.stepping import alone

PACKAGES = ("transformers", "grokadamw")
SMALL_SIDE, SMALL_RANK = 32, 8
IMPORTS = """
import importlib, os, sys, time
_, before, *modules = sys.argv
start = time.perf_counter()
importlib.import_module(before)
print(before, time.perf_counter() - start, flush=True)
for module in modules:
    if os.fork():
        os.wait()
        continue
    start = time.perf_counter()
    importlib.import_module(module)
    print(module, time.perf_counter() - start, flush=True)
    os._exit(0)
"""

T = TypeVar("T")

Seconds = dict[str, list[float]]  # of each round, by what took them


@dataclass(frozen=True)
class Ratio:
    """The quartiles of the ratios within rounds: one of medians would mix rounds in which the machine was not alike."""

    low: float
    value: float
    high: float

    @classmethod
    def of(cls, mine: list[float], other: list[float]) -> Ratio:
        """Compares seconds of the same rounds."""
        each = [one / two for one, two in zip(mine, other, strict=True)]
        return cls(*(statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3))

    def __str__(self) -> str:
        return f"{self.value:>9.2f}{f'{self.low:.2f} - {self.high:.2f}':>17}"


@dataclass
class Target:
    """What should hold, and whether it does; ``None`` if it could not be measured."""

    text: str
    met: bool | None

    def __str__(self) -> str:
        return f"{'SKIPPED' if self.met is None else 'PASS' if self.met else 'MISSED':<9}{self.text}"


# Steps.


def measure_steps(load: Load, rounds: int, steps: int) -> Seconds:
    """Takes a few steps of each optimizer per round, the first of which warms the caches up and does not count."""
    running: dict[str, Running] = {f"AdamW {backward}": adamw(backward)(load) for backward in (False, True)}
    for pair in pairs():
        running.update({f"{pair.name} {who}": build(load) for who, build in pair.builders()})
    seconds: Seconds = {name: [] for name in running}
    order, names = random.Random(0), list(running)
    for number in range(-1, rounds):
        order.shuffle(names)
        for name in names:
            each = [timed(running[name].step)[0] for _ in range(1 + steps)]
            if number >= 0:  # the first round makes the states
                seconds[name].append(statistics.median(each[1:]))
    return seconds


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """Returns the seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def against_adamw(pair: Pair, seconds: Seconds) -> Ratio | None:
    """Returns the time of our step in units of AdamW's."""
    mine = seconds.get(f"{pair.name} ours")
    return Ratio.of(mine, seconds[f"AdamW {pair.backward}"]) if mine else None


def against_upstream(pair: Pair, seconds: Seconds) -> Ratio | None:
    """Returns the time of our step in units of the upstream one."""
    mine, other = (seconds.get(f"{pair.name} {who}") for who in ("ours", "upstream"))
    return Ratio.of(mine, other) if mine and other else None


def print_steps(load: Load, seconds: Seconds) -> None:
    """Prints a row per optimizer."""
    print(f"\nStep: {load}\n")
    columns = ("ms/step", "x AdamW", "(quartiles)", "x upstream", "(quartiles)", "upstream")
    print("{:<20}{:>10}{:>9}{:>17}{:>11}{:>17}  {}".format("optimizer", *columns))
    for backward in (False, True):
        name = "AdamW (foreach)" + (" *" if backward else "")
        print(f"{name:<20}{milliseconds(seconds[f'AdamW {backward}']):>10}")
        for pair in pairs():
            ratio = against_adamw(pair, seconds)
            if pair.backward is not backward or ratio is None:
                continue
            upstream = against_upstream(pair, seconds)
            name = pair.name + (" *" if backward else "")
            print(
                f"{name:<20}{milliseconds(seconds[f'{pair.name} ours']):>10}{ratio}"
                f"{'  ' + str(upstream) if upstream else '-':>28}  {pair.note()}",
                flush=True,
            )


def milliseconds(seconds: list[float]) -> str:
    """Returns the median for a table."""
    return f"{statistics.median(seconds) * 1e3:.2f}"


# Projections, states, imports.


def measure_refresh(side: int, rank: int, repeats: int) -> tuple[float, dict[str, float]]:
    """Prints what finding a projection costs and loses.

    Returns:
        Its time in units of the exact decomposition, and the captured energy in units of what the exact directions
        capture, by spectrum.
    """
    print(f"\nProjection of one matrix of {side}x{side}, rank {rank}: randomized against torch.linalg.svd\n")
    flat = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    falling = flat * torch.arange(1, side + 1).rsqrt()  # singular values fall, as those of gradients do
    mine: list[float] = []
    exact: list[float] = []
    energies: dict[str, float] = {}
    for name, matrix in (("falling spectrum", falling), ("flat spectrum", flat)):
        for _ in range(repeats):
            seconds, bases = timed(lambda matrix=matrix: alone(find_bases(matrix, rank, "randomized")))
            mine.append(seconds)
        seconds, (_, values, _) = timed(partial(torch.linalg.svd, matrix, full_matrices=False))
        exact.append(seconds)
        captured = (matrix @ bases["right"]).square().sum() / values[:rank].square().sum()
        energies[name] = captured.item()
        print(f"{name:<20}{energies[name]:.2%} of the energy that the exact directions capture", flush=True)
    times = statistics.median(exact) / statistics.median(mine), min(exact) / max(mine), max(exact) / min(mine)
    print("{:<20}1/{:.1f} of the exact decomposition (1/{:.1f} - 1/{:.1f})".format("time", *times))
    return 1 / times[0], energies


def print_states(side: int, rank: int) -> None:
    """Prints bytes of state per element of a matrix."""
    load = Load(1, side, rank)
    print(f"\nState: bytes per element of {load}\n")
    print(f"{'optimizer':<20}{'ours':>10}{'upstream':>10}")
    for pair in pairs():
        sizes = {}
        for who, build in pair.builders():
            running = build(load)
            running.step()
            sizes[who] = f"{running.state_bytes() / side**2:.4f}"
        print(f"{pair.name:<20}{sizes.get('ours', '-'):>10}{sizes.get('upstream', '-'):>10}  {pair.note()}", flush=True)


def print_imports(repeats: int) -> None:
    """Prints what imports cost."""
    print("\nImport: ms beyond `import lightning_optim` (ours) and `import torch` (upstream)\n")
    print(f"{'optimizer':<20}{'ours':>10}{'upstream':>10}")
    measured = [pair for pair in pairs() if not pair.needs or find_spec(pair.needs)]
    own = {pair.module for pair in measured}
    others = {pair.upstream_module for pair in measured if pair.package and find_spec(pair.package)}
    seconds = measure_imports("lightning_optim", own, repeats) | measure_imports("torch", others, repeats)
    for pair in measured:
        cells = [
            milliseconds(seconds[name]) if name in seconds else "-" for name in (pair.module, pair.upstream_module)
        ]
        print(f"{pair.name:<20}{cells[0]:>10}{cells[1]:>10}  {pair.note()}", flush=True)
    whole = measure_imports("lightning.pytorch", {"lightning_optim"}, repeats)
    ours, lightning = whole["lightning_optim"], whole["lightning.pytorch"]
    part = Ratio.of(ours, lightning).value
    print(f"{'lightning_optim':<20}{milliseconds(ours):>10}{'-':>10}  {part:.3f} of `import lightning.pytorch`")


def measure_imports(before: str, modules: set[str], repeats: int) -> Seconds:
    """Returns the seconds of one import, and of others after it, each in a fork of a process that did only that."""
    seconds: Seconds = {module: [] for module in (before, *modules)}
    command = [sys.executable, "-W", "ignore", "-c", IMPORTS, before, *sorted(modules)]
    for _ in range(repeats):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            name, _, figure = line.rpartition(" ")
            if name in seconds:
                seconds[name].append(float(figure))
    return seconds


# Convergence.


def measure_convergence(steps: int, seeds: int) -> list[tuple[float, float]] | None:
    """Trains with both projections; returns the ratios of their losses in training and validation, by seed."""
    if not find_spec("jsonargparse"):
        print("\nConvergence is left out: the GPT of examples/ needs pip install 'lightning-optim[cli]'")
        return None
    from optimizers_convergence import AVERAGED, GAP, RANK, train

    print(
        f"\nConvergence: the GPT of examples/, {steps} steps, galore_adamw, rank {RANK}, projected anew every {GAP}\n"
    )
    columns = [name for loss in ("train", "val") for name in (f"{loss} svd", f"{loss} randomized", "ratio")]
    print(f"{'seed':<6}" + "".join(f"{name:>18}" for name in columns))
    ratios = []
    for seed in range(seeds):
        exact, randomized = (train(projection, seed, steps) for projection in ("svd", "randomized"))
        ratios.append((randomized.train / exact.train, randomized.val / exact.val))
        cells = (exact.train, randomized.train, ratios[-1][0], exact.val, randomized.val, ratios[-1][1])
        print(f"{seed:<6}" + "".join(f"{cell:>18.4f}" for cell in cells), flush=True)
    means = [statistics.fmean(each) for each in zip(*ratios, strict=True)]
    print(f"mean ratio: training loss (last {AVERAGED} steps) {means[0]:.4f}, validation loss {means[1]:.4f}")
    return ratios


# Targets.


def step_targets(small: Seconds, large: Seconds) -> list[Target]:
    """Returns the targets of the steps' times."""
    named = {pair.name: pair for pair in pairs()}
    targets = []
    for name in ("GaLoreAdamW", "AnyPrecisionAdamW"):
        ratio = against_adamw(named[name], small)
        assert ratio is not None, "these need no package"
        text = f"small matrices: {name} takes {ratio.value:.2f} of AdamW(foreach=True) (target: at most 1.5)"
        targets.append(Target(text, ratio.value <= 1.5))
    for name, at_least, size, seconds in (
        ("GaLoreAdamW", 1.0, "large matrix", large),
        ("GrokAdamW", 3.0, "small matrices", small),
        ("ApolloAdamW", 2.0, "small matrices", small),
    ):
        ratio = against_upstream(named[name], seconds)
        if ratio is None:
            targets.append(Target(f"{size}: {name} against {named[name].package} ({named[name].note()})", None))
            continue
        faster = 1 / ratio.value
        text = f"{size}: {name} is {faster:.2f} times as fast as {named[name].note()} (target: at least {at_least:g})"
        targets.append(Target(text, faster >= at_least))
    return targets


def print_targets(targets: list[Target], refresh: float, convergence: list[tuple[float, float]] | None) -> None:
    """Prints whether the targets are met."""
    text = f"a randomized projection takes 1/{1 / refresh:.1f} of an exact decomposition (target: at most 1/20)"
    targets.append(Target(text, refresh <= 1 / 20))
    text = "losses with the randomized projection (left out)"
    worse = convergence and max(map(statistics.fmean, zip(*convergence, strict=True)))
    if worse is not None:
        text = f"losses with it are {worse:.4f} of those with the exact one (target: at most 1.01, mean of seeds)"
    targets.append(Target(text, None if worse is None else worse <= 1.01))
    print("\nTargets:", *targets, sep="\n")


def print_legend(threads: int) -> None:
    """Prints what the columns mean, and where this ran."""
    print(
        """
ms/step     median of the rounds' medians; with * the backward included, in which lomo-optim and our layerwise engine
            step, and after which AdamW does
x AdamW     time in units of torch.optim.AdamW(foreach=True), median and quartiles of the ratios within rounds
x upstream  the same to the upstream package's class: below 1 ours is faster
state       with projections, wherever it is kept; ours keeps APOLLO's as a seed, and one matrix per shape besides
Projections are found before the steps that are timed; galore-torch is given ours.
"""
    )
    there = measured_on()
    print(f"wall-clock time, {threads} thread(s) on {there['cores']} CPU cores ({there['device']})")
    print(", ".join(f"{name} {version}" for name, version in there["versions"].items()))


def measured_on() -> dict[str, Any]:
    """Returns the hardware and the versions, those of what is compared, too."""
    there = machine()
    for name in (*PACKAGES, *DISTRIBUTIONS.values()):
        if find_spec(name.replace("-", "_")):
            there["versions"][name] = importlib.metadata.version(name)
    return there


def as_kept(load: Load, seconds: Seconds) -> dict[str, Any]:
    """Returns the ratios of a load's steps, by optimizer."""
    ratios = {
        pair.name: {"adamw": against_adamw(pair, seconds), "upstream": against_upstream(pair, seconds)}
        for pair in pairs()
    }
    kept = {
        name: {against: [ratio.low, ratio.value, ratio.high] if ratio else None for against, ratio in each.items()}
        for name, each in ratios.items()
    }
    return {"load": str(load), "ratios": kept}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="rounds of all optimizers (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of projections and imports (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's (default: %(default)s, all cores)")
    parser.add_argument("--count", type=int, default=200, help="small matrices (default: %(default)s)")
    parser.add_argument("--side", type=int, default=4096, help="of the large matrix (default: %(default)s)")
    parser.add_argument("--fast", action="store_true", help="one round of all, no training")
    parser.add_argument(
        "--imports", action=argparse.BooleanOptionalAction, default=True, help="time imports (default: %(default)s)"
    )
    parser.add_argument("--convergence", action="store_true", help="train even so")
    parser.add_argument("--steps", type=int, default=250, help="of a training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings per projection (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for optimizers.json")
    arguments = parser.parse_args()
    if arguments.fast:
        arguments.rounds, arguments.repeats = 1, 1
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")  # about workers, LeafSpec, and grokadamw's autocast for CUDA
    logging.disable(logging.WARNING)  # grokadamw configures logging

    small = Load(arguments.count, SMALL_SIDE, SMALL_RANK)
    large = Load(1, arguments.side, min(128, arguments.side // 4))
    measured = []
    for load, steps in ((small, 10), (large, 2)):
        measured.append(measure_steps(load, arguments.rounds, steps))
        print_steps(load, measured[-1])
    refresh, energies = measure_refresh(large.side, large.rank, arguments.repeats)
    print_states(min(1024, arguments.side), large.rank)
    if arguments.imports:
        print_imports(arguments.repeats)
    convergence = None
    if arguments.convergence or not arguments.fast:
        convergence = measure_convergence(arguments.steps, arguments.seeds)
    print_legend(arguments.threads)
    print_targets(step_targets(*measured), refresh, convergence)
    if arguments.output:
        kept = {
            "command": "python benchmarks/optimizers.py",
            "rounds": arguments.rounds,
            "machine": measured_on(),
            "small": as_kept(small, measured[0]),
            "large": as_kept(large, measured[1]),
            "refresh": refresh,
            "captured": energies,
            "convergence": convergence,
        }
        (arguments.output / "optimizers.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
