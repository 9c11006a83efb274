"""One step of any optimizer, taken in parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim._compat.torch import HOOK_ATTRIBUTES, bare_optimizer, unhooked
from lightning_optim.layerwise._coupled import ATTRIBUTES, Watch, differ, merged
from lightning_optim.stepping import preparations

#: The attribute of an optimizer that holds its ``Layerwise``.
ATTACHED = "_layerwise"
#: The attribute that names keys of groups that each part writes for itself, and that the whole never gets.
PRIVATE = "_layerwise_private"
# Attributes of the outer optimizer that its parts do not share: what is restricted, and what runs once per step.
_NOT_SHARED = ("param_groups", "step", ATTACHED, PRIVATE, *HOOK_ATTRIBUTES)
# What is a part's own in its groups.
_OF_PARTS = ("params",)
_ABSENT = object()


class SplitStep:
    """A step of an optimizer that is taken bucket by bucket.

    Every bucket is stepped by an inner optimizer: an object of the same class with the same attributes and the same
    state, whose groups hold only the bucket's parameters. All inner optimizers start from the outer groups as they were
    before the step, and what a step writes into its groups and attributes (schedule-free's counters, StableAdamW's
    step) reaches the outer optimizer once, in :meth:`commit`. So each parameter sees what it would see if all were
    stepped together.

    Args:
        optimizer: The outer optimizer; its state is written at once, its groups only in :meth:`commit`.
        watch: Undoes the step if its parts disagree; ``None`` does not check.
    """

    def __init__(self, optimizer: Optimizer, watch: Watch | None = None) -> None:
        self._optimizer = optimizer
        self._watch = watch
        self._of_parts = (*_OF_PARTS, *vars(optimizer).get(PRIVATE, ()))
        # By id: Tensor.__hash__ is a Python function, and this is asked for every parameter of every step.
        self._group_of: dict[int, int] = {}
        for index, group in enumerate(optimizer.param_groups):
            self._group_of.update(dict.fromkeys(map(id, group["params"]), index))
        self._class_step = unhooked(type(optimizer).step)
        self._shared = {name: value for name, value in vars(optimizer).items() if name not in _NOT_SHARED}
        # A counter changed in place must not advance once per part.
        self._counters = [
            name for name, value in self._shared.items() if isinstance(value, Tensor) and _is_number(value)
        ]
        self._preparations = preparations(optimizer)
        self._tensors = [
            [key for key, value in group.items() if isinstance(value, Tensor)] for group in optimizer.param_groups
        ]
        # The groups and the attributes as each inner optimizer's step left them.
        self._advanced: dict[int, list[dict[str, Any]]] = {}
        self._attributes: list[dict[str, Any]] = []
        # Groups that have had a gradient.
        self._reached: set[int] = set()
        #: The inner optimizers made so far; kept because a GradScaler tells optimizers apart by their id().
        self.inners: list[Optimizer] = []

    @property
    def parameters(self) -> Iterable[Tensor]:
        """All parameters in the order of the groups."""
        return (parameter for group in self._optimizer.param_groups for parameter in group["params"])

    def inners_for(self, bucket: Sequence[Tensor]) -> list[Optimizer]:
        """Returns new optimizers for a bucket: one, or two that can be compared."""
        return [self.inner(part) for part in self._compared(bucket)]

    def _compared(self, bucket: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Returns a bucket whole, or in two parts that can be compared."""
        watch = self._watch
        if watch is None:
            return [bucket]
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        members: dict[int, int] = {}
        for parameter in bucket:
            group = self._group_of[id(parameter)]
            number = members[group] = members.get(group, -1) + 1
            parts[number % 2 if watch.wants(group) else 0].append(parameter)
        return [part for part in parts if part]

    def inner(self, parameters: Sequence[Tensor]) -> Optimizer:
        """Returns a new optimizer for one part."""
        members: dict[int, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            members[self._group_of[id(parameter)]].append(parameter)
        self._reached.update(members)
        return self._make(members)

    @torch.no_grad()
    def commit(self) -> None:
        """Writes what the step advanced into the outer optimizer.

        Raises:
            IncompatibleTrainer: If the parts of the step do not agree; nothing is written then.
        """
        groups = self._optimizer.param_groups
        without = {index: group["params"] for index, group in enumerate(groups) if index not in self._reached}
        if without and (self._advanced or not self.inners):
            # A step counts in every group, even if its parameters got no gradient.
            self._make(without).step()
        with self._watch.undoing() if self._watch is not None else nullcontext():
            advanced = [(groups[index], self._merged(groups[index], own)) for index, own in self._advanced.items()]
            attributes = self._merged(vars(self._optimizer), self._attributes)
        for written, values in (*advanced, (vars(self._optimizer), attributes)):
            for key, value in values.items():
                if isinstance(written.get(key), Tensor) and isinstance(value, Tensor):
                    # In place: schedulers and loggers hold the tensor.
                    written[key].copy_(value)
                else:
                    written[key] = value
        if self._watch is not None:
            self._watch.end()

    def _merged(self, before: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns a group or the attributes after all parts."""
        values: dict[str, Any] = {}
        for key in dict.fromkeys(key for own in parts for key in own):
            made = [own[key] for own in parts if key in own]
            values[key] = (
                merged(
                    self._optimizer,
                    key,
                    before.get(key),
                    made,
                    of_group=parts is not self._attributes,
                    watched=self._watch is not None,
                )
                if parts is not self._attributes or all(map(_is_number, made))
                else made[0]
            )
        return values

    def _wrote(self, inner: Optimizer, indices: Sequence[int]) -> Iterator[int]:
        """Yields the groups (and :data:`ATTRIBUTES`) that a part's step changed."""
        for index, group in zip(indices, inner.param_groups, strict=True):
            before = self._optimizer.param_groups[index]
            if any(differ(value, before.get(key)) for key, value in _replaced(group, before, self._of_parts).items()):
                yield index
        before = vars(self._optimizer)
        if any(differ(value, before.get(key)) for key, value in self._attributes[-1].items() if _is_number(value)):
            yield ATTRIBUTES

    def _make(self, members: Mapping[int, list[Tensor]]) -> Optimizer:
        """Returns an inner optimizer with these parameters, by group index."""
        inner = bare_optimizer(type(self._optimizer), self._shared)
        vars(inner).update({name: self._shared[name].clone() for name in self._counters})
        inner.param_groups = []
        indices = sorted(members)
        for index in indices:
            own = {**self._optimizer.param_groups[index], "params": members[index]}
            for key in self._tensors[index]:
                own[key] = own[key].clone()
            inner.param_groups.append(own)
        vars(inner)["step"] = partial(self._step, inner, indices)
        self.inners.append(inner)
        return inner

    def _step(self, inner: Optimizer, indices: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        """The ``step`` of an inner optimizer; one that a GradScaler skips advances nothing."""
        for prepare in self._preparations:
            prepare(inner)
        if self._watch is not None:
            self._watch.before({i: group["params"] for i, group in zip(indices, inner.param_groups, strict=True)})
        result = self._class_step(inner, *args, **kwargs)
        for index, group in zip(indices, inner.param_groups, strict=True):
            self._advanced.setdefault(index, []).append(
                _replaced(group, self._optimizer.param_groups[index], self._of_parts)
            )
        self._attributes.append(_replaced(vars(inner), self._shared, _NOT_SHARED))
        if self._watch is not None:
            with self._watch.undoing():
                for index in indices:
                    self._merged(self._optimizer.param_groups[index], self._advanced[index])
                self._merged(vars(self._optimizer), self._attributes)
            self._watch.after(self._wrote(inner, indices))
        return result


def _replaced(after: Mapping[str, Any], before: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """Returns what is another object now, without what is a part's own; most steps replace nothing."""
    return {key: value for key, value in after.items() if value is not before.get(key, _ABSENT) and key not in own}


def _is_number(value: Any) -> bool:
    """Whether an attribute is a counter or an estimate, not a setting or a work buffer."""
    if isinstance(value, Tensor):
        return type(value) is Tensor and value.numel() == 1 and not value.requires_grad
    return isinstance(value, (bool, int, float, complex))
