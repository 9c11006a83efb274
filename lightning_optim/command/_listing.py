"""``lightning-optim list``: the identifiers, one line each, and the classes of a collection if they are asked for."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import MISSING
from fnmatch import fnmatchcase

from lightning_optim.command import _machine as machine
from lightning_optim.command import _render as render
from lightning_optim.command._machine import CommandError, Facts
from lightning_optim.command._view import view
from lightning_optim.errors import MissingDependency, UnknownOptimizer, close_names, listing
from lightning_optim.table import REGISTRY, SUFFIX, OptimizerSpec, collection_of, describe, layerwise_row

# The parts of a view that are shown.
_SHOWN = ("identifier", "alias_of", "summary", "implementation", "extra", "available", "problems")


def collect(arguments: argparse.Namespace) -> Facts:
    """Describes the identifiers that match a pattern, or all; raises CommandError if a pattern matches nothing."""
    classes = [pattern for pattern in arguments.patterns if collection_of(pattern)]
    patterns = [pattern for pattern in arguments.patterns if not collection_of(pattern)]
    found = matching(patterns) if patterns or not classes else {}
    names = dict.fromkeys(name for pattern in classes for name in short_names(pattern))
    return {
        "optimizers": [_shown(name, spec) for name, spec in found.items()],
        "collections": [_class(name) for name in names],
    }


def short_names(pattern: str) -> list[str]:
    """Returns the short names that match a pattern such as ``"timm:*"``; only this imports the collection.

    Raises:
        CommandError: If it matches nothing, or the collection cannot be imported.
    """
    collection = collection_of(pattern)
    assert collection is not None
    try:
        members = collection.members(pattern)
    except MissingDependency as error:
        raise CommandError(str(error)) from error
    names = [member.name for member in members.values()]
    found = [name for name in names if fnmatchcase(name.lower(), pattern.lower())]
    if not found:
        near = close_names(re.sub(r"[*?\[\]!]", "", pattern.partition(":")[2]), members)
        hint = f" Close names: {listing(members[name].name for name in near)}." if near else ""
        raise CommandError(
            f"no class of {collection.name} matches {pattern!r}.{hint} "
            f"`lightning-optim list '{collection.name}:*'` shows all."
        )
    return found


def _class(name: str) -> Facts:
    """Describes a class of a collection: where it is, what its constructor takes, or why it cannot be used."""
    try:
        spec = REGISTRY.find(name)
    except UnknownOptimizer as error:
        return {"name": name, "class": None, "takes": {}, "problem": error.text}
    takes: Facts = {"lr": spec.default_lr} | ({"weight_decay": spec.default_weight_decay} if spec.decays else {})
    takes |= {info.name: "required" if info.default is MISSING else info.default for info in describe(spec.options)}
    return {"name": name, "class": spec.implementation, "takes": takes, "problem": None}


def _shown(name: str, spec: OptimizerSpec) -> Facts:
    facts = view(name, spec)
    return {key: facts[key] for key in _SHOWN}


def matching(patterns: Sequence[str]) -> dict[str, OptimizerSpec]:
    """Returns the identifiers that match a pattern, or all, with their rows; those of layerwise forms if asked for.

    Raises:
        CommandError: If a pattern matches nothing.
    """
    # What already steps during backward under its own name needs no suffix for it.
    asked = any("layerwise" in pattern for pattern in patterns)
    specs = {}
    for name, spec in machine.identifiers().items():
        specs[name] = spec
        if spec.lists_layerwise or (asked and not (spec.coupled or spec.layerwise)):
            specs[name + SUFFIX] = layerwise_row(spec)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in specs):
            near = _close(pattern, list(specs))
            hint = f" Close names: {listing(near)}." if near else ""
            raise CommandError(f"no identifier matches {pattern!r}.{hint} `lightning-optim list` shows all.")
    return {
        name: spec
        for name, spec in specs.items()
        if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def _close(pattern: str, names: list[str]) -> list[str]:
    typed = re.sub(r"[*?\[\]!]", "", pattern)
    # A pattern is often only a word of a name.
    words = close_names(typed, {word for name in names for word in name.split("_")}, limit=1)
    return close_names(typed, names) or [name for name in names if set(words) & set(name.split("_"))][:5]


def as_text(report: Facts) -> str:
    """Returns the tables, and below the one of identifiers each reason once."""
    parts = [_identifiers(report["optimizers"])] if report["optimizers"] or not report["collections"] else []
    if report["collections"]:
        parts.append(_classes(report["collections"]))
    return "\n\n".join(parts)


def _classes(entries: list[Facts]) -> str:
    """Returns the table of a collection's classes, and below it each reason once."""
    why = {entry["name"]: _reason(entry) for entry in entries if entry["problem"]}
    reasons = list(dict.fromkeys(why.values()))
    rows = [["name", "class", "takes"]]
    for entry in entries:
        takes = ", ".join(f"{key}={_short(value)}" for key, value in entry["takes"].items())
        refused = f"refused ({reasons.index(why[entry['name']]) + 1})" if entry["problem"] else ""
        rows.append([entry["name"], str(entry["class"] or "-").rpartition(".")[2], refused or takes])
    numbered = (render.wrap(f"({number}) {reason}", hanging="    ") for number, reason in enumerate(reasons, start=1))
    count = render.wrap(
        f"{len(entries) - len(why)} of {len(entries)} can be used. What a class takes besides lr and weight_decay are "
        "optim_args. `lightning-optim check NAME` holds it to the contract."
    )
    return render.sections(render.table(rows, flexible=2), *numbered, count)


def _reason(entry: Facts) -> str:
    return str(entry["problem"]).removeprefix(f"optim={entry['name']!r} ")


def _short(value: object) -> str:
    # Marks such as heavyball's for "as set for all" are plain objects.
    return "..." if type(value) is object else str(value)


def _identifiers(entries: list[Facts]) -> str:
    reasons = list(dict.fromkeys(problem for entry in entries for problem in entry["problems"]))
    rows = [["identifier", "summary", "extra", "available"]]
    for entry in entries:
        notes = ", ".join(str(reasons.index(problem) + 1) for problem in entry["problems"])
        available = "yes" if entry["available"] else f"no ({notes})"
        rows.append([entry["identifier"], entry["summary"], entry["extra"] or "-", available])
    numbered = (render.wrap(f"({number}) {reason}", hanging="    ") for number, reason in enumerate(reasons, start=1))
    count = render.wrap(
        f"{sum(entry['available'] for entry in entries)} of {len(entries)} can run here. `lightning-optim info NAME` "
        f"describes one of them; NAME{SUFFIX} steps it during backward and frees each gradient at once."
    )
    return render.sections(render.table(rows, flexible=1), *numbered, count)
