"""Draws the pictures in docs/pictures/ and writes the tables between markers in the pages, from docs/bench/*.json.

A table of a page stands between ``<!-- figures: NAME -->`` and ``<!-- /figures -->``; ``TABLES`` says what NAME writes.
Nothing is measured here: the commands that wrote the files stand in them. Run by ``make figures``; with ``--check`` it
changes nothing, says what would change and fails if anything does.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from drawing import THEMES, Theme
from pictures_of import against_memory, demo
from step_times import OTHERS, PROJECTING, own, stacks, steps
from wishes import wishes

from lightning_optim.command import markdown_table

ROOT = Path(__file__).parents[1]
GIB = 2**30
#: Memory of cards that are sold, in GiB; this much of it is left to what is not counted.
CARDS, SPARE = (16, 24, 32, 40, 48, 80, 141, 192), 2
MARKED = re.compile(r"(?P<open><!-- figures: (?P<name>[\w-]+) -->\n).*?(?P<close><!-- /figures -->)", re.DOTALL)

Facts = dict[str, Any]


def read(name: str) -> Facts:
    """Returns what a command wrote into docs/bench/."""
    found: Facts = json.loads((ROOT / "docs" / "bench" / f"{name}.json").read_text(encoding="utf-8"))
    return found


# What is drawn.

#: By name of the picture: what draws it, and from which file.
PICTURES: dict[str, tuple[Callable[[Facts, Theme], str], str]] = {
    "demo": (demo, "demo"),
    "demo-narrow": (partial(demo, narrow=True), "demo"),
    "memory": (against_memory, "choose"),
}


def pictures() -> dict[Path, str]:
    """Returns the text of every picture, on a light and on a dark page."""
    return {
        ROOT / "docs" / "pictures" / f"{name}-{theme.name}.svg": draw(read(source), theme)
        for name, (draw, source) in PICTURES.items()
        for theme in THEMES
    }


# What is tabulated.


def memory_7b() -> Iterator[str]:
    """Yields what training a 7B takes on one device, those that need most first."""
    names = ("adamw_torch", "adamw_torch_layerwise", "muon", "adamw_8bit", "adamw_8bit_layerwise")
    names += ("adamw_torch_4bit_layerwise", "lion_8bit_layerwise", "galore_adamw_8bit_layerwise")
    names += ("apollo_mini_layerwise", "lomo")
    records = {one["asked"]: one for one in read("memory")["records"] if _on_one(one, "llama-7b")}
    rows = []
    for one in sorted((records[name] for name in names), key=lambda one: -one["peak"]):
        sizes = (f"{one[part] / GIB:.1f}" for part in ("state", "gradients", "peak"))
        rows.append((f"`{one['asked']}`", *sizes, _card(one["peak"])))
    yield from markdown_table(("identifier", "state, GiB", "gradients, GiB", "peak, GiB", "card"), rows)


def memory_of(shape: str) -> Callable[[], Iterator[str]]:
    """Returns what yields the peaks of one device by identifier and strategy."""

    def table() -> Iterator[str]:
        records = [one for one in read("memory")["records"] if one["shape"] == shape]
        columns = list(dict.fromkeys((one["strategy"], one["devices"], one["layerwise"]) for one in records))
        cells = {(one["optim"], (one["strategy"], one["devices"], one["layerwise"])): one for one in records}
        header = ["identifier", "state", *map(_column, columns)]
        rows = []
        for name in dict.fromkeys(one["optim"] for one in records):
            own = [cells.get((name, column)) for column in columns]
            state = next(one["state"] for one in own if one and "peak" in one)
            rows.append((f"`{name}`", f"{state / GIB:.1f}", *map(_peak, own)))
        yield from markdown_table(header, rows)

    return table


def commands_of(shape: str) -> Callable[[], Iterator[str]]:
    """Returns what yields the commands that print a table's numbers."""

    def lines() -> Iterator[str]:
        yield "```console no-run"
        for command in dict.fromkeys(one["command"] for one in read("memory")["records"] if one["shape"] == shape):
            yield f"$ {command}"
        yield "```"

    return lines


def _column(column: tuple[str, int, bool]) -> str:
    strategy, devices, layerwise = column
    if devices == 1:
        return "one device, `_layerwise`" if layerwise else "one device"
    return f"`{strategy}`, {devices}"


def _peak(record: Facts | None) -> str:
    if record is None:
        return ""
    return "no" if "refused" in record else f"{record['peak'] / GIB:.1f}"


def _on_one(record: Facts, shape: str) -> bool:
    return record["shape"] == shape and record["devices"] == 1


def _card(peak: int) -> str:
    """Returns the smallest card that has this much and something to spare."""
    return next((f"{size} GB" for size in CARDS if peak / GIB + SPARE <= size), f"more than {CARDS[-1]} GB")


