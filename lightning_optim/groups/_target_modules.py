"""``optim_target_modules``: which matrices an optimizer projects, chosen by the names of modules or parameters.

What a name selects is decided in this order:

- a weight of an ``nn.Linear``, and a matrix called ``weight`` of any other module that is neither an embedding nor a
  norm (GPT-2's ``Conv1D``, routers);
- a convolution's weight, as the matrix ``[out, rest]``;
- a stack of matrices ``[..., m, n]``, such as the experts of a mixture, each matrix separately: if a module's own
  weights are all of this kind;
- any other matrix or stack only if the parameter itself is named, not just its module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_optim._compat.torch import AnyConvolution
from lightning_optim.errors import InvalidOption, InvalidParamGroups, listing
from lightning_optim.groups._parameters import NamedParameter

TargetModules = str | Sequence[str] | None
ALL_LINEAR = "all-linear"

# How many names an error text shows.
_SHOWN = 4

# Custom layers are recognized by class name: lookup tables, and convolutions, whose weights are not stacks.
_TABLE = re.compile(r"Embed|Position")
_CONVOLUTION = re.compile(r"Conv", re.IGNORECASE)

# The parameters that each module owns directly, by the module's name.
_Owned = Mapping[str, Sequence["_Place"]]


@dataclass(frozen=True)
class _Place:
    """One name of a parameter; tied parameters have several.

    Attributes:
        parameter: The parameter.
        name: This name, empty if it has none.
        module: Name of the module that owns it there.
        owner: That module; ``None`` if only names were given.
    """

    parameter: NamedParameter
    name: str
    module: str
    owner: nn.Module | None

    @property
    def is_weight(self) -> bool:
        """Whether its layer's class calls it ``weight``."""
        return self.name.rpartition(".")[2] == "weight"


def check_target_modules(value: Any) -> None:
    """Raises :class:`InvalidOption` unless ``value`` is a string, a list of strings or ``None``."""
    entries = [value] if isinstance(value, str) else value
    if value is None or (
        isinstance(entries, Sequence) and entries and all(isinstance(entry, str) and entry for entry in entries)
    ):
        return
    raise InvalidOption(
        f"optim_target_modules={value!r} ({type(value).__name__}) is neither {ALL_LINEAR!r} nor a regular expression "
        "over names of modules and parameters nor a list of parts of them such as ['attn', 'mlp']",
        code="LO313",
    )


def projected(parameters: Sequence[NamedParameter], setting: TargetModules) -> dict[int, int]:
    """Returns the parameters to project, by id, each with the number of its leading dimensions that index matrices.

    Args:
        parameters: All trainable parameters.
        setting: ``"all-linear"`` or ``None``: every matrix and stack of matrices recognized by its module, but no
            convolution. Another string: a regular expression over whole names of modules or parameters. A list: names,
            parts of names or regular expressions. A weight tied to an embedding is never projected.

    Raises:
        InvalidParamGroups: If the setting or one of its entries has no effect.
    """
    if not (_is_all_linear(setting) or any(parameter.names for parameter in parameters)):
        raise InvalidParamGroups(
            f"optim_target_modules={setting!r} needs names to match; pass the module or model.named_parameters(), or "
            f"use {ALL_LINEAR!r}, which means every matrix if the modules are unknown",
            code="LO313",
        )
    owned = _owned(parameters)
    found: dict[int, int] = {}
    for place, by_its_name in _named(owned, setting):
        stack_dims = _stack_dims(place, owned[place.module], by_its_name)
        if stack_dims is not None:
            found.setdefault(id(place.parameter.parameter), stack_dims)
    if not found:
        means = ", every linear layer and stack of matrices," if _is_all_linear(setting) else ""
        others = [f"{name!r} ({kind})" for name, kind in left_out(parameters, setting).items()]
        more = " and others" if len(others) > _SHOWN else ""
        matched = f": it names {', '.join(others[:_SHOWN])}{more}" if others else ""
        raise InvalidParamGroups(
            f"optim_target_modules={setting!r}{means} projects nothing{matched}. It can project trainable weights of "
            "nn.Linear and of convolutions, a matrix called 'weight' of another module, stacks of matrices such as "
            "experts, and any matrix named by its parameter's own name; not biases, norms, embeddings, or weights tied "
            f"to an embedding.{_examples(owned)} Name such weights, or use an optimizer that does not project, such as "
            "optim='adamw_torch'",
            code="LO312",
        )
    return found


def matrices(parameters: Sequence[NamedParameter], setting: TargetModules = None) -> dict[int, int]:
    """Returns what ``projected`` does, except that ``None`` takes convolutions as well, and may find nothing.

    Without names and modules these are all parameters of at least two dimensions.
    """
    if setting is not None:
        return projected(parameters, setting)
    owned = _owned(parameters)
    found: dict[int, int] = {}
    for siblings in owned.values():
        for place in siblings:
            stack_dims = _stack_dims(place, siblings)
            if stack_dims is not None:
                found.setdefault(id(place.parameter.parameter), stack_dims)
    return found


def left_out(parameters: Sequence[NamedParameter], setting: TargetModules) -> dict[str, str]:
    """Returns the modules that ``setting`` names although nothing in them can be projected, with their kinds."""
    if _is_all_linear(setting):
        return {}
    owned = _owned(parameters)
    effective: dict[str, bool] = {}
    for place, by_its_name in _named(owned, setting):
        takes = _stack_dims(place, owned[place.module], by_its_name) is not None
        effective[place.module] = effective.get(place.module, False) or takes
    return {name: _kind(owned[name]) for name, takes in effective.items() if not takes}


