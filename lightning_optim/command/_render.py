"""How facts are printed: text of at most 100 columns, strict JSON, tables in Markdown."""

from __future__ import annotations

import itertools
import json
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

WIDTH = 100
_GAP = "  "
# A space at which textwrap does not break a line.
_HARD_SPACE = "\u00a0"


def as_json(value: Any) -> str:
    """Returns ``value`` as strict JSON: infinities and other objects become their ``repr``."""
    return json.dumps(_plain(value), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return repr(value)


def sections(*parts: Sequence[str]) -> str:
    """Joins groups of lines, with an empty line between them."""
    return "\n\n".join("\n".join(lines) for lines in parts)


def wrap(text: str, indent: str = "", hanging: str = "", width: int = WIDTH) -> list[str]:
    """Wraps ``text``, but never inside a command to type; ``hanging`` further indents all lines but the first."""
    text = re.sub(r"pip install .*$", lambda match: together(match[0]), text)
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_HARD_SPACE, " ") for line in lines]


def together(text: str) -> str:
    """Returns ``text`` so that :func:`wrap` does not break it."""
    return text.replace(" ", _HARD_SPACE)


def sentences(texts: Iterable[str]) -> list[str]:
    """Returns the lines of a list with dashes as bullets."""
    return [line for text in texts for line in wrap(f"- {text}", "  ", "  ")]


def properties(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Aligns names and values, wrapping long values."""
    width = max(len(name) for name, _ in pairs) + len(_GAP)
    return [line for name, value in pairs for line in wrap(together(name.ljust(width)) + value, "  ", " " * width)]


def table(rows: Sequence[Sequence[str]], indent: str = "", flexible: int | None = None) -> list[str]:
    """Aligns cells, one line per row; those in the column ``flexible`` are wrapped so that the lines fit."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    if flexible is not None:
        fixed = sum(widths) - widths[flexible] + len(_GAP) * (len(widths) - 1)
        broken = ([textwrap.wrap(cell, WIDTH - fixed) or [""] for cell in row] for row in rows)
        return table([line for cells in broken for line in itertools.zip_longest(*cells, fillvalue="")], indent)
    return [
        (indent + _GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def markdown_table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yields the lines of a table for a page."""
    escaped = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    for cells in (header, ["---"] * len(header), *escaped):
        yield f"| {' | '.join(cells)} |"
