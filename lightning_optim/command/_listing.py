"""``lightning-optim list``: the identifiers, one line each."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from lightning_optim.command import _machine as machine
from lightning_optim.command import _render as render
from lightning_optim.command._machine import CommandError, Facts
from lightning_optim.command._view import view
from lightning_optim.errors import close_names, listing
from lightning_optim.table import SUFFIX, OptimizerSpec, layerwise_row

# The parts of a view that are shown.
_SHOWN = ("identifier", "alias_of", "summary", "implementation", "extra", "available", "problems")


def collect(arguments: argparse.Namespace) -> Facts:
    """Describes the identifiers that match a pattern, or all; raises CommandError if a pattern matches nothing."""
    return {"optimizers": [_shown(name, spec) for name, spec in matching(arguments.patterns).items()]}


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
    """Returns the table, and below it each reason once."""
    entries = report["optimizers"]
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
