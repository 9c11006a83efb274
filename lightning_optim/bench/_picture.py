"""A picture of a report: loss against memory, and the losses on the way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_optim.bench._report import Facts
from lightning_optim.errors import MissingDependency

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MIB = 2**20
_COLORS, _MARKERS = 10, "osD^v<>PX*p"


def new_figure() -> Figure:
    """Returns an empty figure; called before anything is measured, so that a lack is known then.

    Raises:
        MissingDependency: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependency(
            "the picture needs matplotlib: pip install matplotlib. Or leave the picture out: --no-picture", code="LO107"
        ) from error
    return Figure(figsize=(12, 4.5), layout="constrained")


def draw(report: Facts, path: Path) -> None:
    """Writes the picture of ``report``, a PNG whatever the path's suffix.

    Raises:
        MissingDependency: If matplotlib is not installed.
    """
    figure = new_figure()
    against_memory, curves = figure.subplots(1, 2)
    rows = [row for row in report["optimizers"] if row["loss"] is not None]
    for number, row in enumerate(rows):
        style: dict[str, Any] = {"color": f"C{number % _COLORS}", "marker": _MARKERS[number % len(_MARKERS)]}
        _point(against_memory, row, style)
        steps, losses = [point["step"] for point in row["curve"]], [point["loss"] for point in row["curve"]]
        # What lies below stays visible where curves agree.
        width = 1 + 3 * (1 - number / len(rows))
        curves.plot(
            steps, losses, label=_label(row, rows), linewidth=width, markersize=6, markevery=_every(steps), **style
        )
    metric = report["metric"]
    against_memory.set(title=f"{metric} at the end: seeds and mean", xlabel="peak memory, MiB", ylabel=metric)
    curves.set(title="Training loss: mean of the seeds", xlabel="step", ylabel="training loss")
    _between_extremes(curves, rows)
    if rows:
        figure.legend(*curves.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="x-small")
    for axes in (against_memory, curves):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, format="png")


def _label(row: Facts, rows: list[Facts]) -> str:
    """Returns the identifier, with its options where another one differs by them only."""
    alone = [one["identifier"] for one in rows].count(row["identifier"]) == 1
    return str(row["identifier"] if alone else row["optimizer"])


def _every(steps: list[int]) -> int:
    return max(1, len(steps) // 5)


def _point(axes: Axes, row: Facts, style: dict[str, Any]) -> None:
    if row["peak_bytes"] is None:
        return
    memory = row["peak_bytes"] / _MIB
    values = [one["value"] for one in row["values"]]
    axes.plot([memory] * len(values), values, linestyle="", alpha=0.35, markersize=4, **style)
    axes.plot(memory, row["loss"], markersize=8, **style)


def _between_extremes(axes: Axes, rows: list[Facts]) -> None:
    """Cuts off the first part of the way, where all come down from the same height."""
    later = [point["loss"] for row in rows for point in row["curve"][len(row["curve"]) // 5 :]]
    if later:
        margin = 0.05 * (max(later) - min(later) or 1.0)
        axes.set_ylim(min(later) - margin, max(later) + margin)