def _owned(parameters: Sequence[NamedParameter]) -> dict[str, list[_Place]]:
    owned: dict[str, list[_Place]] = {}
    for parameter in parameters:
        for name, (module, owner) in zip(parameter.names or ("",), parameter.modules, strict=True):
            owned.setdefault(module, []).append(_Place(parameter, name, module, owner))
    return owned


def _stack_dims(place: _Place, siblings: Sequence[_Place], by_its_name: bool = False) -> int | None:
    """Returns how many leading dimensions of a parameter index matrices; ``None`` if it is not projected.

    ``siblings`` are all parameters of its module; ``by_its_name`` means that the parameter itself is named.
    """
    owner, dims = place.owner, place.parameter.parameter.ndim
    if not place.parameter.decays or place.parameter.is_embedding or isinstance(owner, ParametrizationList):
        return None
    if isinstance(owner, AnyConvolution):
        return 0
    if owner is None:
        # Only the name distinguishes experts from a convolution's kernels: layers call theirs weight.
        return 0 if dims == 2 or place.is_weight or not place.name else dims - 2
    if dims > 2 and _CONVOLUTION.search(type(owner).__name__):
        return None
    if by_its_name or isinstance(owner, nn.Linear):
        return dims - 2
    if _TABLE.search(type(owner).__name__):
        return None
    if dims == 2:
        return 0 if place.is_weight else None
    return dims - 2 if all(map(_is_stack, (each for each in siblings if not each.parameter.is_bias))) else None


def _is_stack(place: _Place) -> bool:
    shape = place.parameter.parameter.shape
    # Not tokens and position tables: [1, n, width] and [1, 1, width].
    return len(shape) > 2 and math.prod(shape[:-2]) > 1 and min(shape[-2:]) > 1


def _kind(places: Sequence[_Place]) -> str:
    """Returns, for an error text, the kind of a module whose parameters cannot be projected."""
    owner = places[0].owner
    tied = any(place.parameter.is_embedding for place in places) and not isinstance(
        owner, (nn.Embedding, nn.EmbeddingBag)
    )
    return (type(owner).__name__ if owner is not None else "of unknown kind") + (
        " tied to an embedding" if tied else ""
    )


def _is_all_linear(setting: TargetModules) -> bool:
    entries = [setting] if isinstance(setting, str) else setting or (ALL_LINEAR,)
    return len(entries) == 1 and entries[0].lower().replace("_", "-") == ALL_LINEAR


def _named(owned: _Owned, setting: TargetModules) -> Iterator[tuple[_Place, bool]]:
    """Yields what ``setting`` names, in the model's order, with whether only the parameter's own name matches."""
    places = [place for each in owned.values() for place in each]
    if setting is None or _is_all_linear(setting):
        yield from ((place, False) for place in places if not isinstance(place.owner, AnyConvolution))
        return
    tests = _tests(setting)
    matched = {
        entry: [place for place in places if matches(place.module) or matches(place.name)]
        for entry, matches in tests.items()
    }
    unmatched = [entry for entry, found in matched.items() if not found]
    if unmatched:
        advice = (
            f"Write the list {_as_list(setting)} to match parts of names instead of whole ones, or {ALL_LINEAR!r}"
            if isinstance(setting, str)
            else f"Write parts of names{_split(unmatched)}, expressions over whole names, or {ALL_LINEAR!r} alone"
        )
        raise InvalidParamGroups(
            f"optim_target_modules: {listing(unmatched)} matches no module that owns trainable parameters and none of "
            f"these by name.{_examples(owned)} {advice}",
            code="LO312",
        )
    for place in places:
        by_module = any(matches(place.module) for matches in tests.values())
        if by_module or any(matches(place.name) for matches in tests.values()):
            yield place, any(matches(place.name) and not matches(place.module) for matches in tests.values())


def _tests(setting: str | Sequence[str]) -> dict[str, Callable[[str], bool]]:
    """Returns, for each entry, a function that tells whether it matches a name."""
    if not isinstance(setting, str):
        every = [entry for entry in setting if _is_all_linear(entry)]
        if every:
            raise InvalidParamGroups(
                f"optim_target_modules={list(setting)!r}: {every[0]!r} together with other entries. Write "
                f"{ALL_LINEAR!r} alone, or leave it out of the list",
                code="LO313",
            )
        return {entry: partial(_matches_entry, entry) for entry in setting}
    try:
        expression = re.compile(setting)
    except re.error as error:
        raise InvalidParamGroups(
            f"optim_target_modules={setting!r} is not a regular expression ({error}). Write a list such as "
            "['attn', 'mlp'] to match parts of names",
            code="LO303",
        ) from None
    return {setting: lambda name: expression.fullmatch(name) is not None}


def _matches_entry(entry: str, name: str) -> bool:
    if entry in name:
        return True
    try:
        return re.fullmatch(entry, name) is not None
    except re.error:
        return False


def _as_list(text: str) -> list[str]:
    """Returns what was probably meant by ``"attn,mlp"``."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _split(entries: Sequence[str]) -> str:
    """Returns what was probably meant by ``["attn,mlp"]``, for an error text."""
    parts = [part for entry in entries for part in _as_list(entry)]
    return f" such as {parts}" if len(parts) > len(entries) else ""


def _examples(owned: _Owned) -> str:
    """Returns a sentence with names of modules, those with something to project first."""

    def is_projectable(name: str) -> bool:
        return any(_stack_dims(place, owned[name]) is not None for place in owned[name])

    names = sorted(filter(None, owned), key=lambda name: not is_projectable(name))
    more = " and others" if len(names) > _SHOWN else ""
    return f" Modules here: {listing(names[:_SHOWN])}{more}." if names else ""
