"""One step of any optimizer, taken in parts that amount to one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Attributes of the outer optimizer that its parts do not share: what is restricted, and what runs once per step.
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_NOT_SHARED = ("param_groups", "step", "_layerwise", *_HOOKS)


class SplitStep:
    """A step of an optimizer that is taken bucket by bucket.

    Every bucket is stepped by an inner optimizer: an object of the same class with the same attributes and the same
    state, whose groups hold the bucket's parameters alone. All inner optimizers start from what the outer groups say
    when they are made, and what a step writes into its groups and attributes (schedule-free's counters, StableAdamW's
    step) reaches the outer optimizer once, in :meth:`commit`. So each parameter sees what it would see if all were
    stepped together.

    Args:
        optimizer: The outer optimizer; its state is written, its groups are not before :meth:`commit`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._group_of = {
            parameter: index for index, group in enumerate(optimizer.param_groups) for parameter in group["params"]
        }
        # Of each group and of the attributes, what the first inner optimizer that stepped made of them.
        self._groups: dict[int, dict[str, Any]] = {}
        self._attributes: dict[str, Any] = {}
        #: The inner optimizers made so far; kept because a GradScaler tells optimizers apart by their id().
        self.inners: list[Optimizer] = []

    @property
    def parameters(self) -> Iterable[Tensor]:
        """All parameters in the order of the groups."""
        return self._group_of.keys()

    def inner(self, parameters: Sequence[Tensor]) -> Optimizer:
        """Returns the optimizer of one bucket, which has not been stepped.

        The first one has all groups, even those without a parameter: a step advances the counters of every group.
        """
        members: dict[int, list[Tensor]] = {}
        for parameter in parameters:
            members.setdefault(self._group_of[parameter], []).append(parameter)
        outer = self._optimizer
        # Not copy.copy: Optimizer.__getstate__ leaves out the attributes that bitsandbytes needs.
        inner: Optimizer = object.__new__(type(outer))
        inner.__dict__.update({name: value for name, value in vars(outer).items() if name not in _NOT_SHARED})
        inner.__dict__.update({name: OrderedDict() for name in _HOOKS})
        groups = {
            index: {
                **{key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()},
                "params": members.get(index, []),
            }
            for index, group in enumerate(outer.param_groups)
            if index in members or not self.inners
        }
        inner.param_groups = list(groups.values())

        def note(*_: Any) -> None:
            self._groups = {**groups, **self._groups}
            self._attributes = self._attributes or vars(inner)

        # A step that a GradScaler skips advances nothing.
        inner.register_step_post_hook(note)
        self.inners.append(inner)
        return inner

    @torch.no_grad()
    def commit(self) -> None:
        """Writes what the step advanced into the outer optimizer."""
        for index, own in self._groups.items():
            group = self._optimizer.param_groups[index]
            for key, value in own.items():
                if key == "params":
                    continue
                if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                    # In place: schedulers and loggers hold the tensor.
                    group[key].copy_(value)
                else:
                    group[key] = value
        advanced = {name: value for name, value in self._attributes.items() if name not in _NOT_SHARED}
        vars(self._optimizer).update(advanced)
