"""``lightning-optim list``: the identifiers, one line each."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lightning_optim.command import _machine as machine
from lightning_optim.command import _output as output
from lightning_optim.command._output import CommandError
from lightning_optim.errors import close_names, listing
from lightning_optim.table import SUFFIX, OptimizerSpec, layerwise_row


@dataclass(frozen=True)
class Entry:
    """One identifier.

    Attributes:
        identifier: The name.
        alias_of: The row's name if this is an alias, else ``None``.
        summary: One line.
        implementation: The class whose algorithm runs.
        extra: The extra of our distribution that installs what it needs, or ``None``.
        available: Whether it can run here.
        problems: Why not, each with its remedy.
    """

    identifier: str
    alias_of: str | None
    summary: str
    implementation: str
    extra: str | None
    available: bool
    problems: tuple[str, ...]

    @classmethod
    def of(cls, identifier: str, spec: OptimizerSpec) -> Entry:
        """Describes ``identifier``, a name of ``spec``."""
        problems = machine.problems(spec)
        return cls(
            identifier=identifier,
            alias_of=None if identifier == spec.name else spec.name,
            summary=spec.summary,
            implementation=spec.implementation,
            extra=spec.extra or None,
            available=not problems,
            problems=problems,
        )


@dataclass(frozen=True)
class Listing:
    """What ``list`` shows."""

    optimizers: tuple[Entry, ...]


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the subcommand ``list``."""
    parser = subparsers.add_parser(
        "list",
        help="the identifiers, and whether they can run here",
        description="Lists the identifiers, and whether they can run here.",
    )
    parser.add_argument(
        "patterns", nargs="*", metavar="PATTERN", help="identifiers, or wildcards such as '*8bit*' (quote them)"
    )
    output.add_json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs ``list``."""
    output.show(collect(arguments.patterns), render, arguments.json)
    return 0


def collect(patterns: Sequence[str]) -> Listing:
    """Describes the identifiers that match one of ``patterns``; all if there are none.

    Raises:
        CommandError: If a pattern matches nothing.
    """
    # What steps during backward under its own name needs no other one for it.
    asked = any("layerwise" in pattern for pattern in patterns)
    specs = {}
    for name, spec in machine.identifiers().items():
        specs[name] = spec
        if spec.lists_layerwise or (asked and not (spec.coupled or spec.layerwise)):
            specs[name + SUFFIX] = layerwise_row(spec)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in specs):
            near = _close(pattern, specs)
            hint = f" Close names: {listing(near)}." if near else ""
            raise CommandError(f"no identifier matches {pattern!r}.{hint} `lightning-optim list` shows all.")
    return Listing(
        tuple(
            Entry.of(name, spec)
            for name, spec in specs.items()
            if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
        )
    )


def _close(pattern: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    typed = re.sub(r"[*?\[\]!]", "", pattern)
    # A pattern is often only a word of a name.
    words = close_names(typed, {word for name in names for word in name.split("_")}, limit=1)
    return close_names(typed, names) or [name for name in names if set(words) & set(name.split("_"))][:5]


def render(report: Listing) -> str:
    """Returns the table; reasons stand below it, each once."""
    reasons = list(dict.fromkeys(problem for entry in report.optimizers for problem in entry.problems))
    rows = [["identifier", "summary", "extra", "available"]]
    for entry in report.optimizers:
        notes = ", ".join(str(reasons.index(problem) + 1) for problem in entry.problems)
        rows.append(
            [entry.identifier, entry.summary, entry.extra or "-", "yes" if entry.available else f"no ({notes})"]
        )
    lines = output.table(rows, flexible=1)
    lines.append("")
    for number, reason in enumerate(reasons, start=1):
        lines += [*output.wrap(f"({number}) {reason}", hanging="    "), ""]
    available = sum(entry.available for entry in report.optimizers)
    lines += output.wrap(
        f"{available} of {len(report.optimizers)} can run here. `lightning-optim info NAME` describes one of them; "
        f"NAME{SUFFIX} steps it during backward and frees each gradient at once."
    )
    return "\n".join(lines)
