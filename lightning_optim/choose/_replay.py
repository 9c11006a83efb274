"""How gradients come and go in one step, on the timeline of a backward: kept until all are there, or stepped at once.

What is alive besides gradients does not depend on whether they are freed, so that one recorded backward serves every
way of stepping. Which gradients are alive when they are freed, the layerwise engine itself says: it runs a backward in
which the same gradients arrive in the same order and nothing else happens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.choose._fake_run import FakeTraining, Timeline, on_gradient
from lightning_optim.choose._tracker import MemoryTracker, Moment
from lightning_optim.layerwise import Clipping, Layerwise, Replicas, Watches
from lightning_optim.stepping import parts_of

#: What is stepped at once, with what is alive then.
Steps = Sequence[tuple[tuple[Tensor, ...], Moment]]


@dataclass(frozen=True)
class Stepping:
    """How gradients come and go.

    Attributes:
        accumulate: Micro-batches of a step.
        layerwise: Whether they are freed bucket by bucket during backward.
        bucket_mb: The layerwise optimizer's option.
        clipping: How a layerwise optimizer clips; a plain one clips in place.
        replicas: Processes that average each bucket of a layerwise optimizer.
    """

    accumulate: int = 1
    layerwise: bool = False
    bucket_mb: float | None = None
    clipping: Clipping | None = None
    replicas: int = 1


@dataclass(frozen=True)
class Replay:
    """What was alive during one step, without an optimizer's state and temporaries.

    Attributes:
        passes: The moments of forward and backward with most bytes.
        steps: What is stepped at once, with what is alive then.
        gradients: Most bytes of gradients.
        activations: Most bytes of activations and of what backward works with.
        communication: Most bytes of gathered parameters and of gradients on their way, where parameters are sharded.
    """

    passes: Sequence[Moment]
    steps: Steps
    gradients: int
    activations: int
    communication: int = 0


def replay(training: FakeTraining, stepping: Stepping) -> Replay:
    """Replays the module's backward."""
    return _layerwise(training, stepping) if stepping.layerwise else _plain(training, stepping)


def _plain(training: FakeTraining, stepping: Stepping) -> Replay:
    timeline = training.timeline()
    sizes = [_nbytes(arrival.parameter) for arrival in timeline.arrivals]
    total = sum(sizes)
    # Those of the micro-batches before are alive from the start; the last one's are added to them.
    accumulated = total if stepping.accumulate > 1 else 0
    # In a first micro-batch, Lightning drops those of the step before when forward is over.
    moments = [_moment(timeline, "forward", timeline.forward, total)]
    alive = 0
    for arrival, size in zip(timeline.arrivals, sizes, strict=True):
        moments.append(_moment(timeline, "backward", arrival.before, accumulated or alive))
        alive += size
        incoming = size if accumulated else 0
        moments.append(_moment(timeline, "backward", arrival.after + incoming, accumulated or alive))
    moments.append(_moment(timeline, "backward", timeline.end, total))
    everything = tuple(arrival.parameter for arrival in timeline.arrivals)
    step = everything, _moment(timeline, "step", timeline.left, total)
    return Replay(_highest(moments), (step,), total, _most(moments))


def _layerwise(training: FakeTraining, stepping: Stepping) -> Replay:
    timeline = training.timeline()
    measures = stepping.clipping is not None and stepping.clipping.kind == "norm" and stepping.accumulate == 1
    timelines = [training.timeline(retain_graph=True), timeline] if measures else [timeline]
    with training.without_memory() as tracker:
        return _Engine(timelines, stepping, tracker).run()


class _Engine:
    """Runs the layerwise engine on gradients that arrive as the timelines say."""

    def __init__(self, timelines: Sequence[Timeline], stepping: Stepping, tracker: MemoryTracker) -> None:
        self._timeline, self._stepping = timelines[-1], stepping
        self._order = [arrival.parameter for arrival in self._timeline.arrivals]
        self._coming = iter([arrival for timeline in timelines for arrival in timeline.arrivals])
        self._tracker = tracker
        self._counts = False
        # What is alive besides gradients, now.
        self._other = self._timeline.left
        self._moments: list[Moment] = []
        self._steps: list[tuple[tuple[Tensor, ...], Moment]] = []

    def run(self) -> Replay:
        # Before the engine's, which free what arrives.
        hooks = [on_gradient(parameter, self._arrived) for parameter in self._order]
        replicas = _Absent(self._stepping.replicas) if self._stepping.replicas > 1 else None
        engine = Unwatched(Noting(self._order, self._note), self._stepping.bucket_mb, replicas=replicas)
        try:
            if replicas is not None:
                # Processes agree on an order in their first step.
                engine.backward(_loss_of(self._order))
            for _ in range(self._stepping.accumulate - 1):
                _loss_of(self._order).backward()  # type: ignore[no-untyped-call]
            self._counts = True
            self._add("forward", self._timeline.forward)
            engine.backward(_loss_of(self._order), clipping=self._stepping.clipping)
            self._add("backward", self._timeline.end)
        finally:
            engine.detach()
            for hook in hooks:
                hook.remove()
        gradients = max(moment.live["gradients"] for moment in self._moments)
        return Replay(_highest(self._moments), tuple(self._steps), gradients, _most(self._moments))

    def _arrived(self, parameter: Tensor) -> None:
        if not self._counts:
            return
        arrival = next(self._coming)
        # Of what the recorded backward counts at this moment, the replayed one holds the incoming gradient, too.
        self._add("backward", arrival.before - _nbytes(parameter))
        self._other = arrival.after
        self._add("backward", self._other)

    def _note(self, parameters: Sequence[Tensor]) -> None:
        if self._counts:
            self._steps.append((tuple(parameters), _moment(self._timeline, "step", self._other, self._alive())))

    def _add(self, phase: str, other: int) -> None:
        self._moments.append(_moment(self._timeline, phase, other, self._alive()))

    def _alive(self) -> int:
        return self._tracker.live["gradients"] + self._tracker.live["other"]


class Unwatched(Layerwise):
    """Does not look for couplings, as after the first steps."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._watches = _AllHavePassed()


class _AllHavePassed(Watches):
    def begin(self, optimizer: Optimizer) -> list[Any]:
        return [None for _ in parts_of(optimizer)]


class Noting(Optimizer):
    """Says what it is asked to step."""

    def __init__(self, parameters: Sequence[Tensor], note: Callable[[Sequence[Tensor]], None]) -> None:
        self.note = note
        super().__init__(list(parameters), {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if found:
            self.note(found)


class _Absent(Replicas):
    """Processes that are not there."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def average(self, flat: Tensor) -> Callable[[], object]:
        return lambda: None

    def exchange(self, order: Sequence[int]) -> list[list[int]]:
        return [list(order)] * self._size


def _loss_of(order: Sequence[Tensor]) -> Tensor:
    """Returns a loss in whose backward gradients arrive in this order."""
    # The last operation of forward is the first of backward.
    sums = [parameter.sum().float() for parameter in reversed(order)]
    return torch.stack(sums).sum()


def _moment(timeline: Timeline, phase: str, other: int, gradients: int) -> Moment:
    return Moment(phase, MappingProxyType({**timeline.fixed, "other": other, "gradients": gradients}))


def _highest(moments: Sequence[Moment]) -> tuple[Moment, ...]:
    phases = dict.fromkeys(moment.phase for moment in moments)
    return tuple(max((m for m in moments if m.phase == phase), key=lambda moment: moment.total) for phase in phases)


def _most(moments: Sequence[Moment]) -> int:
    return max(moment.live["other"] for moment in moments)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
