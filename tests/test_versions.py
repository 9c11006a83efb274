"""What pyproject.toml promises, what is tested and what docs/hardware.md says agree."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]

pytest.importorskip("tomllib", reason="docs/generate.py reads pyproject.toml")


@pytest.fixture(scope="module")
def pages() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "generate.py"))


def test_the_oldest_that_are_taken_are_tested(pages: dict[str, Any]) -> None:
    oldest = pages["pins"]("requirements-oldest.txt")
    # torchao 0.18 needs a newer torch; flashoptim has no CPU.
    assert set(pages["promised"]()) - set(oldest) == {"torchao", "flashoptim"}
    for name in pages["promised"]().keys() & oldest:
        (floor,) = (part.version for part in pages["promised"]()[name].specifier if part.operator == ">=")
        assert Version(oldest[name]) == Version(floor), f"{name} from {floor} on is taken, {oldest[name]} is tested"


def test_what_is_pinned_is_taken(pages: dict[str, Any]) -> None:
    pinned = pages["pins"]("constraints.txt")
    assert set(pages["promised"]()) - set(pinned) == {"flashoptim"}
    for name in pages["promised"]().keys() & pinned:
        assert pinned[name] in pages["promised"]()[name].specifier, name


def test_the_newest_are_no_older_than_what_is_pinned(pages: dict[str, Any]) -> None:
    newest = json.loads((ROOT / "docs" / "newest.json").read_text(encoding="utf-8"))["versions"]
    assert set(newest) == set(pages["promised"]())
    for name, version in pages["pins"]("constraints.txt").items():
        if name in newest:
            assert Version(newest[name]) >= Version(version), f"{name}: `make newest`"


def test_the_table_has_the_versions_of_the_files(pages: dict[str, Any]) -> None:
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in pages["versions"]()}
    lines = {name: (ROOT / name).read_text(encoding="utf-8").splitlines() for name in pages["INSTALLED"].values()}
    for file, package in (("constraints.txt", "torch"), ("requirements-oldest.txt", "lightning")):
        (version,) = (line.partition("==")[2] for line in lines[file] if line.startswith(f"{package}=="))
        assert f" {version} |" in rows[package]
    assert " 2.9.0 |" in rows["torch"]
    for target in re.findall(r"test-[a-z]+", " ".join(pages["INSTALLED"])):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), target


def test_the_pages_name_what_is_pinned(pages: dict[str, Any]) -> None:
    pinned = pages["pins"]("constraints.txt")
    hardware = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    (ran,) = re.findall(r"^\| CPU \| .*$", hardware, re.MULTILINE)
    named = re.findall(r"([a-z-]+) (\d+\.\d+\.\d+)", ran)
    assert len(named) == 6
    assert all(pinned[name] == version for name, version in named), named
    bounds = {part.operator: part.version for part in pages["promised"]()["torch"].specifier}
    last = ".".join(pinned["torch"].split(".")[:2])
    assert f"torch {bounds['>=']} to {last}" in (ROOT / "README.md").read_text(encoding="utf-8")
