"""What the pictures of the pages show: the demo's losses and memory, and losses against memory."""

from __future__ import annotations

from typing import Any

from drawing import Axis, Canvas, Theme, mean_of_last, spread

Facts = dict[str, Any]
MIB = 2**20
SMOOTHED = 20
SHORT = {
    "adamw_torch": "AdamW",
    "adamw_torch_layerwise": "AdamW layerwise",
    "adamw_8bit": "8-bit AdamW",
    "adamw_8bit_layerwise": "8-bit layerwise",
    "galore_adamw": "GaLore",
    "muon": "Muon",
}


def demo(measured: Facts, theme: Theme, narrow: bool = False) -> str:
    """Draws the losses by step, and beside them, or in a narrow picture below, what states and gradients hold."""
    records = measured["records"]
    by_name = {record["optimizer"]: record for record in records}
    share = _held(by_name["adamw_8bit_layerwise"]) / _held(by_name["adamw_torch"])
    label = (
        "Training loss by step of AdamW, its layerwise and 8-bit forms, GaLore and Muon; and what optimizer state and "
        "gradients take with each: "
    ) + ", ".join(f"{record['optimizer']} {_held(record) / MIB:.1f} MiB" for record in records)
    head = [f"AdamW's losses with {share:.0%}", "of its state and gradients"]
    below = ["And lower ones with Muon. A small GPT trained", "on a CPU, on the same batches for all."]
    if not narrow:
        head, below = [" ".join(head)], [" ".join(below)]
    canvas = Canvas(*((470, 990) if narrow else (880, 500)), theme, label)
    for number, line in enumerate(head):
        canvas.text(24, 44 + 32 * number, line, size=26, bold=True)
    for number, line in enumerate(below):
        canvas.text(24, 40 + 32 * len(head) + 22 * number, line, size=17, color=theme.faint)
    with canvas.moved(0, 54 if narrow else 0):
        _curves(canvas, records, 312 if narrow else 398)
    with canvas.moved(-544 if narrow else 0, 484 if narrow else 0):
        _bars(canvas, records)
    return canvas.svg()


def _held(record: Facts) -> int:
    held: int = record["state_bytes"] + record["gradient_bytes"]
    return held


def _curves(canvas: Canvas, records: list[Facts], right: float) -> None:
    theme, left, top, bottom = canvas.theme, 62, 122, 438
    steps = len(records[0]["train_losses"])
    # Those with the same losses, bit for bit, are one curve.
    curves = {
        record["optimizer"]: mean_of_last(record["train_losses"], SMOOTHED)
        for record in records
        if record["losses_of"] == record["optimizer"]
    }
    first = steps // 8  # where all come down from the same height is left out
    lowest = min(curve[-1] for curve in curves.values())
    highest = max(curve[first - 1] for curve in curves.values())
    x, y = Axis(first, steps, left, right), Axis(lowest - 0.03 * (highest - lowest), highest, bottom, top)
    canvas.text(24, 108, f"training loss, mean of {SMOOTHED} steps", size=17, color=theme.faint)
    for tick in y.ticks(0.5):
        canvas.line(left, y(tick), right, y(tick))
        canvas.text(left - 9, y(tick) + 6, f"{tick:.1f}", size=16, color=theme.faint, anchor="end")
    for tick in x.ticks(50):
        canvas.text(x(tick), bottom + 24, f"{tick:.0f}", size=16, color=theme.faint, anchor="middle")
    canvas.text((left + right) / 2, bottom + 46, "step", size=16, color=theme.faint, anchor="middle")
    if len(curves) < len(records):
        canvas.text(200, 160, "One color is one curve:", size=17, color=theme.faint)
        canvas.text(200, 183, "layerwise changes no bit.", size=17, color=theme.faint)
    places = spread([y(curve[-1]) for curve in curves.values()], 23, top + 8, bottom)
    for number, ((name, curve), place) in enumerate(zip(curves.items(), places, strict=True)):
        color = _color(theme, name)
        width = max(2.4, 7 - 2.3 * number)  # what lies below stays visible
        canvas.curve([(x(step + 1), y(curve[step])) for step in range(first - 1, steps)], color, width)
        canvas.curve([(right + 2, y(curve[-1])), (right + 16, place)], color, 1)
        canvas.text(right + 20, place + 6, SHORT[name], size=17, color=color, bold=True)


def _bars(canvas: Canvas, records: list[Facts]) -> None:
    theme, left, right = canvas.theme, 568, 856
    x = Axis(0, max(map(_held, records)), 0, right - left - 46)
    canvas.text(left, 108, "MiB of", size=17, color=theme.faint)
    canvas.bar(left + 60, 94, 15, 15, theme.faint)
    canvas.text(left + 81, 108, "state", size=17, color=theme.faint)
    canvas.bar(left + 137, 94, 15, 15, theme.faint, 0.45)
    canvas.text(left + 158, 108, "gradients", size=17, color=theme.faint)
    row = 354 / len(records)
    for number, record in enumerate(records):
        top, color = 124 + row * number, _color(theme, record["optimizer"])
        state, both = x(record["state_bytes"]), x(_held(record))
        canvas.text(left, top + 16, record["optimizer"], size=16.5, color=color, mono=True)
        canvas.bar(left, top + 24, state, 17, color)
        canvas.bar(left + state + 1, top + 24, both - state, 17, color, 0.45)
        canvas.text(left + both + 9, top + 39, f"{_held(record) / MIB:.1f}", size=17, bold=True)


