"""Optimizers whose parameters cannot be stepped one by one: known ones, and how to detect others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_optim._compat.torch import entries
from lightning_optim.errors import IncompatibleTrainer

# How many steps a group is watched. More than one: D-Adaptation's estimate first moves in the second step.
WATCHED_STEPS = 3
# Stands for the optimizer's attributes where groups are known by their index.
ATTRIBUTES = -1


class Disagreement(IncompatibleTrainer):
    """The parts of one step computed different values of something.

    Args:
        text: What a user is told.
        key: Of what: a key of a group, or an attribute.
        of_group: Whether it is a group's.
    """

    def __init__(self, text: str, key: str, of_group: bool) -> None:
        super().__init__(text)
        self.key, self.of_group = key, of_group


def refuse_coupled(optimizer: Optimizer) -> None:
    """Raises :class:`IncompatibleTrainer` for an optimizer known to step all its parameters together."""
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise IncompatibleTrainer(
            "LBFGS evaluates the model several times for one step over all parameters and cannot be stepped layer by "
            "layer. Use it plainly, or another optimizer.",
            code="LO610",
        )
    if getattr(optimizer, "is_fused_optimizer", False):
        raise IncompatibleTrainer(
            f"{name} of torch_npu moves parameters, gradients and states into flat buffers and steps those as a whole. "
            "Use it plainly, or optim='adamw_torch_fused_layerwise'.",
            code="LO610",
        )
    wrapped = next((value for value in vars(optimizer).values() if isinstance(value, Optimizer)), None)
    if wrapped is not None:
        raise IncompatibleTrainer(
            f"{name} wraps another optimizer ({type(wrapped).__name__}), which steps all parameters at once. Step it "
            "plainly, or use the wrapped one.",
            code="LO610",
        )
    manager = getattr(optimizer, "mng", None)
    if type(optimizer).__module__.startswith("bitsandbytes.") and getattr(manager, "module_weight_config_triple", None):
        raise IncompatibleTrainer(
            f"bitsandbytes' {name} with overrides in its GlobalOptimManager (StableEmbedding adds some), which are "
            "keyed by position: buckets would get each other's. Use an identifier such as "
            "optim='adamw_8bit_layerwise', which keeps embeddings in 32 bits by itself.",
            code="LO610",
        )


def merged(optimizer: Optimizer, key: str, before: Any, values: Sequence[Any], *, of_group: bool, watched: bool) -> Any:
    """Returns the value after a step from ``before`` and the parts' ``values``.

    ``watched`` also compares values on other devices than the CPU, which waits for them.

    Raises:
        Disagreement: If two parts changed it differently; the text names ``optimizer`` and ``key``.
    """
    if not watched and isinstance(before, Tensor) and before.device.type != "cpu":
        return values[0]
    # Some optimizers write only when they meet certain parameters.
    changed = [value for value in values if differ(value, before)]
    if any(differ(value, changed[0]) for value in changed[1:]):
        raise Disagreement(
            f"{type(optimizer).__name__} computed different values of {key!r} for the parts of one step: it couples "
            "its parameters and cannot be stepped layer by layer. Use it plainly.",
            key,
            of_group,
        )
    return changed[0] if changed else before


def differ(one: Any, other: Any) -> bool:
    """Whether two values differ; NaN equals NaN, for both parts may have computed it."""
    if one is other:
        return False
    try:
        unequal = one != other
        if isinstance(unequal, Tensor):
            # Of different shapes they may broadcast.
            shapes = {tuple(value.shape) for value in (one, other) if isinstance(value, Tensor) and value.numel() > 1}
            return len(shapes) > 1 or bool((unequal & ~((one != one) & (other != other))).any())
        return bool(unequal) and not (bool(one != one) and bool(other != other))
    except (RuntimeError, TypeError, ValueError):  # arrays with several elements, tensors of several devices
        return True


@dataclass
class _Part:
    """A part that was stepped, and how to undo it.

    Attributes:
        copies: Parameters and state tensors with their previous values.
        states: Each parameter's previous state.
        open: The groups, and :data:`ATTRIBUTES`, of which nothing is known yet.
        blind: Those for which all gradients of the part were zero, so that what it writes tells nothing.
        empty: Of these, those for which all parts write the same then. Not so if a sparse gradient adds up to zero but
            its entries are nonzero: an optimizer may look at those.
    """

    copies: list[tuple[Tensor, Tensor]]
    states: dict[Tensor, dict[str, Any] | None]
    open: set[int]
    blind: set[int]
    empty: set[int]


class Watch:
    """Detects in one step whether an optimizer couples its parameters, and undoes the step if it does.

    A part with nonzero gradients that wrote nothing into groups and attributes cannot have coupled anything. If two
    such parts wrote the same, it does not depend on their gradients. Until one or the other is known, copies of the
    part's parameters and states are kept.

    Args:
        optimizer: The outer optimizer.
        seen: How many steps each group was watched, by its index; it outlives this step.
    """

    def __init__(self, optimizer: Optimizer, seen: dict[int, int]) -> None:
        self._optimizer = optimizer
        self._seen = seen
        self._parts: list[_Part] = []
        self._met: set[int] = set()
        # Groups into which a part with gradients wrote nothing; something; and the same as another part.
        self._silent: set[int] = set()
        self._wrote: set[int] = set()
        self._agreed: set[int] = set()

    def wants(self, group: int) -> bool:
        """Whether it is still open if the parts of this group agree."""
        return self._seen.get(group, 0) < WATCHED_STEPS and group not in self._agreed

    @torch.no_grad()
    def before(self, groups: Mapping[int, Sequence[Tensor]]) -> None:
        """Copies a part that is about to be stepped."""
        stepped = [p for parameters in groups.values() for p in parameters if p.grad is not None]
        self._met.update(index for index, parameters in groups.items() if any(p.grad is not None for p in parameters))
        blind = {index for index, parameters in groups.items() if not any(map(_has_gradient, parameters))}
        cancelled = {index for index in blind if any(map(_has_entries, groups[index]))}
        if len(blind) == len(groups):
            blind.add(ATTRIBUTES)
        empty = blind - cancelled - ({ATTRIBUTES} if cancelled else set())
        part = _Part([], {}, {index for index in (*groups, ATTRIBUTES) if self.wants(index)}, blind, empty)
        if part.open:
            for parameter in stepped:
                state = self._optimizer.state.get(parameter)
                part.states[parameter] = None if state is None else dict(state)
                tensors = [parameter, *(value for value in (state or {}).values() if isinstance(value, Tensor))]
                part.copies += [(tensor, tensor.detach().clone()) for tensor in tensors if _is_plain(tensor)]
        self._parts.append(part)

    def after(self, wrote: Iterable[int]) -> None:
        """Records what the part wrote into (groups, :data:`ATTRIBUTES`), after the parts were found to agree."""
        part = self._parts[-1]
        telling = set(wrote) - part.blind
        self._silent |= part.open - part.blind - telling
        self._agreed |= telling & self._wrote
        self._wrote |= telling
        part.open &= telling | part.blind
        for other in self._parts:
            other.open -= self._agreed | (other.empty & self._silent)
        self._parts = [other for other in self._parts if other.open]

    @contextmanager
    def undoing(self) -> Iterator[None]:
        """Undoes the copied parts if the parts are found to differ inside."""
        try:
            yield
        except IncompatibleTrainer:
            self._undo()
            raise

    def end(self) -> None:
        """Counts the step, whose parts agree."""
        self._parts.clear()
        for index in (*self._met, ATTRIBUTES) if self._met else ():
            self._seen[index] = self._seen.get(index, 0) + 1

    @torch.no_grad()
    def _undo(self) -> None:
        for part in self._parts:
            for parameter, before in part.states.items():
                if before is None:
                    self._optimizer.state.pop(parameter, None)
                else:
                    state = self._optimizer.state[parameter]
                    state.clear()
                    state.update(before)
            for tensor, copy in part.copies:
                tensor.copy_(copy)
        self._parts.clear()


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor can be copied and written; other packages' quantized ones may not."""
    return type(tensor) in (Tensor, torch.nn.Parameter) or hasattr(tensor, "to_local")


def _has_gradient(parameter: Tensor) -> bool:
    """Whether a parameter has a gradient that is not zero."""
    gradient = _local_gradient(parameter)
    return gradient is not None and bool((gradient.coalesce().values() if gradient.is_sparse else gradient).any())


def _has_entries(parameter: Tensor) -> bool:
    """Whether a parameter has a sparse gradient some of whose entries are not zero, even if they add up to zero."""
    gradient = _local_gradient(parameter)
    return gradient is not None and gradient.is_sparse and bool(entries(gradient).any())


def _local_gradient(parameter: Tensor) -> Tensor | None:
    gradient: Any = parameter.grad
    local: Tensor | None = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local
