"""The matrix itself: what it covers, and its quick form, in which every value of every axis occurs."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT
from tests.stress.axes import AXES, Cell, all_pairs, alone
from tests.stress.known import EXCEPTIONS, REFUSED, Known, clashes
from tests.stress.pairs import array, singles
from tests.stress.report import judge


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return array(16, clashes)


def test_every_two_values_of_any_two_axes_meet(cells: list[Cell]) -> None:
    """Counted from the cells' values, not by the generator's own means."""
    met = {frozenset(pair) for cell in cells for pair in itertools.combinations(zip(AXES, cell.values, strict=True), 2)}
    wanted = {
        frozenset(((one, value), (other, another)))
        for one, other in itertools.combinations(AXES, 2)
        for value in AXES[one]
        for another in AXES[other]
    }
    assert met == wanted
    assert len(wanted) == len(all_pairs())


def test_values_that_clash_are_by_themselves(cells: list[Cell]) -> None:
    known = {cell for cell in cells if clashes(cell)}
    apart = {alone(*pair)[0] for pair in all_pairs()}
    assert known <= apart
    assert len(set(cells)) == len(cells) > len(known) > 0


def test_values_that_fit_are_not_behind_others_that_clash(cells: list[Cell]) -> None:
    met = {pair for cell in cells if not clashes(cell) for pair in cell.pairs}
    assert [pair for pair in all_pairs() if pair not in met and not clashes(alone(*pair)[0])] == []


def test_the_same_seed_makes_the_same_cells(cells: list[Cell]) -> None:
    assert array(16, clashes) == cells
    assert array(17, clashes) != cells


def test_a_cell_is_found_by_its_name(cells: list[Cell]) -> None:
    assert [Cell.parse(cell.name) for cell in cells] == cells
    with pytest.raises(ValueError, match="is none of"):
        Cell.parse("precision=8-true")


def test_every_value_is_in_the_quick_form() -> None:
    found = singles(16, clashes)
    assert {setting for cell in found for setting in cell.settings} >= {
        (axis, value) for axis, values in AXES.items() for value in values if not clashes(Cell.of({axis: value}))
    }


def _record(**found: Any) -> dict[str, Any]:
    checks = {"sound": "same", "other": "same", "control": "same", "split": "same"}
    return {"cell": "form=plain", "seconds": 1.0, "control": {"steps": 10}, "checks": checks, **found}


def _error(ours: bool, batches: int, text: str) -> dict[str, Any]:
    return {"type": "ValueError", "text": text, "ours": ours, "batches": batches, "at": "here:1", "trace": ""}


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (_record(), "trained"),
        (_record(checks={"sound": "same", "other": "weights['a'] is 1e-3 apart"}), "failed"),
        (_record(checks={"sound": "no step was taken"}), "failed"),
        (_record(lost="process 0 of 1 ended with 1"), "failed"),
        (_record(error=_error(True, 0, "nobody foresaw this")), "failed"),
        (
            _record(cell="identifier=adamw; module=sparse", error=_error(True, 0, "cannot step sparse gradients")),
            "refused",
        ),
        (
            _record(cell="identifier=adamw; module=sparse", error=_error(True, 1, "cannot step sparse gradients")),
            "failed",
        ),
        (
            _record(cell="identifier=adamw; module=sparse", error=_error(False, 0, "cannot step sparse gradients")),
            "failed",
        ),
    ],
)
def test_what_a_record_amounts_to(record: dict[str, Any], kind: str) -> None:
    assert judge(record).kind == kind


def test_what_is_lightnings_must_happen_without_us() -> None:
    row = next(row for row in EXCEPTIONS if row.control and not row.resume)
    cell = next(alone(*pair)[0] for pair in all_pairs() if row.when(alone(*pair)[0]))
    text = row.text.split("|")[0].removeprefix("^")
    record = _record(cell=cell.name, error=_error(False, 0, text))
    assert judge(record).kind == "failed"
    assert judge({**record, "control": {"error": _error(False, 0, text)}}).kind == "exception"


def test_rows_are_told_apart() -> None:
    names = [known.what for known in (*REFUSED, *EXCEPTIONS)]
    assert len(set(names)) == len(names)
    assert all(isinstance(known, Known) and known.why for known in (*REFUSED, *EXCEPTIONS))


def test_cells_that_rows_name_are_theirs() -> None:
    for known in (*REFUSED, *EXCEPTIONS):
        assert not known.cell or known.when(Cell.parse(known.cell)), known.what


def test_the_quick_form_ends_as_it_is_known_to(tmp_path: Path) -> None:
    """Twice: the second run takes all from the file of the first."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.stress", "--quick", "--jobs", "2"]
    command += ["--results", str(tmp_path / "results.jsonl")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    count = len(singles(16, clashes))
    assert f"{count} cells are in {tmp_path / 'results.jsonl'}" in done.stdout
    assert json.loads(done.stdout[done.stdout.index("{") :])["cells"] == count
