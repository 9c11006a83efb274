"""Writes the entries of docs/refusals/, a file for each page, and a list of them for docs/refusals.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from lightning_optim.refusals import SECTIONS, Entry

DOCS = Path(__file__).parent


def main(target: Path) -> None:
    """Writes ``refusals-NAME.md`` for each section, and ``refusals-index.md``."""
    index = []
    for name, entries in SECTIONS.items():
        lines = [line for entry in entries for line in paragraph(entry)]
        (target / f"refusals-{name}.md").write_text("\n".join(lines), encoding="utf-8")
        page = f"refusals/{name}.md"
        links = (f"[{entry.code}]({page}#{entry.code.lower()}-{entry.name}) {entry.name}" for entry in entries)
        index.append(f"**[{title(page)}]({page})**: {', '.join(links)}\n")
    (target / "refusals-index.md").write_text("\n".join(index), encoding="utf-8")


def paragraph(entry: Entry) -> Iterator[str]:
    """Yields an entry under a heading, at the anchor of its code."""
    more = f" More: [{title(entry.page)}](../{entry.page})." if entry.page else ""
    gone = f" Not raised any more: {entry.retired}" if entry.retired else ""
    yield f"({entry.code})="
    yield f"## {entry.code}: {entry.name}\n"
    yield f"{entry.what} {entry.why}{gone}\n"
    yield f"**Instead:** {entry.do}{more}\n"


def title(link: str) -> str:
    """Returns the heading that a link into docs/ leads to, without its code font."""
    page, _, anchor = link.partition("#")
    headings = re.findall(r"^#+ (.*)$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-"): heading for heading in headings}
    return (slugs[anchor] if anchor else headings[0]).replace("`", "")
