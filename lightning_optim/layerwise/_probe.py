"""Asks a class that nobody vouches for whether it steps each parameter on its own, by a few steps of small ones."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim._compat.torch import bare_optimizer
from lightning_optim.errors import IncompatibleTrainer, said
from lightning_optim.layerwise._coupled import Disagreement, differ
from lightning_optim.layerwise._split_step import PRIVATE, SplitStep
from lightning_optim.stepping import MEMBERS, seed, undisturbed

# D-Adaptation's estimate moves in the second step, a common counter shows in the second one, too.
_STEPS = 4
_GROUPS, _DIMENSIONS = 2, 2
# Of a parameter's whole way. Stacks of equal shapes are rounded otherwise than single ones; coupling changes far more.
_ROUNDING = 1e-4
# A schedule may begin at 0, where nothing would move.
_LEAST_RATE = 1e-2
# A decay that depends on all parameters, as Ranger21's, would be lost in rounding.
_LEAST_DECAY = 0.1
# What a group says of its own parameters.
_OWN = ("params", "param_names", "name")

Verdict = Literal["alone", "random", "coupled", "unknown"]


@dataclass(frozen=True)
class Probe:
    """What the steps of small parameters show.

    Attributes:
        verdict: ``"alone"`` if each parameter is stepped on its own; ``"random"`` if it is, but by random numbers that
            depend on the order of the parameters; ``"coupled"`` if one depends on the others; ``"unknown"`` if the
            class does not step such parameters.
        reason: What was seen, for the last two.
        private: Keys of groups that parts write otherwise than the whole, and that no number depends on: parameters and
            states are the same, whichever a step reads.
    """

    verdict: Verdict
    reason: str = ""
    private: frozenset[str] = frozenset()


def probe(optimizer: Optimizer) -> Probe:
    """Compares a step over all parameters with steps over single ones; the optimizer itself is left alone.

    A parameter that comes first in both meets the same random numbers whatever the others draw. If it still differs, it
    depends on the others. The last parameter of another order tells whether numbers depend on the order.
    """
    if type(torch.empty(0, device="cpu")) is not Tensor:
        return Probe("unknown", "inside a fake tensor mode nothing can be compared")
    reason = ""
    devices = dict.fromkeys(("cpu", *(p.device.type for group in optimizer.param_groups for p in group["params"])))
    for make in (_copied, _rebuilt):
        for device in devices:
            if device == "meta":
                continue
            try:
                with undisturbed():
                    return _Probing(optimizer, make, device).verdict()
            except Exception as error:  # whatever a class does with parameters that are not its own
                reason = reason or f"{type(error).__name__}: {said(error)}"
    return Probe("unknown", reason)


_BY_CHANCE = "random numbers"
#: What was found, by class and settings.
_KNOWN: dict[Any, Probe] = {}
# Their classes are known: rows and tests vouch for them.
_VOUCHED_FOR = ("torch.optim.", "lightning_optim.")


def ask(optimizer: Optimizer) -> None:
    """Probes an optimizer of a class that nobody vouches for, once for the same settings in a process.

    Raises:
        IncompatibleTrainer: If it couples its parameters.

    Warns:
        If it draws random numbers, which stepping in parts draws in another order.
    """
    name = type(optimizer).__name__
    if f"{type(optimizer).__module__}.".startswith(_VOUCHED_FOR):
        return
    key = _settled(optimizer)
    found = _KNOWN.get(key)
    if found is None:
        found = probe(optimizer)
        if found.verdict != "unknown":
            _KNOWN[key] = found
        if found.verdict == "random":
            warnings.warn(
                f"{name} draws random numbers while it steps. Stepped during backward it draws them in another order: "
                "the result is another sample than that of plain steps.",
                stacklevel=3,
            )
    if found.verdict == "coupled":
        raise IncompatibleTrainer(
            f"{name} cannot be stepped layer by layer, as a few steps of small parameters show: {found.reason}. Use it "
            "plainly.",
            code="LO610",
        )
    if found.private:
        setattr(optimizer, PRIVATE, found.private)


def _settled(optimizer: Optimizer) -> Any:
    """Returns all that may decide whether parameters are coupled: class, options, numbers of dimensions."""
    groups = [
        {key: value for key, value in group.items() if key not in (*_OWN, "lr", MEMBERS)}
        for group in optimizer.param_groups[:_GROUPS]
    ]
    plain = (bool, int, float, str, type(None))
    attributes = {key: value for key, value in vars(optimizer).items() if isinstance(value, plain)}
    return type(optimizer), repr(groups), repr(attributes), repr(list(_shapes(optimizer)))


@dataclass
class _Outcome:
    """What a run ends with: the parameters, their states, what the state holds besides, the groups after each step.

    ``drew`` says whether a step over all parameters drew random numbers of torch.
    """

    parameters: list[Tensor]
    states: list[dict[str, Any]]
    common: dict[Any, Any]
    groups: list[list[dict[str, Any]]]
    drew: bool


class _Probing:
    """The runs of one probe; every run begins with the same parameters and gets the same gradients."""

    def __init__(self, optimizer: Optimizer, make: Callable[[Optimizer, Any], Optimizer], device: str) -> None:
        self._optimizer, self._make, self._device = optimizer, make, device
        self._members = [(number, shape) for number, shapes in _shapes(optimizer) for shape in shapes]
        self._begin = [_normal(shape, index).to(device) for index, (_, shape) in enumerate(self._members)]
        self._private: set[str] = set()
        # Whether a parameter's state had keys in one form of a run that it had not in another.
        self._uneven = False

    def verdict(self) -> Probe:
        reason = self._reason()
        if reason and reason is not _BY_CHANCE:
            return Probe("coupled", reason)
        return Probe("random" if reason else "alone", private=frozenset(self._private))

    def _reason(self) -> str:
        """Returns what :meth:`_coupling` does, with parts that keep to themselves what none of them began with.

        Such a value is no setting, and no estimate either if it never changes, whatever the gradients. If a number
        depends on it, parameters or states differ: the whole reads its own, and each part another.
        """
        begun = {key for group in self._optimizer.param_groups for key in group}
        while True:
            try:
                return self._coupling()
            except Disagreement as error:
                if not error.of_group or error.key in begun | self._private or self._changes(error.key):
                    return str(error).partition(": ")[0]
                self._private.add(error.key)
            except IncompatibleTrainer as error:
                return str(error).partition(": ")[0]

    def _changes(self, key: str) -> bool:
        """Whether a step over all parameters writes another value into a group than the step before."""
        first, *later = self._run(range(len(self._members))).groups
        return any(differ(new.get(key), old.get(key)) for step in later for new, old in zip(step, first, strict=True))

    def _coupling(self) -> str:
        """Returns what depends on other parameters, or an empty text."""
        everyone = range(len(self._members))
        plain = self._run(everyone)
        # One of each kind in each group comes first in turn.
        first = {(number, len(shape)): index for index, (number, shape) in reversed(list(enumerate(self._members)))}
        for index in first.values():
            group, shape = self._members[index]
            order = sorted(everyone, key=lambda i: (i != index, self._members[i][0] != group))
            together = plain if index == 0 else self._run(order)
            apart = self._run(order, order)
            shared = next((key for key in together.common if differ(together.common[key], apart.common.get(key))), None)
            if shared is not None:
                return f"the state holds {shared!r} for all parameters together, which every part would advance"
            if self._differ(together, apart, index):
                return f"a parameter of shape {shape} moves otherwise when others are stepped with it"
        backwards = self._run(everyone, everyone[::-1])
        if not any(self._differ(plain, backwards, index) for index in everyone):
            # What it draws may matter for larger ones only, as in an estimate that is exact for these.
            chance = _BY_CHANCE if plain.drew else ""
            return (self._crossing(plain) if self._uneven else "") or self._late() or chance
        otherwise = self._run(everyone, draw=1)
        if any(self._differ(plain, otherwise, index) for index in everyone):
            return _BY_CHANCE
        return "a parameter moves otherwise when others are stepped before it"

    def _crossing(self, plain: _Outcome) -> str:
        """Returns what one form of stepping misses in the states of the other, or an empty text.

        A counter that is kept with one parameter for its group shows in the states, and need not matter.
        """
        everyone = range(len(self._members))
        for whole in (range(_STEPS // 2), range(_STEPS // 2, _STEPS)):
            crossed = self._run(everyone, everyone, whole=whole)
            if any(self._differ(plain, crossed, index) for index in everyone):
                return "the state of a parameter holds what others need, too, which parts do not find"
        return ""

    def _late(self) -> str:
        """Returns what depends on when other parameters have their first gradient, or an empty text."""
        everyone = range(len(self._members))
        together, apart = self._run(everyone, late=True), self._run(everyone, everyone, late=True)
        if any(self._differ(together, apart, index) for index in everyone):
            return "a parameter moves otherwise when others have their first gradient later"
        return ""

    def _differ(self, one: _Outcome, other: _Outcome, index: int) -> bool:
        moved = one.parameters[index] - self._begin[index], other.parameters[index] - self._begin[index]
        states = one.states[index], other.states[index]
        self._uneven = self._uneven or _keys(states[0]) != _keys(states[1])
        return _far(*moved) or _far(*states)

    def _run(
        self,
        order: Sequence[int],
        apart: Sequence[int] = (),
        draw: int = 0,
        whole: Collection[int] = (),
        late: bool = False,
    ) -> _Outcome:
        """Takes some steps over all parameters in ``order``; with ``apart`` over one after the other in that order.

        The steps whose numbers are in ``whole`` are over all parameters even then. With ``late``, every second
        parameter has no gradient in the first step.
        """
        parameters = [begin.clone().requires_grad_() for begin in self._begin]
        grouped: dict[int, list[Tensor]] = defaultdict(list)
        for index in order:
            grouped[self._members[index][0]].append(parameters[index])
        groups = [{**_settings(self._optimizer.param_groups[n]), "params": members} for n, members in grouped.items()]
        optimizer = self._make(self._optimizer, groups)
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()  # type: ignore[attr-defined]
        history: list[list[dict[str, Any]]] = []
        drew = False
        for step in range(_STEPS):
            for index, parameter in enumerate(parameters):
                # Norms far from each other and from 1: what clips or adapts all together has something to do.
                scale = 4.0 ** (index % 3 - 1)
                parameter.grad = _normal(parameter.shape, 1000 * step + index + 100).to(self._device) * scale
                if late and step == 0 and index % 2:
                    parameter.grad = None
            seed(1000 * draw + step, optimizer)
            if not apart or step in whole:
                before = self._generator()
                optimizer.step()
                drew = drew or not torch.equal(before, self._generator())
                history.append([_settings(group) for group in optimizer.param_groups])
                continue
            setattr(optimizer, PRIVATE, frozenset(self._private))
            split = SplitStep(optimizer)
            for index in apart:
                if parameters[index].grad is None:
                    continue
                split.inner([parameters[index]]).step()
                if apart == order:
                    # The next to come meets what it would meet as the first, too.
                    seed(1000 * draw + step, optimizer)
            split.commit()
        state: Any = optimizer.state
        common = {key: value for key, value in state.items() if not isinstance(key, Tensor)}
        states = [dict(state.get(p, {})) for p in parameters]
        return _Outcome([p.detach() for p in parameters], states, common, history, drew)

    def _generator(self) -> Tensor:
        """Returns the state of torch's generator for the device."""
        module: Any = torch if self._device == "cpu" else torch.get_device_module(self._device)
        state: Tensor = module.get_rng_state()
        return state


