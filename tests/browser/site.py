"""The built pages as files: what each one links to, names and shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

BUILT = Path(__file__).parents[2] / "docs" / "_build"


def pages() -> list[Path]:
    """Returns the pages that Sphinx built.

    Raises:
        FileNotFoundError: If there are none.
    """
    found = sorted(path for path in BUILT.rglob("*.html") if "_static" not in path.parts)
    if not found:
        raise FileNotFoundError(f"no page in {BUILT}: `make docs` builds them")
    return found


@dataclass
class Page(HTMLParser):
    """What the tests look at in a page."""

    path: Path
    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    resources: list[str] = field(default_factory=list)
    images: list[dict[str, str | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids.update(value for name in ("id", "name") if (value := given.get(name)))
        if tag == "a" and (href := given.get("href")):
            self.links.append(href)
        elif tag == "link" and (href := given.get("href")):
            self.resources.append(href)
        elif source := given.get("src"):
            self.resources.append(source)
        for candidate in (given.get("srcset") or "").split(","):
            self.resources += candidate.split()[:1]
        if tag == "img":
            self.images.append(given)
