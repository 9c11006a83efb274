"""What a step of an optimizer takes beyond its state while it runs, by running it on tensors without memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim._compat.fake import tensors_in
from lightning_optim.build import Part, resolve_part
from lightning_optim.choose._fake_run import FakeTraining
from lightning_optim.choose._tracker import MemoryTracker
from lightning_optim.groups import NamedParameter
from lightning_optim.optimizers import OwnOptimizer
from lightning_optim.stepping import KeepsTrainingPoint, is_sharded

#: A group's index, a shape and a dtype: parameters that are alike to an optimizer.
Kind = tuple[int, tuple[int, ...], torch.dtype]

# Up to so many parameters are stepped as they are; of more, those that are alike are counted.
_STEPPED = 48
# What our own optimizers update together at most, unless a single parameter has more.
_PART_ELEMENTS = 2**24
_FEW = 2


class StepTemporaries:
    """Measures steps of one optimizer.

    Args:
        training: The module without memory.
        part: What was asked for, and the parameters that it steps.
        everything: All parameters of the module.
    """

    def __init__(self, training: FakeTraining, part: Part, everything: list[NamedParameter]) -> None:
        self._training = training
        self._known: dict[frozenset[tuple[Kind, int]], int | None] = {}
        self._begun: set[Tensor] = set()
        self._members: dict[Kind, list[Tensor]] = {}
        self._kind_of: dict[Tensor, Kind] = {}
        in_place = part.config.spec.in_place
        self._optimizer = None if training.accelerator in in_place else self._build(part, everything)
        for index, group in enumerate(self._optimizer.param_groups if self._optimizer is not None else ()):
            for parameter in group["params"]:
                kind = index, tuple(parameter.shape), parameter.dtype
                self._kind_of[parameter] = kind
                self._members.setdefault(kind, []).append(parameter)

    def of(self, parameters: Sequence[Tensor]) -> int | None:
        """Returns the bytes that stepping these parameters at once takes, or ``None`` if nobody knows."""
        if self._optimizer is None:
            return 0
        counts = Counter(self._kind_of[parameter] for parameter in parameters if parameter in self._kind_of)
        if not counts:
            return 0
        key = frozenset(counts.items())
        if key not in self._known:
            try:
                self._known[key] = self._counted(counts)
            except (RuntimeError, TypeError, NotImplementedError, AssertionError, ValueError):
                # A class of others may do what needs values.
                self._known[key] = None
        return self._known[key]

    def state(self) -> int:
        """Returns the bytes of the state, for a class of which nobody says them; 0 if it cannot be stepped so."""
        assert self._optimizer is not None, "rows with kernels say what they store"
        try:
            self._step([members[0] for members in self._members.values()])
        except (RuntimeError, TypeError, NotImplementedError, AssertionError, ValueError):
            return 0
        return sum(len(members) * _state_bytes(self._optimizer.state[members[0]]) for members in self._members.values())

    def _build(self, part: Part, everything: list[NamedParameter]) -> Optimizer:
        with self._training.without_memory(()):
            optimizer = resolve_part(part, everything).optimizer
            if isinstance(optimizer, KeepsTrainingPoint):
                optimizer.train()
        for group in optimizer.param_groups:
            if "foreach" in group and group["foreach"] is None and not group.get("fused"):
                # What torch chooses by the device; for shards it does not choose lists.
                sharded = any(map(is_sharded, group["params"]))
                group["foreach"] = self._training.accelerator == "cuda" and not sharded
            # The step that counts is one of those that look for subspaces.
            group.update({gap: 1 for gap in ("update_proj_gap", "precondition_frequency") if group.get(gap)})
        return optimizer

    def _counted(self, counts: Mapping[Kind, int]) -> int:
        """Returns what stepping so many of each kind takes.

        Our own optimizers update part by part, so that more parameters of a kind than fit into a part take no more.
        Others step one by one, or in lists by group, so that each parameter of a kind takes as much as the next.
        """
        if sum(counts.values()) <= _STEPPED:
            return self._step(self._some(counts))
        if isinstance(self._optimizer, OwnOptimizer):
            everything = sum(_elements(kind) * count for kind, count in counts.items())
            return self._step(self._some({k: min(n, _in_a_part(k, n, everything)) for k, n in counts.items()}))
        return max(self._of_group({k: n for k, n in counts.items() if k[0] == g}) for g in {kind[0] for kind in counts})

    def _of_group(self, counts: Mapping[Kind, int]) -> int:
        once = self._step(self._some(dict.fromkeys(counts, 1)))
        twice = self._step(self._some({kind: min(count, 2) for kind, count in counts.items()}))
        added = sum(_bytes(kind) for kind, count in counts.items() if count > 1)
        if twice == once or not added:
            return twice
        return once + sum(_bytes(kind) * (count - 1) for kind, count in counts.items()) * (twice - once) // added

    def _some(self, counts: Mapping[Kind, int]) -> list[Tensor]:
        return [parameter for kind, count in counts.items() for parameter in self._members[kind][:count]]

    def _step(self, parameters: Sequence[Tensor]) -> int:
        """Returns what stepping these parameters takes, not for the first time."""
        assert self._optimizer is not None
        fresh = [parameter for parameter in parameters if parameter not in self._begun]
        try:
            with self._training.without_memory(parameters) as tracker:
                tracker.add(tensors_in(list(self._optimizer.state.values())), "state")
                if fresh:
                    _give_gradients(fresh, tracker)
                    self._optimizer.step()
                    self._begun.update(fresh)
                if isinstance(self._optimizer, OwnOptimizer):
                    # They update together what took as many steps, as all do in a training.
                    for parameter in parameters:
                        self._optimizer.state[parameter]["step"] = 1
                _give_gradients(parameters, tracker)
                tracker.restart()
                before = tracker.now().total
                self._optimizer.step()
        finally:
            self._optimizer.zero_grad(set_to_none=True)
        return tracker.peak.total - before


def _state_bytes(state: Any) -> int:
    storages = {id(storage): storage for tensor in tensors_in(state) for storage in (tensor.untyped_storage(),)}
    return sum(storage.nbytes() for storage in storages.values())


def _give_gradients(parameters: Sequence[Tensor], tracker: MemoryTracker) -> None:
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
        tracker.add(tensors_in(parameter.grad), "gradients")


def _in_a_part(kind: Kind, count: int, everything: int) -> int:
    """Returns how many of a kind may be updated together; few of those that hardly matter, such as norms."""
    elements = _elements(kind)
    return _FEW if elements * count < everything / 500 else max(1, _PART_ELEMENTS // elements)


def _elements(kind: Kind) -> int:
    return torch.Size(kind[1]).numel()


def _bytes(kind: Kind) -> int:
    return _elements(kind) * kind[2].itemsize