def _far(one: Any, other: Any) -> bool:
    """Whether two values differ by more than rounding; of dicts, what only one has is left out."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape:
            return True
        if not one.is_floating_point():
            return bool((one != other).any())
        largest = torch.nan_to_num(one.detach().abs()).max() if one.numel() else 0.0
        return not torch.allclose(one, other, rtol=0.0, atol=_ROUNDING * float(largest), equal_nan=True)
    if isinstance(one, dict) and isinstance(other, dict):
        return any(_far(one[key], other[key]) for key in one.keys() & other.keys())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) != len(other) or any(map(_far, one, other))
    return isinstance(one, (bool, int, float, str)) and one != other


def _keys(state: Any) -> Any:
    """Returns the keys of a dict, and of those that it holds."""
    return {key: _keys(value) for key, value in state.items()} if isinstance(state, dict) else None


def _shapes(optimizer: Optimizer) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
    """Yields groups by number, each with shapes for small parameters that have as many dimensions as its own."""
    for number, group in enumerate(optimizer.param_groups[:_GROUPS]):
        found = list(dict.fromkeys(p.ndim for p in group["params"]))
        matrices_first = sorted(found, key=lambda dimensions: (dimensions != 2, dimensions))[:_DIMENSIONS]
        yield number, [(6, 4, 3, 2, 2)[:d] for d in matrices_first] + [(5, 4, 2, 2, 2)[:d] for d in matrices_first]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Returns a group without what belongs to its own parameters."""
    settings = {key: copy.deepcopy(value) for key, value in group.items() if key not in _OWN}
    if "lr" in settings and settings["lr"] < _LEAST_RATE:
        settings["lr"] = (
            torch.full_like(settings["lr"], _LEAST_RATE) if isinstance(settings["lr"], Tensor) else _LEAST_RATE
        )
    decay = settings.get("weight_decay")
    if isinstance(decay, float) and 0.0 < decay < _LEAST_DECAY:
        settings["weight_decay"] = _LEAST_DECAY
    return settings


def _copied(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """Returns an optimizer with these groups and the attributes of another, its settings and its settings only."""
    attributes = {k: copy.deepcopy(v) for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    made = bare_optimizer(type(optimizer), attributes)
    made.state = defaultdict(dict)
    made.param_groups = groups
    return made


def _rebuilt(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """Returns an optimizer of the same class, for one whose constructor prepares states."""
    known = {**vars(optimizer), **optimizer.defaults}
    taken = list(inspect.signature(type(optimizer)).parameters)[1:]
    return type(optimizer)(groups, **{name: copy.deepcopy(known[name]) for name in taken if name in known})


def _normal(shape: Sequence[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
