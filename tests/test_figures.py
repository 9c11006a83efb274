"""The figures of the pages equal the files that commands wrote into docs/bench/."""

from __future__ import annotations

import itertools
import json
import math
import re
import runpy
import xml.dom.minidom
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from lightning_optim import command

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "docs" / "bench"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def read(name: str) -> dict[str, Any]:
    """What a command wrote."""
    found: dict[str, Any] = json.loads((BENCH / f"{name}.json").read_text(encoding="utf-8"))
    return found


def shown_by_muon() -> tuple[str, ...]:
    """How its comparison was started, and what came of it."""
    measured = read("muon_steps")
    adamw = measured["adamw_torch"]["losses"]
    ahead = {
        share: [one < other for one, other in zip(found["losses"], adamw, strict=True)]
        for share, found in measured["muon"].items()
    }
    words = {3: "ahead with every seed", 0: "a little behind"}
    return (
        str(measured["adamw_torch"]["steps"]),
        " ".join(ahead),
        words[sum(ahead["0.75"])],
        words[sum(ahead["0.5"])],
    )


def shown_by_projections() -> tuple[str, ...]:
    """The time of the randomized projection and the losses with it, in units of the exact one's."""
    measured = read("optimizers")
    train, val = zip(*measured["convergence"], strict=True)
    assert len(train) == 3
    ratios = (fmean(val), fmean(train), min(*train, *val), max(*train, *val))
    return f"{1 / measured['refresh']:.0f}", *(f"{ratio:.4f}" for ratio in ratios)


def captured() -> tuple[str, ...]:
    """Of how many percent of the energy the randomized projection captures more."""
    return (f"{math.floor(100 * read('optimizers')['captured']['falling spectrum'])}",)


def shapes_whose_bits_change() -> tuple[str, ...]:
    """Of how many shapes a stack changes bits, in float32 and in float64, and how many are aligned."""
    bits = read("muon")["bits"]
    changed = [str(count) for dtype in ("float32", "float64") for count in bits[dtype]["not aligned"]]
    assert not any(found["aligned"][0] for found in bits.values())
    return *changed, *(str(bits[dtype]["aligned"][1]) for dtype in ("float32", "float64"))


def best_rates() -> tuple[str, ...]:
    """The learning rates that the demo found best for Muon and for AdamW."""
    rates = {one["optimizer"]: one["lr"] for one in read("demo")["records"]}
    return f"{rates['muon']:g}", f"{rates['adamw_torch']:g}"


#: Figures in sentences: the page, how they stand there, and what they are. Tables need no entry: they stand between
#: markers, see docs/figures.py.
SENTENCES = [
    (
        "docs/muon.md",
        r"muon_steps.py --quick --steps (\d+) --shares ([\d. ]+\d)`.*"
        r"In three quarters of the steps Muon is ([\w ]+), in half of them ([\w ]+)\.",
        shown_by_muon,
    ),
    (
        "docs/muon.md",
        r"in float32 for (\d+) of (\d+), in float64 for (\d+) of (\d+), and for none of (\d+) and (\d+) shapes",
        shapes_whose_bits_change,
    ),
    ("docs/faq.md", r"learns best at ([\d.]+), and with AdamW at ([\d.]+) ", best_rates),
    ("docs/low-rank.md", r"captures more than (\d+) % of the energy", captured),
    (
        "docs/low-rank.md",
        r"took 1/(\d+) of `torch.linalg.svd`.*ended at ([\d.]+) of the exact projection's validation loss and ([\d.]+) "
        r"of its training loss, means of three\s+seeds that lie between ([\d.]+) and ([\d.]+)\.",
        shown_by_projections,
    ),
]


