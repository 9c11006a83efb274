"""The order of the measurements: memory first, then rounds in which every optimizer trains once."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lightning_optim import __version__
from lightning_optim.bench._candidates import Candidate
from lightning_optim.bench._records import Records
from lightning_optim.bench._trial import Judgement, measure_memory, quiet, train
from lightning_optim.bench._workload import Workload
from lightning_optim.errors import InvalidOption

TRIALS = "trials.jsonl"
#: The seed with which learning rates are compared. Those that judge are others: of several rates the one that wins with
#: a seed owes some of that to the seed.
CHOOSING_SEED = 0
_FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Comparison:
    """What is compared, and at what expense.

    Attributes:
        workload: What is trained.
        candidates: The optimizers; the first is the reference.
        steps: Optimizer steps per trial, which is the length of its schedule.
        rates: How many learning rates each optimizer tries; an odd number, so that its default is among them.
        seeds: How many trainings at the best of them are judged.
        judgement: By what.
        output: The folder of the file of finished trials.
        left_out: Optimizers that do not take part, with the reasons.
    """

    workload: Workload
    candidates: tuple[Candidate, ...]
    steps: int
    rates: int
    seeds: int
    judgement: Judgement
    output: Path
    left_out: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InvalidOption(f"--steps {self.steps} is no training; give 1 or more", code="LO907")
        if self.rates < 1 or self.rates % 2 == 0:
            raise InvalidOption(
                f"--lrs {self.rates}: give an odd number such as 3, so that the default learning rate is in the middle",
                code="LO907",
            )
        if self.seeds < _FEWEST_SEEDS:
            raise InvalidOption(
                f"--seeds {self.seeds}: an interval needs at least {_FEWEST_SEEDS}; from fewer it is too wide to tell "
                "anything",
                code="LO907",
            )
        if len(self.candidates) < 2:
            raise InvalidOption(
                f"one optimizer alone ({self.candidates[0].label}) cannot be compared; name two or more, the "
                "reference first",
                code="LO907",
            )

    @property
    def request(self) -> dict[str, Any]:
        """What decides a trial's outcome besides optimizer, learning rate and seed, as plain values."""
        own = self.workload.own
        return {
            "workload": self.workload.name,
            "steps": self.steps,
            "metric": self.judgement.metric,
            "maximize": self.judgement.maximize,
            "shared": dict(self.workload.shared),
            "config": own and {"optim": own.optim, "lr": own.lr, "optim_args": own.optim_args},
            "facts": dict(self.workload.facts),
            "machine": machine(),
        }

    @property
    def total_steps(self) -> int:
        """The steps of all trials."""
        return len(self.candidates) * (self.rates + self.seeds) * self.steps


def machine() -> dict[str, Any]:
    """Returns what computes: hardware, threads and versions."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        device = _processor()
    elif accelerator.type == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = accelerator.type
    packages = ("torch", "lightning", "bitsandbytes", "torchao", "torch-optimi", "schedulefree")
    versions = {"python": platform.python_version(), "lightning_optim": __version__}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "versions": versions}


def _processor() -> str:
    """Returns the CPU's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{next(named, platform.machine())} ({platform.machine()}, {capability})"


