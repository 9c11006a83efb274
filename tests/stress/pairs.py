"""From axes to cells: a covering array, greedy, seeded, and the same every time."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.stress.axes import AXES, DISTRIBUTED, Cell, Setting, all_pairs, alone

CANDIDATES = 6
#: Whether what is known of these values would hide what else is in a cell that has them.
Clashes = Callable[[Cell], bool]


def array(seed: int, clashes: Clashes) -> list[Cell]:
    """Returns cells in which every two values of any two axes occur together.

    Two values that clash, refused for instance, would keep the others of their cell from being tried: they get a cell
    in which all else is ordinary, and the other cells have no clash, as far as that can be.

    Args:
        seed: Of the choices among equals.
        clashes: Whether a cell is known to end before it has trained, whose other values may be the ordinary ones.
    """
    random_ = random.Random(seed)
    clashing = {pair: alone(*pair)[0] for pair in all_pairs() if all(map(clashes, alone(*pair)))}
    open_pairs = dict.fromkeys(pair for pair in all_pairs() if pair not in clashing)
    cells = list(clashing.values())
    while open_pairs:
        pair = next(iter(open_pairs))
        candidates = [_fill(pair, open_pairs, clashes, random_) for _ in range(CANDIDATES)]
        best = max(candidates, key=lambda cell: (not clashes(cell), _gain(cell, open_pairs)))
        cells.append(best)
        # Of one that clashes nothing else is tried.
        for tried in (pair,) if clashes(best) else best.pairs:
            open_pairs.pop(tried, None)
    return cells


def singles(seed: int, clashes: Clashes) -> list[Cell]:
    """Returns cells in which every value of every axis occurs, as few as the longest axis has."""
    random_ = random.Random(seed)
    # Each axis in an order of its own; the dear values only as often as there is need.
    left = {axis: random_.sample(values, len(values)) for axis, values in AXES.items()}
    names = left.pop("identifier")
    for axis, values in left.items():
        # What few identifiers take comes first, so that these take it.
        values.sort(key=lambda value, axis=axis: -sum(clashes(Cell.of({axis: value, "identifier": n})) for n in names))  # type: ignore[misc]
    cheap = {axis: [v for v in values if not _is_dear((axis, v))] for axis, values in AXES.items()}
    cells = []
    for identifier in names:
        settings = {"identifier": identifier}
        for axis in sorted(random_.sample(list(left), len(left)), key=lambda axis: axis != "module"):
            values = [*left[axis], *random_.sample(cheap[axis], len(cheap[axis]))]
            fitting = (value for value in values if not clashes(Cell.of({**settings, axis: value})))
            settings[axis] = next(fitting, AXES[axis][0])
            if settings[axis] in left[axis]:
                left[axis].remove(settings[axis])
        cells.append(Cell.of(settings))
    return cells


def _gain(cell: Cell, open_pairs: dict[tuple[Setting, Setting], None]) -> int:
    """Returns how many open pairs a cell has, less what its dear values cost."""
    return sum(pair in open_pairs for pair in cell.pairs) - 2 * sum(map(_is_dear, cell.settings))


def _is_dear(setting: Setting) -> bool:
    """Whether a value takes much time: two processes, or compiling."""
    axis, value = setting
    return value in DISTRIBUTED or (axis == "compile" and value != "no")


def _fill(
    pair: tuple[Setting, Setting],
    open_pairs: dict[tuple[Setting, Setting], None],
    clashes: Clashes,
    random_: random.Random,
) -> Cell:
    """Returns a cell with a pair, and with values that cover as many of the open pairs as one sees at each axis."""
    settings = dict(pair)
    axes = [axis for axis in AXES if axis not in settings]
    random_.shuffle(axes)
    # The identifier first: whether others clash depends on it more than on anything else.
    axes.sort(key=lambda axis: axis != "identifier")
    for axis in axes:
        values = random_.sample(AXES[axis], len(AXES[axis]))
        gains = {
            value: sum(_ordered((axis, value), other) in open_pairs for other in settings.items()) for value in values
        }
        gains = {value: gain - 0.5 * _is_dear((axis, value)) for value, gain in gains.items()}
        ranked = sorted(values, key=lambda value: -gains[value])
        fitting = (value for value in ranked if not clashes(Cell.of({**settings, axis: value})))
        settings[axis] = next(fitting, AXES[axis][0])
    return Cell.of(settings)


_ORDER = {axis: place for place, axis in enumerate(AXES)}


def _ordered(one: Setting, other: Setting) -> tuple[Setting, Setting]:
    return (one, other) if _ORDER[one[0]] < _ORDER[other[0]] else (other, one)
