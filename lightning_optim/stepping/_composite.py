"""Several optimizers as one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim._compat.torch import load_hooks, state_dict_hooks
from lightning_optim.errors import InvalidParamGroups
from lightning_optim.stepping._averaging import KeepsTrainingPoint
from lightning_optim.stepping._clipping import Clipping
from lightning_optim.stepping._state_marks import refuse_other_groups
from lightning_optim.stepping._uncompiled import StepsUncompiled, uncompiled
from lightning_optim.stepping._valid_groups import as_group

#: A group's key for the name of the part that steps it.
PART = "part"


class Composite(StepsUncompiled):
    """Several optimizers, each with its own parameters, that schedules, loggers and checkpoints see as one.

    Its param groups are the parts' groups, the same dicts; its ``state`` is the parts' state, the same dict; its state
    dict is whole, and each part reads and writes what is its own. ``defaults`` holds what all parts have, with the
    values of the first.

    Args:
        parts: The optimizers by name.
        clips: How the gradients of some are clipped, by themselves, in their step.

    Raises:
        InvalidParamGroups: If two of them have a parameter in common.
    """

    def __init__(self, parts: Mapping[str, Optimizer], clips: Mapping[str, Clipping] | None = None) -> None:
        for name, part in parts.items():
            for group in part.param_groups:
                group[PART] = name
        try:
            super().__init__([group for part in parts.values() for group in part.param_groups], {})
        except ValueError as error:
            raise InvalidParamGroups(
                f"the optimizers {', '.join(map(repr, parts))} are not separate: {error}", code="LO323"
            ) from None
        #: The optimizers by name.
        self.parts = dict(parts)
        #: How parts are clipped by themselves, by name.
        self.clips = dict(clips or {})
        first, *others = self.parts.values()
        self.defaults = {key: v for key, v in first.defaults.items() if all(key in part.defaults for part in others)}
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps every part; returns what ``closure`` returns, which runs once."""
        if closure is not None:
            self._train()
        return super().step(closure)

    @uncompiled
    def _train(self) -> None:
        for part in averaging_parts(self):
            part.train()

    @uncompiled
    def _step(self) -> None:
        parts = parts_of(self)
        for name, clipping in self.clips.items():
            clipping.clip(_parameters(self.parts[name].param_groups))
        for part in parts:
            part.step()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the part that it names under ``"part"``; without, to the first."""
        if "parts" not in vars(self):
            # In the constructor: the groups are parts' already.
            super().add_param_group(param_group)
            return
        name = as_group(param_group).get(PART, next(iter(self.parts)))
        given = param_group["params"]
        members = [given] if isinstance(given, Tensor) else list(given)
        if not set(_parameters(self.param_groups)).isdisjoint(members):
            raise ValueError("some parameters appear in more than one parameter group")
        self.parts[name].add_param_group({**param_group, "params": members, PART: name})
        self.param_groups.append(self.parts[name].param_groups[-1])

    @uncompiled
    def state_dict(self) -> dict[str, Any]:
        """Returns one state dict, as any optimizer's; each part writes its own state."""
        before, after = state_dict_hooks(self)
        for hook in before:
            hook(self)
        number = {parameter: index for index, parameter in enumerate(_parameters(self.param_groups))}
        state: dict[int, Any] = {}
        groups: dict[int, Any] = {}
        for part, places in self._places():
            with _alone(part):
                written = part.state_dict()
            own = [number[parameter] for parameter in _parameters(part.param_groups)]
            state |= {own[index]: value for index, value in written["state"].items()}
            for place, group in zip(places, written["param_groups"], strict=True):
                groups[place] = {**group, "params": [own[index] for index in group["params"]]}
        whole: dict[str, Any] = {
            "state": _sorted(state) | self._of_no_parameter(),
            "param_groups": list(_sorted(groups).values()),
        }
        for hook in after:
            whole = hook(self, whole) or whole
        return whole

    @uncompiled
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a whole state dict, all parts of it or none.

        Raises:
            InvalidOption: If another optimizer wrote a part of it, or it belongs to other groups.
        """
        before, after = load_hooks(self)
        for hook in before:
            state_dict = hook(self, state_dict) or state_dict
        saved = state_dict["param_groups"]
        refuse_other_groups(self.param_groups, saved)
        kept = [(part, part.state, part.param_groups) for part in parts_of(self)]
        groups: dict[int, dict[str, Any]] = {}
        try:
            for name, (part, places) in zip(self.parts, list(self._places()), strict=True):
                part.load_state_dict(_extract(state_dict, [saved[place] for place in places]))
                for place, group in zip(places, part.param_groups, strict=True):
                    group[PART] = name
                    groups[place] = group
        except BaseException:
            for part, state, own in kept:
                part.state, part.param_groups = state, own
            raise
        self.param_groups = list(_sorted(groups).values())
        self._share()
        # As torch does with what belongs to no parameter.
        ids = {identity for group in saved for identity in group["params"]}
        self.state.update({key: value for key, value in state_dict["state"].items() if key not in ids})
        for hook in after:
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy needs; each part says what of its own state, which it may have to make copyable first."""
        parts = {}
        for name, part in zip(self.parts, parts_of(self), strict=True):
            with _alone(part):
                parts[name] = (type(part), part.__getstate__())
        return {**super().__getstate__(), "state": self._of_no_parameter(), "parts": parts, "clips": self.clips}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "parts": {}})
        of_no_parameter = self.state
        for name, (kind, own) in state["parts"].items():
            self.parts[name] = kind.__new__(kind)
            self.parts[name].__setstate__(own)
        self._share()
        self.state.update(of_no_parameter)

    def follow_groups(self) -> None:
        """Gives the parts their groups anew where ``param_groups`` was replaced, as finetuning callbacks do."""
        groups = {name: [group for group in self.param_groups if group[PART] == name] for name in self.parts}
        for name, part in self.parts.items():
            if [*map(id, groups[name])] != [*map(id, part.param_groups)]:
                part.param_groups = groups[name]

    def _share(self) -> None:
        """Makes one state out of the parts' states."""
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        for part in self.parts.values():
            state.update(part.state)
        self.state = state
        for part in self.parts.values():
            part.state = state

    def _of_no_parameter(self) -> dict[Any, Any]:
        return {key: value for key, value in self.state.items() if not isinstance(key, Tensor)}

    def _places(self) -> Iterator[tuple[Optimizer, list[int]]]:
        """Yields each part with the positions of its groups."""
        for name, part in zip(self.parts, parts_of(self), strict=True):
            yield part, [place for place, group in enumerate(self.param_groups) if group[PART] == name]