def papers_galore() -> Iterator[str]:
    """Yields GaLore's table 6b beside ours."""
    header = ("shape", "paper, GB", "parameters' dtype", "float32", "parameters' dtype, blocks only")
    rows = (
        (one["shape"], one["paper"], *(f"{size / 1e9:.2f}" for size in one["bytes"]))
        for one in read("memory_papers")["galore"]
    )
    yield from markdown_table(header, rows)


def papers_apollo() -> Iterator[str]:
    """Yields APOLLO's figures beside ours."""
    rows = (
        (
            f"`{one['optim']}`",
            f"{one['paper']} G",
            f"`{one['options']}`" if one["options"] else "defaults",
            f"{one['bytes'] / 1e9:.2f}",
            f"{one['bytes'] / GIB:.2f}",
        )
        for one in read("memory_papers")["apollo"]
    )
    yield from markdown_table(("identifier", "paper", "options", "GB", "GiB"), rows)


def papers_8bit() -> Iterator[str]:
    """Yields how much less state 8 bits take."""
    whole, *others = read("memory_papers")["gpt2-medium"]
    rows = (
        (
            ", ".join((f"`{one['optim']}`", f"`{one['options']}`" if one["options"] else "defaults")),
            f"{1 - one['bytes'] / whole['bytes']:.1%}",
        )
        for one in others
    )
    yield from markdown_table(("GPT-2 medium, float32", f"less state than `{whole['optim']}`"), rows)


def measured() -> Iterator[str]:
    """Yields losses and memory of what is compared on the page "Which optimizer?", and where that was."""
    report = read("choose")
    rows, options = [], []
    for row in sorted(report["optimizers"], key=lambda row: row["loss"]):
        difference = row["difference"]
        shown = [f"{difference[name]:+.3f}" for name in ("mean", "low", "high")] if difference else []
        interval = f"{shown[0]} ({shown[1]} to {shown[2]})" if shown else ""
        sizes = (f"{row[part] / 2**20:.1f}" for part in ("state_bytes", "peak_bytes"))
        rows.append((f"`{row['identifier']}`", f"{row['lr']:g}", f"{row['loss']:.3f}", interval, *sizes))
        given = ",".join(part for part in row["optimizer"].split(",")[1:] if not part.startswith("lr="))
        options += [f"`{row['identifier']}` with `{given}`"] if given else []
    reference = report["reference"].split(",")[0]
    header = ("identifier", "lr", "loss", f"less `{reference}`'s", "state, MiB", "peak, MiB")
    yield from markdown_table(header, rows)
    where = report["machine"]
    device = f"{where['threads']} thread on {where['device']}"
    versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    yield from (
        "",
        f"{report['workload'][0].upper()}{report['workload'][1:]}; {report['steps']} steps. Each optimizer tried "
        f"{report['rates']} learning rates with one seed; the loss is the mean of {report['seeds']} others, the "
        f"difference to `{reference}` is paired by seed and has its {report['confidence']:.0%} interval. The peak "
        f"counts parameters, gradients, state and activations. {', '.join(options)}. {device}; {versions}.",
    )


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "memory-7b": memory_7b,
    "memory-7b-strategies": memory_of("llama-7b"),
    "memory-13b-strategies": memory_of("llama-13b"),
    "memory-70b-strategies": memory_of("llama-70b"),
    "memory-7b-commands": commands_of("llama-7b"),
    "memory-13b-commands": commands_of("llama-13b"),
    "memory-70b-commands": commands_of("llama-70b"),
    "papers-galore": papers_galore,
    "papers-apollo": papers_apollo,
    "papers-8bit": papers_8bit,
    "measured": measured,
    "wishes": lambda: wishes(read),
    "steps-projecting": lambda: own(PROJECTING)(read("optimizers")),
    "steps-others": lambda: own(OTHERS)(read("optimizers")),
    "muon-stacks": lambda: stacks(read("muon")),
    "muon-steps": lambda: steps(read("muon")),
}


def tables() -> dict[Path, str]:
    """Returns the text of every page that has a table between markers, with the tables as they should be."""
    found = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        if MARKED.search(text):
            found[page] = MARKED.sub(_filled, text)
    return found


def _filled(match: re.Match[str]) -> str:
    if match["name"] not in TABLES:
        raise SystemExit(f"<!-- figures: {match['name']} --> is none of {', '.join(TABLES)}")
    return "\n".join((match["open"].rstrip("\n"), "", *TABLES[match["name"]](), "", match["close"]))


def changed() -> dict[Path, str]:
    """Returns the files that are not as they should be, and what they should be."""
    wanted = pictures() | tables()
    return {
        path: text for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text
    }


def main() -> int:
    """Writes or checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, and fail if something would change")
    arguments = parser.parse_args()
    found = changed()
    for path, text in found.items():
        print(f"{'would change' if arguments.check else 'written'}: {path.relative_to(ROOT)}")
        if not arguments.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return int(bool(found) and arguments.check)


if __name__ == "__main__":
    raise SystemExit(main())