@pytest.mark.parametrize(("page", "pattern", "expected"), SENTENCES, ids=[page for page, _, _ in SENTENCES])
def test_figures_in_sentences(page: str, pattern: str, expected: Callable[[], tuple[str, ...]]) -> None:
    found = re.search(pattern, (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"{page} has nothing like {pattern!r}: take it out of SENTENCES, or mend it"
    assert found.groups() == expected()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What docs/figures.py defines."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    return runpy.run_path(str(ROOT / "docs" / "figures.py"))


def test_pages_and_pictures_are_what_the_files_say(figures: dict[str, Any]) -> None:
    differing = [str(path.relative_to(ROOT)) for path in figures["changed"]()]
    assert not differing, f"these differ from docs/bench/: {differing}. Run `make figures`"


def test_another_figure_in_a_page_is_seen(figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs" / "memory.md"
    read_text = Path.read_text
    written = read_text(page, encoding="utf-8")
    figure = re.search(r"`adamw_8bit_layerwise` \| [\d.]+ \| [\d.]+ \| ([\d.]+)", written)
    assert figure
    wrong = written[: figure.start(1)] + "9.9" + written[figure.end(1) :]
    monkeypatch.setattr(
        Path, "read_text", lambda path, **options: wrong if path == page else read_text(path, **options)
    )
    assert figures["changed"]() == {page: written}


def test_what_the_picture_of_the_demo_says_holds(figures: dict[str, Any]) -> None:
    records = {one["optimizer"]: one for one in read("demo")["records"]}
    losses = {name: one["val_loss"] for name, one in records.items()}
    assert losses["adamw_8bit_layerwise"] < losses["adamw_torch"] + 0.01
    assert losses["galore_adamw"] == pytest.approx(losses["adamw_torch"], abs=0.05)
    assert losses["muon"] < losses["adamw_torch"] - 0.05
    same = ("adamw_torch", "adamw_torch", "adamw_8bit", "adamw_8bit")
    assert tuple(one["losses_of"] for one in records.values())[:4] == same
    held = {name: one["state_bytes"] + one["gradient_bytes"] for name, one in records.items()}
    share = held["adamw_8bit_layerwise"] / held["adamw_torch"]
    light, dark = (figures["pictures"]()[ROOT / "docs" / "pictures" / f"demo-{name}.svg"] for name in ("light", "dark"))
    for picture in (light, dark):
        assert f">AdamW&#x27;s losses with {share:.0%} of its state and gradients</text>" in picture
        assert all(f">{held[name] / 2**20:.1f}</text>" in picture for name in records)
        assert len(picture.encode()) < 150_000
        xml.dom.minidom.parseString(picture)
    assert light != dark


def test_the_picture_of_memory_has_every_optimizer(figures: dict[str, Any]) -> None:
    report = read("choose")
    assert not any(row["failures"] or row["lr_is_at_the_edge"] for row in report["optimizers"])
    pictures = figures["pictures"]()
    for name in ("light", "dark"):
        picture = pictures[ROOT / "docs" / "pictures" / f"memory-{name}.svg"]
        assert all(f">{row['identifier']}</text>" in picture for row in report["optimizers"])
        dots = [element for element in picture.splitlines() if element.startswith("<circle")]
        assert len(dots) == len(report["optimizers"])


def test_what_bench_choose_runs_is_what_was_compared() -> None:
    target = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nbench-choose:")[2].partition("\n\n")[0]
    words = target.replace("$(PROJECTED)", "rank=32,update_proj_gap=50").partition("--quick")[0].split()
    assert [word for word in words if "lr=" in word] == [one["optimizer"] for one in read("choose")["optimizers"]]


def test_labels_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    drawing = runpy.run_path(str(ROOT / "docs" / "drawing.py"))
    places = drawing["spread"]([100.0, 101.0, 99.0, 300.0], 20, 95, 310)
    assert sorted(range(4), key=places.__getitem__) == [2, 0, 1, 3]
    assert all(later - one > 19.9 for one, later in itertools.pairwise(sorted(places)))
    assert 95 <= min(places) <= max(places) <= 310
    assert drawing["Axis"](0.95, 2.1, 0, 1).ticks(0.5) == [1.0, 1.5, 2.0]
    assert drawing["mean_of_last"]([1.0, 3.0, 8.0], 2) == [1.0, 2.0, 5.5]


def test_every_table_is_in_a_page(figures: dict[str, Any]) -> None:
    shown = {name for page in PAGES for _, name, _ in figures["MARKED"].findall(page.read_text(encoding="utf-8"))}
    assert shown == set(figures["TABLES"])


def test_every_file_of_figures_is_read_or_linked() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (*PAGES, *(ROOT / "docs").glob("*.py"))]
    for path in BENCH.iterdir():
        assert any(path.name in text or f'"{path.stem}"' in text for text in texts), f"no page shows {path.name}"


def test_memory_is_still_what_the_command_estimates(capsys: pytest.CaptureFixture[str]) -> None:
    records = read("memory")["records"]
    kept = next(one for one in records if one["asked"] == "galore_adamw_8bit_layerwise" and one["devices"] == 1)
    assert command.main([*kept["command"].split()[1:], "--optim", kept["asked"], "--json"]) == 0
    (estimate,) = json.loads(capsys.readouterr().out)["estimates"]
    assert {name: estimate[name] for name in ("state", "gradients", "peak")} == {
        name: kept[name] for name in ("state", "gradients", "peak")
    }
