"""Writes the tables of reliability.md: what came of the matrix, and how many tests try what.

``make stress`` and ``make tried`` wrote what they are made of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_optim.command import markdown_table

BENCH = Path(__file__).parent / "bench"
#: By what ``make stress`` counts, how the page says it.
COUNTED = {
    "cells": "cells",
    "pairs": "pairs of values that occur in them",
    "in two processes": "cells in two processes",
    "trained": "cells that trained",
    "equal: split": "of these, went on from a checkpoint in a fresh process, bit for bit",
    "equal: other": "of these, equal in the other form",
    "equal: rounding": "of these, apart by what rounding is amplified to",
    "equal: control": "of these, equal to plain Lightning with the upstream class, bit for bit",
    "refused": "cells that were refused",
    "exception": "cells that ended by an exception below",
    "hidden pairs": "pairs tried only beside something that kept the cell from training",
    "failed": "cells that failed",
}


def main(target: Path) -> None:
    """Writes the files into the directory ``target``."""
    for name, lines in (("measured-stress", stress()), ("tried", tried())):
        (target / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def stress() -> Iterator[str]:
    """Yields what came of the matrix: counts, what was refused, what is excepted and why."""
    found = _read("stress")
    counts, machine = found["counts"], found["machine"]
    yield from markdown_table(("", "number"), ((text, f"{counts.get(name, 0):,}") for name, text in COUNTED.items()))
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    yield from ("", f"`{found['command']}`, seed {found['seed']}; {machine['device']}; {versions}.")
    yield from ("", "Refused, each as [What is refused](refusals.md) says:", "")
    yield from markdown_table(("what", "cells"), ((row["what"], str(row["cells"])) for row in found["refused"]))
    yield from ("", "Exceptions; *control* means that plain Lightning ends the same way:", "")
    rows = (
        (row["what"], _linked(row["why"]), "yes" if row["lightnings"] else "", str(row["cells"]))
        for row in found["exceptions"]
    )
    yield from markdown_table(("what", "why", "control", "cells"), rows)


def tried() -> Iterator[str]:
    """Yields the table of what tests try."""
    found = _read("tried")
    rows = ((row["what"], f"{row['tests']:,}", str(row["identifiers"]), f"`{row['command']}`") for row in found["rows"])
    yield from markdown_table(("what", "tests", "identifiers", "command"), rows)
    yield from ("", f"`{found['command']}`, {found['date']}, version {found['version']}.")


def _linked(why: str) -> str:
    """Makes the page before a colon a link after it."""
    return re.sub(r"^(([\w-]+)[.]md(?:#[\w-]+)?): (.*)", r"\3 ([\2](\1))", why)


def _read(name: str) -> Any:
    return json.loads((BENCH / f"{name}.json").read_text(encoding="utf-8"))
