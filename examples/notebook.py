"""Executes ``quickstart.ipynb`` and stores what it prints and draws: ``make notebook``.

That is the same wherever it runs, but for cells with the tag ``varies``, whose numbers depend on the processor.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

QUICKSTART = Path(__file__).parent / "quickstart.ipynb"


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Returns a notebook with its outputs.

    Args:
        path: The notebook, which stays as it is.
        folder: Where it runs; files that it writes are left there.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False, coalesce_streams=True)
    client.execute(cwd=str(folder))
    # Nothing of the machine: the version of Python, and the tips that go to the error stream.
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.metadata.pop("execution", None)
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        executed = execute(QUICKSTART, Path(folder))
    nbformat.write(executed, QUICKSTART)
    print(f"Wrote {QUICKSTART}")