def parts_of(optimizer: Optimizer) -> list[Optimizer]:
    """Returns the optimizers that an optimizer consists of: the parts of a :class:`Composite`, or itself."""
    whole = _composite(optimizer)
    return [optimizer] if whole is None else list(whole.parts.values())


def own_clips(optimizer: Optimizer) -> list[tuple[Clipping, list[Tensor]]]:
    """Returns how parts of an optimizer are clipped by themselves, each with its parameters."""
    whole = _composite(optimizer)
    if whole is None:
        return []
    return [(clip, [*_parameters(whole.parts[name].param_groups)]) for name, clip in whole.clips.items()]


def averaging_parts(optimizer: Optimizer) -> list[KeepsTrainingPoint]:
    """Returns those of an optimizer's parts that are switched between training and evaluation."""
    return [part for part in parts_of(optimizer) if isinstance(part, KeepsTrainingPoint)]


def _composite(optimizer: Optimizer) -> Composite | None:
    """Returns the composite that an optimizer is, or that Lightning's or Fabric's wrapper holds, its groups settled."""
    inside = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inside, Composite):
        return None
    inside.follow_groups()
    return inside


@contextmanager
def _alone(part: Optimizer) -> Iterator[None]:
    """Leaves a part only its own state: torch refuses to write that of parameters that are in no group."""
    shared = part.state
    part.state = defaultdict(dict, {p: shared[p] for p in _parameters(part.param_groups) if p in shared})
    try:
        yield
    finally:
        part.state = shared


def _extract(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the part of a state dict that belongs to some of its groups."""
    state = state_dict["state"]
    ids = [identity for group in groups for identity in group["params"] if identity in state]
    return {**state_dict, "state": {identity: state[identity] for identity in ids}, "param_groups": list(groups)}


def _parameters(groups: Sequence[Mapping[str, Any]]) -> Iterator[Tensor]:
    return (parameter for group in groups for parameter in group["params"])


def _sorted(values: Mapping[int, Any]) -> dict[int, Any]:
    return {key: values[key] for key in sorted(values)}