class Measurements:
    """Takes what a comparison needs, and keeps what is there already.

    Args:
        comparison: What to measure.

    Raises:
        InvalidOption: If the output folder holds measurements of another request.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self._records = Records(comparison.output / TRIALS, comparison.request)

    def take(self, progress: bool | None = None) -> None:
        """Measures what is missing; each result is on the disk before the next begins.

        Args:
            progress: Whether a bar is drawn; ``None`` draws one on a terminal.
        """
        comparison = self.comparison
        # What is there takes no time, and tells nothing of how much the rest will take.
        bar = tqdm(
            total=comparison.total_steps,
            initial=self.finished() * comparison.steps,
            unit="step",
            disable=None if progress is None else not progress,
        )
        with bar, quiet():
            for candidate in comparison.candidates:
                if self.memory(candidate) is None:
                    bar.set_description(f"{candidate.label}, memory")
                    found = measure_memory(comparison.workload, candidate.config)
                    self._records.append({"kind": "memory", "optimizer": candidate.label, **found})
            for number in range(comparison.rates):
                for candidate in self._shuffled(f"rate {number}"):
                    rate = candidate.rates(comparison.rates)[number]
                    self._train(bar, candidate, rate, CHOOSING_SEED)
            for seed in self.judging_seeds():
                for candidate in self._shuffled(f"seed {seed}"):
                    best = self.best_rate(candidate)
                    if best is None:
                        bar.update(comparison.steps)
                    else:
                        self._train(bar, candidate, best, seed)

    def _train(self, bar: Any, candidate: Candidate, rate: float, seed: int) -> None:
        comparison = self.comparison
        if self.trial(candidate, rate, seed) is not None:
            return
        bar.set_description(f"{candidate.label}, lr {rate:g}, seed {seed}")
        config = candidate.config.replace(lr=rate)
        before = bar.n
        step: Callable[[], Any] = bar.update
        found = train(comparison.workload, config, seed, comparison.steps, comparison.judgement, step)
        self._records.append({"kind": "trial", "optimizer": candidate.label, "lr": rate, "seed": seed, **found})
        bar.update(comparison.steps - (bar.n - before))

    def _shuffled(self, round_name: str) -> list[Candidate]:
        """Returns the optimizers in another order each round, so that a machine's drift favours none."""
        order = list(self.comparison.candidates)
        random.Random(round_name).shuffle(order)
        return order

    def memory(self, candidate: Candidate) -> dict[str, Any] | None:
        """Returns the bytes that were measured, or ``None`` if that is still to be done."""
        return self._records.find(kind="memory", optimizer=candidate.label)

    def trial(self, candidate: Candidate, rate: float, seed: int) -> dict[str, Any] | None:
        """Returns a finished trial, or ``None``."""
        return self._records.find(kind="trial", optimizer=candidate.label, lr=rate, seed=seed)

    def judging_seeds(self) -> range:
        """Returns the seeds of the trials that are judged."""
        return range(CHOOSING_SEED + 1, CHOOSING_SEED + 1 + self.comparison.seeds)

    def tried(self, candidate: Candidate) -> dict[float, dict[str, Any] | None]:
        """Returns the trials that chose the learning rate, by rate."""
        rates = candidate.rates(self.comparison.rates)
        return {rate: self.trial(candidate, rate, CHOOSING_SEED) for rate in rates}

    def best_rate(self, candidate: Candidate) -> float | None:
        """Returns the learning rate that did best; ``None`` if all failed or not all have been tried."""
        tried = self.tried(candidate)
        if any(trial is None for trial in tried.values()):
            return None
        values = {rate: trial["value"] for rate, trial in tried.items() if trial and trial["value"] is not None}
        best = max if self.comparison.judgement.maximize else min
        return best(values, key=values.__getitem__) if values else None

    def judged(self, candidate: Candidate) -> dict[int, dict[str, Any]]:
        """Returns the finished trials at the best learning rate, by seed."""
        rate = self.best_rate(candidate)
        if rate is None:
            return {}
        found = ((seed, self.trial(candidate, rate, seed)) for seed in self.judging_seeds())
        return {seed: trial for seed, trial in found if trial is not None}

    def rounds(self, candidate: Candidate) -> Iterator[dict[str, Any] | None]:
        """Yields a trial per round, ``None`` where it failed or is missing; all optimizers have as many rounds."""
        for trial in self.tried(candidate).values():
            yield trial if trial and trial.get("step_seconds") else None
        judged = self.judged(candidate)
        for seed in self.judging_seeds():
            trial = judged.get(seed)
            yield trial if trial and trial.get("step_seconds") else None

    def finished(self) -> int:
        """Returns how many trials are done."""
        return sum(
            sum(trial is not None for trial in self.tried(one).values()) + len(self.judged(one))
            for one in self.comparison.candidates
        )
