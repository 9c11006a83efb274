"""Pictures as SVG text: the same bytes on every machine, in colors for a light and for a dark page.

Text stays text, in the fonts of whoever looks at it, and takes at most the room that is left for it here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape

SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


@dataclass(frozen=True)
class Theme:
    """Colors on a page, told apart by everybody; text in them can be read."""

    name: str
    background: str
    ink: str
    faint: str
    rule: str
    colors: tuple[str, ...]


# Blue, orange, green, purple, grey and yellow, after Okabe and Ito.
LIGHT = Theme(
    "light",
    "#ffffff",
    "#1f2328",
    "#59636e",
    "#d8dee4",
    ("#0068a6", "#b84a00", "#007a56", "#a8437f", "#59636e", "#8a6100"),
)
DARK = Theme(
    "dark",
    "#131416",
    "#f0f3f6",
    "#a3acb6",
    "#3a4048",
    ("#58b1ea", "#ff9248", "#2fc99c", "#e58bbe", "#a3acb6", "#e8c04a"),
)
THEMES = (LIGHT, DARK)


class Canvas:
    """Collects shapes; numbers are in the picture's own units.

    Args:
        width: Of the picture.
        height: Of the picture.
        theme: Its colors.
        label: What it shows, in words, for who cannot see it.
    """

    def __init__(self, width: int, height: int, theme: Theme, label: str) -> None:
        self.theme = theme
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" font-family="{SANS}">',
            f"<title>{escape(label)}</title>",
            f'<rect width="{width}" height="{height}" rx="8" fill="{theme.background}"/>',
        ]

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 15,
        color: str = "",
        anchor: str = "start",
        bold: bool = False,
        mono: bool = False,
    ) -> None:
        """Writes a line; ``y`` is where its letters stand."""
        more = ' font-weight="600"' if bold else ""
        more += f' font-family="{MONO}"' if mono else ""
        more += f' text-anchor="{anchor}"' if anchor != "start" else ""
        fill = color or self.theme.ink
        self.lines.append(
            f'<text x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}" fill="{fill}"{more}>{escape(text)}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, color: str = "", width: float = 1) -> None:
        """Draws a straight line."""
        place = f'x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"'
        self.lines.append(f'<line {place} stroke="{color or self.theme.rule}" stroke-width="{_n(width)}"/>')

    def curve(self, points: Iterable[tuple[float, float]], color: str, width: float = 2.5, dashes: str = "") -> None:
        """Draws a line through points."""
        way = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        more = f' stroke-dasharray="{dashes}"' if dashes else ""
        self.lines.append(
            f'<polyline points="{way}" fill="none" stroke="{color}" stroke-width="{_n(width)}" '
            f'stroke-linejoin="round" stroke-linecap="round"{more}/>'
        )

    def bar(self, x: float, y: float, width: float, height: float, color: str, opacity: float = 1) -> None:
        """Draws a rectangle."""
        more = f' fill-opacity="{_n(opacity)}"' if opacity < 1 else ""
        place = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'
        self.lines.append(f'<rect {place} fill="{color}"{more}/>')

    def dot(self, x: float, y: float, radius: float, color: str, hollow: bool = False) -> None:
        """Draws a disc, or a ring."""
        fill = self.theme.background if hollow else color
        self.lines.append(
            f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" fill="{fill}" stroke="{color}" stroke-width="2"/>'
        )

    @contextmanager
    def moved(self, x: float, y: float) -> Iterator[None]:
        """Moves what is drawn inside of it to the right and down."""
        self.lines.append(f'<g transform="translate({_n(x)} {_n(y)})">')
        yield
        self.lines.append("</g>")

    def svg(self) -> str:
        """Returns the picture."""
        return "\n".join((*self.lines, "</svg>")) + "\n"


@dataclass(frozen=True)
class Axis:
    """From values to places; ``start`` and ``end`` are the places of ``low`` and ``high``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, step: float) -> list[float]:
        """Returns the multiples of ``step`` in the range."""
        first = -(-self.low // step)
        return [step * number for number in range(int(first), int(self.high / step + 1e-9) + 1)]


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Returns places near those given, in their order, ``gap`` apart and between ``low`` and ``high``."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    found = list(places)
    for _ in range(200):
        for one, other in itertools.pairwise(order):
            lack = gap - (found[other] - found[one])
            if lack > 1e-9:
                found[one] -= lack / 2
                found[other] += lack / 2
        found = [min(max(place, low), high) for place in found]
    return found


def mean_of_last(values: Sequence[float], number: int) -> list[float]:
    """Returns for each value the mean of the last ``number`` up to it."""
    found = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - number) : end]
        found.append(sum(window) / len(window))
    return found


def _n(number: float) -> str:
    """Writes a number as short as it can be, to a tenth."""
    return f"{round(number, 1) + 0.0:.1f}".removesuffix(".0")
