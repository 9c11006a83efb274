"""``lightning-optim explain CODE``: why something is refused, and what to do; without the network or a site."""

from __future__ import annotations

import argparse
import dataclasses

from lightning_optim.command import _render as render
from lightning_optim.command._machine import CommandError, Facts
from lightning_optim.errors import close_names, listing
from lightning_optim.refusals import ENTRIES, Entry


def collect(arguments: argparse.Namespace) -> Facts:
    """Returns the entries that are asked for, or all of them.

    Raises:
        CommandError: If there is no such code or name.
    """
    found = [_find(text) for text in arguments.codes] or [*ENTRIES.values()]
    return {"asked": bool(arguments.codes), "entries": [dataclasses.asdict(entry) for entry in found]}


def _find(text: str) -> Entry:
    named = {entry.name: entry for entry in ENTRIES.values()}
    entry = ENTRIES.get(text.upper()) or named.get(text.lower())
    if entry is None:
        near = close_names(text.replace("-", "_"), named) or [*named][:1]
        raise CommandError(
            f"there is no code and no name {text!r}. Codes are such as {next(iter(ENTRIES))!r}, names such as "
            f"{listing(near)}; `lightning-optim explain` lists all"
        )
    return entry


def as_text(report: Facts) -> str:
    """Returns each entry as a paragraph, or a table of all."""
    if not report["asked"]:
        rows = [["code", "name", "what is refused"]]
        rows += [[entry["code"], entry["name"], entry["what"]] for entry in report["entries"]]
        return "\n".join(render.table(rows, flexible=2))
    return render.sections(*map(_paragraph, report["entries"]))


def _paragraph(entry: Facts) -> list[str]:
    # An installed package has no pages; its source archive and its site do.
    facts = (
        ("refused", entry["what"]),
        ("why", entry["why"]),
        ("instead", entry["do"]),
        ("page", f"docs/{entry['page']}" if entry["page"] else ""),
        ("retired", entry["retired"]),
    )
    return [f"{entry['code']}: {entry['name']}", *render.properties([(name, text) for name, text in facts if text])]