def _color(theme: Theme, name: str) -> str:
    families = ("adamw_torch", "adamw_8bit", "galore_adamw", "muon")
    return theme.colors[families.index(name.removesuffix("_layerwise"))]


def against_memory(report: Facts, theme: Theme) -> str:
    """Draws the loss at the end against the most memory that was alive; a line goes through the seeds."""
    rows = sorted(report["optimizers"], key=lambda row: row["loss"])
    label = f"{report['metric']} after {report['steps']} steps and peak of memory: " + ", ".join(
        f"{row['identifier']} {row['loss']:.2f} with {row['peak_bytes'] / MIB:.1f} MiB" for row in rows
    )
    canvas = Canvas(880, 560, theme, label)
    canvas.text(24, 44, "Down and to the left is better", size=26, bold=True)
    how = f"at the best of {report['rates']} learning rates, mean of {report['seeds']} seeds"
    canvas.text(24, 72, f"A small GPT after {report['steps']} steps, each {how}", size=17, color=theme.faint)
    left, right, top, bottom = 70, 850, 124, 480
    peaks = [row["peak_bytes"] / MIB for row in rows]
    seeds = [one["value"] for row in rows for one in row["values"]]
    room = 0.06 * (max(seeds) - min(seeds))
    x = Axis(min(peaks) - 0.6, max(peaks) + 1.2, left, right)
    y = Axis(min(seeds) - room, max(seeds) + room, bottom, top)
    step = next(step for step in (0.05, 0.1, 0.2, 0.5, 1.0) if (max(seeds) - min(seeds)) / step < 7)
    for tick in y.ticks(step):
        canvas.line(left, y(tick), right, y(tick))
        canvas.text(
            left - 9, y(tick) + 6, f"{tick:.{1 if step > 0.05 else 2}f}", size=16, color=theme.faint, anchor="end"
        )
    for tick in x.ticks(1):
        canvas.text(x(tick), bottom + 24, f"{tick:.0f}", size=16, color=theme.faint, anchor="middle")
    canvas.text((left + right) / 2, bottom + 50, "peak of memory, MiB", size=17, color=theme.faint, anchor="middle")
    canvas.text(24, 108, "loss", size=17, color=theme.faint)
    places = {row["identifier"]: (x(row["peak_bytes"] / MIB), y(row["loss"])) for row in rows}
    for name, place in places.items():
        if name.endswith("_layerwise") and name.removesuffix("_layerwise") in places:
            plain = places[name.removesuffix("_layerwise")]
            canvas.curve([plain, place], theme.faint, 1.5, dashes="2 5")
    taken: list[Box] = []
    for row in rows:
        across, color = places[row["identifier"]][0], _family(theme, row["identifier"])
        values = [y(one["value"]) for one in row["values"]]
        canvas.line(across, min(values), across, max(values), color, 2)
        taken.append((across - 3, min(values), across + 3, max(values)))
    for name in sorted(places, key=len, reverse=True):  # the longest need most room
        across, down = places[name]
        color = _family(theme, name)
        canvas.dot(across, down, 6, color, hollow=name.endswith("_layerwise"))
        # Beside another's dot, a label would be taken for that one's.
        others = [(at - 26, to - 8, at + 26, to + 8) for other, (at, to) in places.items() if other != name]
        box = _free(across, down, 9.2 * len(name), (left, top, right, bottom), taken + others)
        taken.append(box)
        canvas.text(box[0], box[3] - 5, name, size=15, color=color, mono=True)
    return canvas.svg()


Box = tuple[float, float, float, float]


def _free(across: float, down: float, width: float, frame: Box, taken: list[Box]) -> Box:
    """Returns where a label of this width beside a dot overlaps least with what is there."""
    beside = [(across + 11, down - 10), (across - 11 - width, down - 10)]
    shifted = [(left, down + offset) for offset in (-24, 6, -38, 20) for left in (across + 6, across - width - 6)]
    middle = [(across - width / 2, down + offset) for offset in (-30, 12, 17, -46, 28)]
    boxes = [(left, upper, left + width, upper + 20) for left, upper in (*beside, *middle, *shifted)]

    def cost(box: Box) -> float:
        covered = sum(
            max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
            * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
            for other in taken
        )
        outside = max(0.0, frame[0] - box[0]) + max(0.0, box[2] - frame[2]) + max(0.0, frame[1] - box[1])
        return covered + 100 * (outside + max(0.0, box[3] - frame[3]))

    return min(boxes, key=cost)


def _family(theme: Theme, name: str) -> str:
    """Returns the color of AdamW, of 8-bit forms, of what projects, of Muon, and of all others."""
    if "8bit" in name and "galore" not in name:
        return theme.colors[1]
    for start, color in (("adamw", 0), ("galore", 2), ("apollo", 2), ("muon", 3)):
        if name.startswith(start):
            return theme.colors[color]
    return theme.colors[5]
