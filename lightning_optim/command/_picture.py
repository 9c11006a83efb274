"""Pictures as SVG text, drawn without another package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

# Okabe and Ito's colors, told apart by everybody; black letters can be read on them.
_COLORS = ("#56B4E9", "#999999", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00")
_ROW, _LEFT, _WIDTH, _TOP, _RIGHT = 20, 260, 560, 56, 70


def stacked_bars(title: str, parts: Sequence[str], bars: Mapping[str, Sequence[float]]) -> str:
    """Draws a horizontal bar for each name, from the top.

    Args:
        title: What the numbers are.
        parts: What the pieces of a bar are.
        bars: The pieces' sizes by name.
    """
    height = _TOP + _ROW * len(bars) + 12
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + _RIGHT}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="20" font-size="14">{escape(title)}</text>',
        *_legend(parts),
    ]
    scale = _WIDTH / (max(map(sum, bars.values())) or 1)
    for row, (name, sizes) in enumerate(bars.items()):
        top, left = _TOP + _ROW * row, float(_LEFT)
        lines.append(f'<text x="{_LEFT - 8}" y="{top + 14}" text-anchor="end">{escape(name)}</text>')
        for size, color in zip(sizes, _COLORS, strict=False):
            if size:
                rectangle = f'x="{left:.1f}" y="{top + 3}" width="{size * scale:.1f}" height="{_ROW - 6}"'
                lines.append(f'<rect {rectangle} fill="{color}"/>')
            left += size * scale
        lines.append(f'<text x="{left + 6:.1f}" y="{top + 14}">{sum(sizes):.1f}</text>')
    return "\n".join((*lines, "</svg>")) + "\n"


def _legend(parts: Sequence[str]) -> Iterator[str]:
    left = 12
    for part, color in zip(parts, _COLORS, strict=False):
        yield f'<rect x="{left}" y="32" width="12" height="12" fill="{color}"/>'
        yield f'<text x="{left + 16}" y="42">{escape(part)}</text>'
        left += 34 + 7 * len(part)
