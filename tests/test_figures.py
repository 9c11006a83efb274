"""The figures of the pages equal the files that commands wrote into docs/bench/."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from lightning_optim import command

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "docs" / "bench"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


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


def test_every_table_is_in_a_page(figures: dict[str, Any]) -> None:
    shown = {name for page in PAGES for _, name, _ in figures["MARKED"].findall(page.read_text(encoding="utf-8"))}
    assert shown == set(figures["TABLES"])


def test_every_file_of_figures_is_read_or_linked() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (*PAGES, *(ROOT / "docs").glob("*.py"))]
    for path in BENCH.iterdir():
        assert any(path.name in text or f'"{path.stem}"' in text for text in texts), f"no page shows {path.name}"


def test_memory_is_still_what_the_command_estimates(capsys: pytest.CaptureFixture[str]) -> None:
    records = json.loads((BENCH / "memory.json").read_text(encoding="utf-8"))["records"]
    kept = next(one for one in records if one["asked"] == "galore_adamw_8bit_layerwise" and one["devices"] == 1)
    assert command.main([*kept["command"].split()[1:], "--optim", kept["asked"], "--json"]) == 0
    (estimate,) = json.loads(capsys.readouterr().out)["estimates"]
    assert {name: estimate[name] for name in ("state", "gradients", "peak")} == {
        name: kept[name] for name in ("state", "gradients", "peak")
    }
