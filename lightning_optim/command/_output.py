"""How every subcommand prints: text of at most 100 columns, or strict JSON with the same content."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

WIDTH = 100
_GAP = "  "
# A space at which textwrap does not break a line.
_HARD_SPACE = "\u00a0"

ReportT = TypeVar("ReportT")


class CommandError(Exception):
    """What ends the command with a text on stderr and an exit status other than 0."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json``, which every subcommand has."""
    parser.add_argument("--json", action="store_true", help="print JSON for scripts instead of text")


def show(report: ReportT, render: Callable[[ReportT], str], as_json: bool) -> None:
    """Prints a subcommand's report, a dataclass, as JSON or as the text that ``render`` makes of it."""
    print(json.dumps(plain(report), indent=2, allow_nan=False) if as_json else render(report))


def plain(value: Any) -> Any:
    """Returns ``value`` in the types of strict JSON: infinities and foreign objects become their ``repr``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return repr(value)


def wrap(text: str, indent: str = "", hanging: str = "") -> list[str]:
    """Breaks ``text`` into lines, never inside a command to type; ``hanging`` further indents all but the first."""
    text = re.sub(r"pip install .*$", lambda match: match[0].replace(" ", _HARD_SPACE), text)
    lines = textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_HARD_SPACE, " ") for line in lines]


def columns(rows: Iterable[Sequence[str]], indent: str = "") -> list[str]:
    """Aligns cells, one line per row."""
    rows = list(rows)
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        (indent + _GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def table(rows: Sequence[Sequence[str]], flexible: int) -> list[str]:
    """Aligns cells under their header, ``rows[0]``, breaking those of the column ``flexible`` so that lines fit."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    room = WIDTH - sum(width + len(_GAP) for index, width in enumerate(widths) if index != flexible)
    lines: list[Sequence[str]] = []
    for row in rows:
        first, *rest = textwrap.wrap(row[flexible], room) or [""]
        lines.append([*row[:flexible], first, *row[flexible + 1 :]])
        lines += [["" if index != flexible else piece for index in range(len(row))] for piece in rest]
    return columns(lines)


def properties(pairs: Sequence[tuple[str, str]], indent: str = "") -> list[str]:
    """Aligns names and values, breaking long values."""
    width = max(len(name) for name, _ in pairs) + len(_GAP)
    return [
        line
        for name, value in pairs
        # No break between a name and its value.
        for line in wrap(name.ljust(width).replace(" ", _HARD_SPACE) + value, indent, " " * width)
    ]
