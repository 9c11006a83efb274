"""Notes what the steps of one optimizer do, on the device, without waiting for it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.functional import pad
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optim._compat import kernels
from lightning_optim._compat.torch import has_unscaled
from lightning_optim.layerwise import Layerwise
from lightning_optim.optimizers import LowRankOptimizer
from lightning_optim.stepping import prepare_step
from lightning_optim.trainer.callbacks._monitor_histograms import Histograms
from lightning_optim.trainer.callbacks._monitor_units import Per, Units, local, momentum_norm, norms, used_rate

#: What the gradients of every step are looked at for; all else is known from the steps that are measured.
OF_EVERY_STEP = frozenset(("grad_norm_max", "nonfinite_steps"))
# A tensor with more elements may be represented by a part of them.
_SMALL = 2**16
# So many orders in which gradients arrive are kept.
_ORDERS = 8


class Steps:
    """Hooks into an optimizer and notes what its steps do, until :meth:`detach`.

    Gradients are seen before they are clipped: in :meth:`before_step`, or bucket by bucket where they are stepped
    during backward. Every step costs the norms of its gradients if ``"grad_norm_max"`` or ``"nonfinite_steps"`` is
    logged; all else is measured while :attr:`measures` is true.

    Args:
        optimizer: The optimizer.
        names: The parameters' names in the module.
        per: What is told apart.
        metrics: The names of what is logged.
        copy_bytes: The most bytes of weights to copy at once for ``"update_ratio"``; beyond, a part stands for all.
        histograms: Collects those of gradients and weights.
        blind: Whether gradients and weights are out of reach.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        names: Mapping[Tensor, str],
        per: Per,
        metrics: Collection[str],
        copy_bytes: int,
        histograms: Histograms | None = None,
        *,
        blind: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.units = Units(names, per)
        self.units.update(optimizer)
        self.histograms = histograms
        #: Whether the step that comes is measured in full.
        self.measures = False
        #: Whether there was a step since this was set to false.
        self.stepped = False
        #: The squared gradient norms by unit, of each step since :meth:`clear` that was looked at.
        self.gradients: list[Tensor] = []
        #: Of each step since :meth:`clear`: the units of parameters that had a gradient and were not stepped, or a flag
        #: on the device that tells whether all were skipped.
        self.skipped: list[set[int] | Tensor] = []
        #: The units that had gradients since :meth:`clear`, and in the last step.
        self.reached: set[int] = set()
        self.reached_last: set[int] = set()
        #: Of the last step that was measured: sums of squares by unit, the units they are known of, and the rates.
        self.sums: dict[str, Tensor] = {}
        self.known: dict[str, set[int]] = {}
        self.rates: list[float | Tensor] = []
        #: The units with parameters whose momentum could not be read.
        self.unknown_momenta: set[int] = set()
        #: Since :meth:`clear`: how many subspaces were found, by unit.
        self.refreshes: dict[int, int] = {}
        #: Whether a part of the weights stood for all of them.
        self.sampled = False

        self._metrics = metrics
        self._looks_always = not OF_EVERY_STEP.isdisjoint(metrics)
        self._copy_bytes = copy_bytes
        self._begun = False
        # Of the step that is under way, by id: Tensor.__hash__ is a Python function.
        self._parameters: dict[int, Tensor] = {}
        self._norms: dict[int, Tensor] = {}
        self._prepared: set[int] = set()
        self._copies: dict[int, tuple[Tensor, int]] = {}
        self._orders: dict[tuple[int, ...], _Order] = {}
        self._subspaces: dict[int, Callable[[], object]] = {}
        if isinstance(optimizer, LowRankOptimizer):
            for parameter in list(optimizer.state):
                self._subspaces[id(parameter)] = _reference(optimizer.subspace(parameter))
        self._handles: list[RemovableHandle] = []
        if blind:
            return
        self._handles += [prepare_step(optimizer, self._prepare), optimizer.register_step_post_hook(self._after_step)]
        layerwise = Layerwise.of(optimizer)
        if layerwise is not None:
            layerwise.observers.append(self)

    def detach(self) -> None:
        """Leaves the optimizer as it was; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        layerwise = Layerwise.of(self.optimizer)
        if layerwise is not None and self in layerwise.observers:
            layerwise.observers.remove(self)

    def clear(self) -> None:
        """Forgets what was noted."""
        for noted in (self.gradients, self.skipped, self.reached, self.sums, self.known, self.rates):
            noted.clear()
        self.refreshes.clear()
        self.unknown_momenta.clear()

    @torch.no_grad()
    def before_step(self, scaler: GradScaler | None) -> None:
        """Begins a step, of which all gradients are there that were not stepped during backward.

        Args:
            scaler: What scaled the loss.
        """
        self.end_skipped()  # the one before, in the same batch
        self._begun = self.stepped = True
        self._note_rates()
        if not self._handles:
            return
        scaled = scaler is not None and not has_unscaled(scaler, self.optimizer)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.see_gradients(parameters, scaler if scaled else None)

    def end_skipped(self) -> None:
        """Ends a step that was begun and never taken, because a scaler has skipped it."""
        if self._begun:
            self.end()

    @torch.no_grad()
    def end(self, overflow: Tensor | None = None) -> None:
        """Ends the step that is under way, if there is one.

        Args:
            overflow: Tells on the device whether the kernel has skipped the step.
        """
        if self._parameters:
            self.stepped = True
            unit = self.units.unit
            parameters = list(self._parameters.values())
            if self._norms:
                self.gradients.append(self._by_unit(tuple(self._norms), list(self._norms.values())))
            skipped: set[int] | Tensor = {unit[key] for key in self._parameters.keys() - self._prepared}
            self.skipped.append(overflow if overflow is not None and not skipped else skipped)
            self.reached_last = {unit[key] for key in self._parameters}
            self.reached |= self.reached_last
            self._note_subspaces(parameters)
            if self.measures:
                self._measure(parameters)
        self._begun = False
        for noted in (self._parameters, self._norms, self._prepared, self._copies):
            noted.clear()

    # What the layerwise engine calls, too.

    @torch.no_grad()
    def see_gradients(self, parameters: Sequence[Tensor], scaler: GradScaler | None = None) -> None:
        """Takes gradients that were not seen in this step; the scaler is given if they are scaled."""
        # Lean, as all that happens in every step.
        seen = self._parameters
        fresh = {id(p): p for p in parameters if p.grad is not None and id(p) not in seen}
        if not fresh:
            return
        if not fresh.keys() <= self.units.unit.keys():
            self.units.update(self.optimizer)
        seen.update(fresh)
        if not (self.measures or self._looks_always):
            return
        gradients = [local(p.grad) for p in fresh.values() if p.grad is not None]
        found, factor = norms(gradients), None
        if scaler is not None:
            scale: Tensor = scaler.scale(torch.ones((), device=found[0].device))
            factor = scale.reciprocal()
            found = [norm * factor.to(norm.device) for norm in found]
        self._norms.update(zip(fresh, found, strict=True))
        if self.measures and self.histograms is not None:
            for key, gradient in zip(fresh, gradients, strict=True):
                values = gradient if factor is None else gradient * factor.to(gradient.device)
                self.histograms.add("gradients", self.units.name(key), values, self.units.share[key])

    @torch.no_grad()
    def see_step(self, parameters: Sequence[Tensor]) -> None:
        """Compares parameters that were just stepped with what they were before."""
        moved = [parameter for parameter in parameters if id(parameter) in self._copies]
        if moved:
            copies, strides = zip(*(self._copies.pop(id(parameter)) for parameter in moved), strict=True)
            # What a part stands for.
            scales = [p.numel() / (-(-p.numel() // stride)) for p, stride in zip(moved, strides, strict=True)]
            keys = tuple(map(id, moved))
            self._add("weights", keys, norms(list(copies)), scales)
            now = [_part(local(parameter), stride) for parameter, stride in zip(moved, strides, strict=True)]
            kernels.foreach_sub_(list(copies), now)
            self._add("updates", keys, norms(list(copies)), scales)
        if self.measures and "projection" in self._metrics and isinstance(self.optimizer, LowRankOptimizer):
            pairs = [(p, self.optimizer.captured(p, self.units.group[id(p)])) for p in parameters]
            kept = {id(p): square.sqrt() for p, square in pairs if square is not None}
            if kept:
                gradients = [p.grad for p in parameters if id(p) in kept and p.grad is not None]
                self._add("captured", tuple(kept), list(kept.values()))
                self._add("projected", tuple(kept), norms(gradients))

    # Inside.

    @torch.no_grad()
    def _prepare(self, optimizer: Optimizer) -> None:
        """Runs right before a step of the optimizer, or of the part of one that the layerwise engine takes."""
        if Layerwise.of(optimizer) is not None:
            return  # its parts come one by one
        if optimizer is self.optimizer and self._begun and not self.measures:
            self._prepared.update(self._parameters)
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.see_gradients(parameters)  # of a step that Lightning knows nothing of
        self._prepared.update(map(id, parameters))
        if not (self.measures and "update_ratio" in self._metrics):
            return
        views = [local(parameter) for parameter in parameters]
        parts = math.ceil(sum(view.numel() * view.element_size() for view in views) / self._copy_bytes)
        for parameter, view in zip(parameters, views, strict=True):
            stride = _stride(view, parts)
            self.sampled = self.sampled or stride > 1
            self._copies[id(parameter)] = _part(view, stride).clone(), stride

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if Layerwise.of(optimizer) is None:
            self.see_step(list(self._parameters.values()))
        self._note_rates()
        overflow = getattr(optimizer, "found_inf", None)  # a scaler sets it for a kernel that skips by itself
        self.end(overflow if isinstance(overflow, Tensor) else None)

    def _note_rates(self) -> None:
        if self.measures and "lr" in self._metrics:
            self.rates = [_copy(used_rate(self.optimizer, group)) for group in self.optimizer.param_groups]

    def _measure(self, parameters: Sequence[Tensor]) -> None:
        if "momentum_norm" in self._metrics:
            found: dict[int, Tensor] = {}
            for parameter in parameters:
                # One by one: it may have been dequantized.
                norm = momentum_norm(parameter, self.optimizer.state.get(parameter, {}))
                if norm is not None:
                    found[id(parameter)] = norm
                else:
                    self.unknown_momenta.add(self.units.unit[id(parameter)])
            if found:
                self._add("momenta", tuple(found), list(found.values()))
        if self.histograms is not None:
            for parameter in parameters:
                name, share = self.units.name(id(parameter)), self.units.share[id(parameter)]
                self.histograms.add("weights", name, local(parameter), share)

    def _note_subspaces(self, parameters: Sequence[Tensor]) -> None:
        if not isinstance(self.optimizer, LowRankOptimizer):
            return
        for parameter in parameters:
            key, subspace = id(parameter), self.optimizer.subspace(parameter)
            if subspace is None or (key in self._subspaces and _same(self._subspaces[key](), subspace)):
                continue
            self._subspaces[key] = _reference(subspace)
            unit = self.units.unit[key]
            self.refreshes[unit] = self.refreshes.get(unit, 0) + 1

    def _add(
        self, what: str, keys: tuple[int, ...], found: list[Tensor], scales: Sequence[float] | None = None
    ) -> None:
        """Adds norms of parameters, by their ``id``, to a sum of squares."""
        added, before = self._by_unit(keys, found, scales), self.sums.get(what)
        self.sums[what] = added if before is None else added + pad(before, (0, len(added) - len(before)))
        self.known.setdefault(what, set()).update(self._orders[keys].units)

    def _by_unit(self, keys: tuple[int, ...], found: list[Tensor], scales: Sequence[float] | None = None) -> Tensor:
        """Returns sums of squared norms, one for each unit."""
        if keys not in self._orders:
            if len(self._orders) >= _ORDERS:
                self._orders.clear()
            self._orders[keys] = _Order.of(keys, self.units, found)
        order = self._orders[keys]
        if order.mixed:
            found = [norm.to(found[0].device, torch.float32) for norm in found]
        squares = torch.stack(found).float().square_()
        if order.share is not None:
            squares *= order.share
        if scales is not None:
            squares *= torch.tensor(scales, device=squares.device)
        return squares.new_zeros(len(self.units.names)).index_add_(0, order.index, squares)


@dataclass(frozen=True)
class _Order:
    """An order of parameters, with what is needed to add their squares up: made once, for it goes to the device.

    Attributes:
        index: The units.
        share: What this process adds of each; ``None``: all.
        units: The units, each once.
        mixed: Whether the norms are on several devices or of several dtypes.
    """

    index: Tensor
    share: Tensor | None
    units: set[int]
    mixed: bool

    @classmethod
    def of(cls, keys: tuple[int, ...], units: Units, norms: list[Tensor]) -> _Order:
        numbers, shares = [units.unit[key] for key in keys], [units.share[key] for key in keys]
        device = norms[0].device
        share = None if set(shares) == {1.0} else torch.tensor(shares, device=device)
        mixed = len({(norm.device, norm.dtype) for norm in norms}) > 1
        return cls(torch.tensor(numbers, device=device), share, set(numbers), mixed)


def _part(tensor: Tensor, stride: int) -> Tensor:
    return tensor if stride == 1 else tensor.reshape(-1)[::stride]


def _stride(tensor: Tensor, parts: int) -> int:
    """Returns which elements stand for a tensor: every how many, reaching all of its columns."""
    if parts <= 1 or tensor.numel() <= _SMALL:
        return 1
    while math.gcd(parts, tensor.shape[-1]) > 1:
        parts += 1
    return parts


def _copy(rate: float | Tensor) -> float | Tensor:
    # A schedule changes it in place.
    return rate.detach().clone() if isinstance(rate, Tensor) else float(rate)


def _reference(subspace: object) -> Callable[[], object]:
    """Returns a function that returns a subspace, without keeping the memory of one that was replaced."""
    return weakref.ref(subspace) if isinstance(subspace, Tensor) else lambda: subspace


def _same(one: object, other: object) -> bool:
    return one is other or (isinstance(one, int) and one == other)
