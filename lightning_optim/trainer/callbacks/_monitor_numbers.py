"""Makes numbers of what was noted of an optimizer's steps: the one place where the monitor waits for the device."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics import Metric

from lightning_optim.optimizers import LowRankOptimizer
from lightning_optim.trainer.callbacks._monitor_steps import Steps
from lightning_optim.trainer.callbacks._monitor_units import group_names, state_bytes, used_rate

#: What can be logged.
METRICS = (
    "lr",
    "grad_norm",
    "grad_norm_max",
    "update_ratio",
    "momentum_norm",
    "nonfinite_steps",
    "skipped_steps",
    "projection",
    "state_bytes",
)
# The sums of squares that a step's measurements are made of.
_SUMS = ("updates", "weights", "momenta", "captured", "projected")
# What a low-rank optimizer counts in its states.
_COUNTED = ("skipped", "kept")

#: By metric and unit; the unit ``""`` is all of the optimizer.
Values = dict[tuple[str, str], float]


class SumOverProcesses(Metric):
    """Adds a tensor up over the processes when it is computed."""

    full_state_update = False
    values: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("values", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        self.values = values

    def compute(self) -> Tensor:
        return self.values


class Numbers:
    """The numbers of one optimizer, and what is counted from the beginning of training to its end.

    Args:
        steps: What was noted.
        metrics: The names of what is wanted.
    """

    def __init__(self, steps: Steps, metrics: Collection[str]) -> None:
        self.steps = steps
        self._metrics = metrics
        #: By metric and unit.
        self.counts: dict[str, dict[str, int]] = {}

    def collect(self) -> tuple[Values, dict[tuple[str, str], list[float]]]:
        """Returns the numbers by metric and unit, and the histograms; forgets what was noted."""
        steps = self.steps
        values: Values = {}
        histograms: dict[tuple[str, str], list[float]] = {}
        if steps.gradients:
            reduced, histograms = self._reduced()
            values.update(self._of_gradients(reduced))
        if "skipped_steps" in self._metrics:
            values.update(self._counted("skipped_steps", self._skipped()))
        values.update(self._of_groups())
        if "state_bytes" in self._metrics:
            values.update(self._bytes())
        if "projection" in self._metrics and isinstance(steps.optimizer, LowRankOptimizer):
            values.update(self._projections(steps.optimizer))
        steps.clear()
        return values, histograms

    def state_dict(self) -> dict[str, dict[str, int]]:
        """Returns what was counted, also since the last :meth:`collect`; of shards, then, by this process alone."""
        counts = {metric: dict(of_units) for metric, of_units in self.counts.items()}
        if "skipped_steps" in self._metrics:
            _count_up(counts.setdefault("skipped_steps", {}), self._skipped())
        if "nonfinite_steps" in self._metrics and self.steps.gradients:
            _count_up(counts.setdefault("nonfinite_steps", {}), self._nonfinite(_count(self._rows())[-1]))
        return counts

    # Inside.

    def _rows(self) -> Tensor:
        """Returns the squared gradient norms ``[steps, units]``."""
        width = len(self.steps.units.names)
        return torch.stack([pad(row, (0, width - len(row))) for row in self.steps.gradients])

    def _reduced(self) -> tuple[dict[str, Tensor], dict[tuple[str, str], list[float]]]:
        """Returns what was noted, added up over the processes if they hold shards."""
        steps, rows = self.steps, self._rows()
        width = len(steps.units.names)
        noted: dict[Any, Tensor] = {"gradients": rows}
        for name in _SUMS:
            if name in steps.sums:
                noted[name] = pad(steps.sums[name], (0, width - len(steps.sums[name])))
        kept = steps.histograms.counts if steps.histograms is not None else {}
        noted.update(kept)
        total = SumOverProcesses(sync_on_compute=steps.units.sharded)
        total.update(torch.cat([tensor.to(rows.device).flatten() for tensor in noted.values()]))
        pieces = torch.split(total.compute(), [tensor.numel() for tensor in noted.values()])
        found = {key: piece.view(noted[key].shape) for key, piece in zip(noted, pieces, strict=True)}
        histograms = {key: found.pop(key).tolist() for key in kept}
        if steps.histograms is not None:
            steps.histograms.counts = {}
        return found, histograms

    def _of_gradients(self, noted: dict[str, Tensor]) -> Iterator[tuple[tuple[str, str], float]]:
        steps = self.steps
        rows = noted["gradients"]
        last, largest, nonfinite = _count(rows)
        host = {name: _with_total(noted[name]).tolist() for name in _SUMS if name in noted}
        if "grad_norm" in self._metrics:
            for unit, name in self._named(steps.reached_last):
                yield ("grad_norm", name), last[unit]
        if "grad_norm_max" in self._metrics:
            for unit, name in self._named(steps.reached):
                if largest[unit] >= 0:
                    yield ("grad_norm_max", name), largest[unit]
        if "nonfinite_steps" in self._metrics:
            yield from self._counted("nonfinite_steps", self._nonfinite(nonfinite))
        for metric, one, other, root in (
            ("update_ratio", "updates", "weights", True),
            ("projection/energy", "captured", "projected", False),
        ):
            for unit, name in self._named(steps.known.get(one, set())):
                if host[other][unit]:
                    ratio = host[one][unit] / host[other][unit]
                    yield (metric, name), math.sqrt(ratio) if root and ratio >= 0 else ratio
        for unit, name in self._named(steps.known.get("momenta", set()) - steps.unknown_momenta):
            if name or not steps.unknown_momenta:
                yield ("momentum_norm", name), math.sqrt(host["momenta"][unit])

    def _counted(self, metric: str, added: dict[str, int]) -> Iterator[tuple[tuple[str, str], float]]:
        """Counts steps, and yields how many there are by now."""
        counts = self.counts.setdefault(metric, {})
        _count_up(counts, added)
        for _, name in self._named(self.steps.reached):
            yield (metric, name), counts.get(name, 0)

    def _nonfinite(self, nonfinite: list[float]) -> dict[str, int]:
        named = self._named(self.steps.reached)
        return {name: int(nonfinite[unit]) for unit, name in named if nonfinite[unit]}

    def _skipped(self) -> dict[str, int]:
        steps, counts = self.steps, dict[str, int]()
        flags = [flag for flag in steps.skipped if isinstance(flag, Tensor)]
        answers = iter(torch.stack([flag.reshape(()) for flag in flags]).tolist() if flags else ())
        for units in steps.skipped:
            if isinstance(units, Tensor):
                units = set(steps.reached) if next(answers) else set()
            _count_up(counts, {name: 1 for _, name in self._named(units)})
        return counts

    def _named(self, units: set[int]) -> Iterator[tuple[int, str]]:
        """Yields the number of all of the optimizer and its name ``""``, then those of the units, if there are any."""
        if units:
            yield -1, ""
            for unit in sorted(units):
                if self.steps.units.names[unit]:
                    yield unit, self.steps.units.names[unit]

    def _of_groups(self) -> Iterator[tuple[tuple[str, str], float]]:
        if "lr" not in self._metrics:
            return
        optimizer = self.steps.optimizer
        rates = self.steps.rates or [used_rate(optimizer, group) for group in optimizer.param_groups]
        named = dict(zip(group_names(optimizer), map(float, rates), strict=False))
        if len(set(named.values())) == 1:
            yield ("lr", ""), next(iter(named.values()))
        for name, rate in named.items():
            if name:
                yield ("lr", name), rate

    def _bytes(self) -> Iterator[tuple[tuple[str, str], float]]:
        units, state = self.steps.units, self.steps.optimizer.state
        yield ("state_bytes", ""), state_bytes(state.values())
        states: dict[int, list[Any]] = {}
        for parameter, kept in state.items():
            if id(parameter) in units.unit:
                states.setdefault(units.unit[id(parameter)], []).append(kept)
        for unit, of_unit in states.items():
            if units.names[unit]:
                yield ("state_bytes", units.names[unit]), state_bytes(of_unit)

    def _projections(self, optimizer: LowRankOptimizer) -> Iterator[tuple[tuple[str, str], float]]:
        units = self.steps.units
        found = self.counts.setdefault("projection/refreshes", {})
        for unit, count in self.steps.refreshes.items():
            for name in {"", units.names[unit]}:
                found[name] = found.get(name, 0) + count
        counted: dict[tuple[str, str], float] = {}
        for parameter, state in optimizer.state.items():
            if id(parameter) not in units.unit or optimizer.subspace(parameter) is None:
                continue
            for name in {"", units.name(id(parameter))}:
                counted["projection/refreshes", name] = found.get(name, 0)
                for what in _COUNTED:
                    key = f"projection/{what}", name
                    counted[key] = counted.get(key, 0) + state.get(what, 0)
        yield from counted.items()


def _with_total(rows: Tensor) -> Tensor:
    """Returns rows of one number for each unit with their sum at the end."""
    return torch.cat([rows, rows.sum(-1, keepdim=True)], -1)


def _count(rows: Tensor) -> tuple[list[float], list[float], list[float]]:
    """Returns the last norms, the largest finite ones (-1 if there is none), and how many are not finite."""
    norms = _with_total(rows).sqrt()
    finite = norms.isfinite()
    largest = torch.where(finite, norms, -1.0).amax(0)
    last, most, nonfinite = torch.stack([norms[-1], largest, (~finite).sum(0).to(norms)]).tolist()
    return last, most, nonfinite


def _count_up(counts: dict[str, int], added: dict[str, int]) -> None:
    for name, count in added.items():
        counts[name] = counts.get(name, 0) + count
