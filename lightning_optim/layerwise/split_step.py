"""One step of any optimizer, taken in parts that amount to one."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.errors import IncompatibleTrainer
from lightning_optim.optimizers.preparing import preparations

# Attributes of the outer optimizer that its parts do not share: what is restricted, and what runs once per step.
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_NOT_SHARED = ("param_groups", "step", "_layerwise", *_HOOKS)
# What torch wraps around the step of every class, to run the hooks.
_HOOKED = Optimizer.profile_hook_step(lambda optimizer: None).__code__


def _differ(one: Any, other: Any) -> bool:
    try:
        return one is not other and bool(one != other)
    except (RuntimeError, ValueError):  # tensors and arrays with several elements
        return True


class SplitStep:
    """A step of an optimizer that is taken bucket by bucket.

    Every bucket is stepped by an inner optimizer: an object of the same class with the same attributes and the same
    state, whose groups hold the bucket's parameters alone. All inner optimizers start from what the outer groups said
    before the step, and what a step writes into its groups and attributes (schedule-free's counters, StableAdamW's
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
        self._shared = {name: value for name, value in vars(optimizer).items() if name not in _NOT_SHARED}
        self._preparations = preparations(optimizer)
        self._tensors = [
            [key for key, value in group.items() if isinstance(value, Tensor)] for group in optimizer.param_groups
        ]
        # What the inner optimizers that stepped made of each group, and the first of them of the attributes.
        self._advanced: dict[int, list[dict[str, Any]]] = {}
        self._attributes: dict[str, Any] = {}
        # Groups that have had a gradient.
        self._reached: set[int] = set()
        #: The inner optimizers made so far; kept because a GradScaler tells optimizers apart by their id().
        self.inners: list[Optimizer] = []

    @property
    def parameters(self) -> Iterable[Tensor]:
        """All parameters in the order of the groups."""
        return self._group_of.keys()

    def inner(self, parameters: Sequence[Tensor]) -> Optimizer:
        """Returns the optimizer of one bucket, which has not been stepped."""
        members: dict[int, list[Tensor]] = {}
        for parameter in parameters:
            members.setdefault(self._group_of[parameter], []).append(parameter)
        self._reached.update(members)
        return self._make(members)

    @torch.no_grad()
    def commit(self) -> None:
        """Writes what the step advanced into the outer optimizer."""
        groups = self._optimizer.param_groups
        without = {index: group["params"] for index, group in enumerate(groups) if index not in self._reached}
        if without and (self._advanced or not self.inners):
            # A step counts in every group, also in one whose parameters got no gradient.
            self._make(without).step()
        for index, copies in self._advanced.items():
            group = groups[index]
            for key in dict.fromkeys(key for own in copies for key in own if key != "params"):
                values = [own[key] for own in copies if key in own]
                before = group.get(key)
                if isinstance(before, Tensor) and isinstance(values[0], Tensor):
                    # In place: schedulers and loggers hold the tensor.
                    before.copy_(values[0])
                else:
                    # Some write only when they meet a parameter that asks for it.
                    changed = [value for value in values if _differ(value, before)]
                    if any(_differ(value, changed[0]) for value in changed[1:]):
                        raise IncompatibleTrainer(
                            f"{type(self._optimizer).__name__} computed different values of {key!r} for the parts of "
                            "one group: it couples its parameters and cannot be stepped layer by layer. Use it plainly."
                        )
                    group[key] = changed[0] if changed else before
        advanced = {name: value for name, value in self._attributes.items() if name not in _NOT_SHARED}
        vars(self._optimizer).update(advanced)

    def _make(self, members: Mapping[int, list[Tensor]]) -> Optimizer:
        """Returns an inner optimizer with these parameters by index of their group."""
        # Not copy.copy: Optimizer.__getstate__ leaves out the attributes that bitsandbytes needs.
        inner: Optimizer = object.__new__(type(self._optimizer))
        vars(inner).update(self._shared)
        vars(inner).update({name: OrderedDict() for name in _HOOKS})
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
        result = _unhooked(type(inner).step)(inner, *args, **kwargs)
        for index, group in zip(indices, inner.param_groups, strict=True):
            self._advanced.setdefault(index, []).append(group)
        self._attributes = self._attributes or vars(inner)
        return result


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a class's ``step`` without the hooks for all optimizers: they run once per step, with the outer's own."""
    unhooked: Callable[..., Any] = inspect.unwrap(step, stop=lambda f: getattr(f, "__code__", None) is not _HOOKED)
    return unhooked
