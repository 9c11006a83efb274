"""``optim_target_modules``: which matrices an optimizer projects, chosen by the modules that own them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_optim.errors import InvalidOption, InvalidParamGroups, listing
from lightning_optim.parameters import NamedParameter

TargetModules = str | Sequence[str] | None
ALL_LINEAR = "all-linear"

# A convolution's weight is projected as the matrix [out, rest].
_PROJECTABLE = (nn.Linear, _ConvNd)

# How many names an error text shows.
_SHOWN = 4

# Modules by name; ``None`` where only the names of their parameters are known.
_Modules = Mapping[str, nn.Module | None]


def check_target_modules(value: Any) -> None:
    """Raises :class:`InvalidOption` unless ``value`` is a string, a list of strings or ``None``."""
    entries = [value] if isinstance(value, str) else value
    if value is None or (
        isinstance(entries, Sequence) and entries and all(isinstance(entry, str) and entry for entry in entries)
    ):
        return
    raise InvalidOption(
        f"optim_target_modules={value!r} ({type(value).__name__}) is neither {ALL_LINEAR!r} nor a regular expression "
        "over module names nor a list of parts of them such as ['attn', 'mlp']"
    )


def projected(parameters: Sequence[NamedParameter], setting: TargetModules) -> set[int]:
    """Returns the ids of the parameters to project: trainable weights of the modules that ``setting`` names.

    Args:
        parameters: All trainable parameters.
        setting: ``"all-linear"`` or ``None``: every ``nn.Linear``. Another string: a regular expression that matches
            whole names of modules. A list: names, parts of names or regular expressions. What it names beside
            ``nn.Linear`` and convolutions is not projected, nor is a weight that is tied to an embedding.

    Raises:
        InvalidParamGroups: If the setting or one of its entries has no effect.
    """
    if not (_is_all_linear(setting) or any(parameter.names for parameter in parameters)):
        raise InvalidParamGroups(
            f"optim_target_modules={setting!r} needs names to match; pass the module or model.named_parameters(), or "
            f"use {ALL_LINEAR!r}, which means every matrix where nothing is known of the modules"
        )
    modules = _owners(parameters)
    named = set(_named(modules, setting))
    found = {
        id(parameter.parameter)
        for parameter in parameters
        if parameter.is_matrix
        and not parameter.is_embedding
        and any(name in named and _is_projectable(owner) for name, owner in parameter.modules)
    }
    if not found:
        means = ", every nn.Linear," if _is_all_linear(setting) else ""
        raise InvalidParamGroups(
            f"optim_target_modules={setting!r}{means} projects nothing: only trainable weights of nn.Linear and of "
            f"convolutions are projected, unless tied to an embedding.{_examples(modules)} Name modules that own such "
            "weights, or use an optimizer that does not project, such as optim='adamw_torch'"
        )
    return found


def left_out(parameters: Sequence[NamedParameter], setting: TargetModules) -> dict[str, str]:
    """Returns the modules that ``setting`` names although nothing of them can be projected, with what they are."""
    if _is_all_linear(setting):
        return {}
    modules = _owners(parameters)
    tied = {name for parameter in parameters if parameter.is_embedding for name, _ in parameter.modules}
    return {
        name: type(modules[name]).__name__ + (" tied to an embedding" if _is_projectable(modules[name]) else "")
        for name in _named(modules, setting)
        if name in tied or not _is_projectable(modules[name])
    }


def _owners(parameters: Sequence[NamedParameter]) -> _Modules:
    """Returns the modules that own trainable parameters themselves."""
    return {name: module for parameter in parameters for name, module in parameter.modules}


def _is_projectable(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, _PROJECTABLE)


def _is_all_linear(setting: TargetModules) -> bool:
    entries = [setting] if isinstance(setting, str) else setting or (ALL_LINEAR,)
    return len(entries) == 1 and entries[0].lower().replace("_", "-") == ALL_LINEAR


def _named(modules: _Modules, setting: TargetModules) -> list[str]:
    """Returns the names of the modules that ``setting`` names, in the model's order."""
    if setting is None or _is_all_linear(setting):
        return [name for name, module in modules.items() if module is None or isinstance(module, nn.Linear)]
    tests = _tests(setting)
    named = {entry: [name for name in modules if matches(name)] for entry, matches in tests.items()}
    unmatched = [entry for entry, names in named.items() if not names]
    if unmatched:
        advice = (
            f"Write the list {_as_list(setting)} to match parts of names instead of whole ones, or {ALL_LINEAR!r}"
            if isinstance(setting, str)
            else f"Write a part of a name, a regular expression over whole names, or {ALL_LINEAR!r} alone"
        )
        raise InvalidParamGroups(
            f"optim_target_modules: {listing(unmatched)} matches no module that owns trainable parameters."
            f"{_examples(modules)} {advice}"
        )
    chosen = {name for names in named.values() for name in names}
    return [name for name in modules if name in chosen]


def _tests(setting: str | Sequence[str]) -> dict[str, Callable[[str], bool]]:
    """Returns by entry what tells whether it matches a module's name."""
    if not isinstance(setting, str):
        every = [entry for entry in setting if _is_all_linear(entry)]
        if every:
            raise InvalidParamGroups(
                f"optim_target_modules={list(setting)!r}: {every[0]!r} beside other entries. Write {ALL_LINEAR!r} "
                "alone, or leave it out of the list"
            )
        return {entry: partial(_matches_entry, entry) for entry in setting}
    try:
        expression = re.compile(setting)
    except re.error as error:
        raise InvalidParamGroups(
            f"optim_target_modules={setting!r} is no regular expression ({error}). Write a list such as "
            "['attn', 'mlp'] to match parts of names"
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


def _examples(modules: _Modules) -> str:
    """Returns a sentence with names of modules, projectable ones first."""
    names = sorted(filter(None, modules), key=lambda name: not _is_projectable(modules[name]))
    more = " and others" if len(names) > _SHOWN else ""
    return f" Modules here: {listing(names[:_SHOWN])}{more}." if names else ""
