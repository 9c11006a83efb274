"""What is said of one code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Why something is refused, and what to do.

    The texts are Markdown with nothing but backticks, so that a terminal shows them well, too.

    Attributes:
        code: What the error's text ends with. It keeps its meaning forever, and is never given to something else.
        name: A short name, as stable.
        what: What is refused.
        why: The reason.
        do: What to type instead.
        page: The page of ``docs/`` about it, with its anchor if there is one.
        retired: Since which version nothing raises it, or empty.
    """

    code: str
    name: str
    what: str
    why: str
    do: str
    page: str = ""
    retired: str = ""
