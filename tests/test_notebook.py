"""The notebook runs, and what is stored in it is what it prints today."""

from __future__ import annotations

import base64
import re
import runpy
import shutil
from pathlib import Path

import nbformat
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICKSTART = EXAMPLES / "quickstart.ipynb"
Outputs = dict[str, list[nbformat.NotebookNode]]


def outputs(notebook: nbformat.NotebookNode) -> Outputs:
    """Those of each cell with code, by its id."""
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


@pytest.fixture(scope="module")
def stored() -> nbformat.NotebookNode:
    notebook = nbformat.read(QUICKSTART, as_version=4)
    nbformat.validate(notebook)
    return notebook


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> nbformat.NotebookNode:
    folder = tmp_path_factory.mktemp("notebook")
    copy = Path(shutil.copy(QUICKSTART, folder))
    return runpy.run_path(str(EXAMPLES / "notebook.py"))["execute"](copy, folder)


def test_what_is_stored_is_what_it_prints(stored: nbformat.NotebookNode, executed: nbformat.NotebookNode) -> None:
    before, after = outputs(stored), outputs(executed)
    varies = {cell.id for cell in stored.cells if "varies" in cell.metadata.get("tags", ())}
    assert len(varies) == 2
    for name in before:
        if name in varies:
            assert [output.output_type for output in after[name]] == [output.output_type for output in before[name]]
        else:
            assert after[name] == before[name], f"{name}: `make notebook` stores what it prints now"
    printed = "".join(output.text for cell in after.values() for output in cell if output.output_type == "stream")
    assert printed.count("The same weights, bit for bit: True") == 2
    right = re.search(r"(\d+)% of unseen digits", printed)
    assert right
    assert int(right[1]) > 90


def test_it_stores_a_picture_and_nothing_of_a_machine(stored: nbformat.NotebookNode) -> None:
    cells = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "executed from top to bottom"
    assert all(cell.outputs for cell in cells if "print(" in cell.source)
    pictures = [output.data["image/png"] for cell in cells for output in cell.outputs if "data" in output]
    assert [base64.b64decode(picture)[:4] for picture in pictures] == [b"\x89PNG"]
    assert set(stored.metadata) == {"kernelspec"}
    assert all(set(cell.metadata) <= {"tags"} for cell in stored.cells)
    for cell in cells:
        for output in cell.outputs:
            assert output.get("name") != "stderr"
            assert not re.search(r"/(home|root|tmp|Users|work|usr|opt)/", output.get("text", ""))
