"""What came of the cells, counted."""

from __future__ import annotations

import hashlib
import platform
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_optim import errors
from tests.processes import ROOT
from tests.stress.axes import AXES, Cell, all_pairs
from tests.stress.known import EXCEPTIONS, REFUSED, Known

Record = dict[str, Any]
PACKAGES = ("torch", "lightning", "bitsandbytes", "torchao", "schedulefree", "torch-optimi")
#: Checks that a cell has passed.
_PASSED = ("same", "none")


@dataclass(frozen=True)
class Verdict:
    """What came of a cell.

    Attributes:
        cell: The cell.
        kind: ``"trained"``, ``"refused"``, ``"exception"`` or ``"failed"``.
        trouble: The error or the check that failed.
        known: The row that explains it.
        record: All of it.
        resume: The row that explains why it did not go on from a checkpoint.
    """

    cell: Cell
    kind: str
    trouble: str
    known: Known | None
    record: Record
    resume: Known | None = None

    @property
    def rows(self) -> tuple[Known, ...]:
        """The rows by which it ended."""
        return tuple(filter(None, (self.known, self.resume)))


def judge(record: Record) -> Verdict:
    """Returns what a record amounts to."""
    cell = Cell.parse(record["cell"])
    split = f"split: {record.get('checks', {}).get('split', '')}"
    rows = (row for row in (*REFUSED, *EXCEPTIONS) if row.resume and row.explains(cell, split))
    resume = next((row for row in rows if not row.control or _control_does_the_same(record)), None)
    error, trouble = record.get("error"), _trouble(record, without="split" if resume else "")
    if not trouble:
        return Verdict(cell, "trained", "", None, record, resume)
    if error and error["ours"]:
        known = next((row for row in REFUSED if row.explains(cell, error["text"])), None)
        if known and not record.get("lost") and (known.after_batches or not error["batches"]):
            return Verdict(cell, "refused", trouble, known, record)
    for row in EXCEPTIONS:
        if not row.resume and row.explains(cell, trouble) and (not row.control or _control_does_the_same(record)):
            return Verdict(cell, "exception", trouble, row, record, resume)
    return Verdict(cell, "failed", trouble, None, record)


def _trouble(record: Record, without: str) -> str:
    if "lost" in record:
        return f"lost: {record['lost']}: {record.get('log', '')[-300:]}"
    if "error" in record:
        error = record["error"]
        return f"{error['type']} after {error['batches']} batches, at {error['at']}: {error['text'][:500]}"
    failed = {name: text for name, text in record["checks"].items() if name != without and not text.startswith(_PASSED)}
    other = failed.get("other", "")
    if hasattr(errors, other.partition(":")[0]) and any(re.search(row.text, other) for row in REFUSED):
        # The other form is refused, of which it is a cell of its own.
        del failed["other"]
    return "; ".join(f"{name}: {text}" for name, text in failed.items())


def _control_does_the_same(record: Record) -> bool:
    if "error" in record:
        return "error" in record.get("control", {})
    control = record.get("control", {}).get("sound", "same")
    return control != "same" or record.get("control_split", "same") != "same"


def unused(verdicts: Iterable[Verdict]) -> list[Known]:
    """Returns the rows by which no cell ended."""
    used = {id(row) for verdict in verdicts for row in verdict.rows}
    return [known for known in (*REFUSED, *EXCEPTIONS) if id(known) not in used]


def hidden(verdicts: Iterable[Verdict]) -> list[tuple[Any, Any]]:
    """Returns the pairs of values that were tried only where another one kept the cell from training."""
    open_pairs = dict.fromkeys(all_pairs())
    for verdict in verdicts:
        if verdict.kind == "trained" or _by_itself(verdict.cell):
            for pair in verdict.cell.pairs:
                open_pairs.pop(pair, None)
    return list(open_pairs)


def _by_itself(cell: Cell) -> bool:
    return sum(value != AXES[axis][0] for axis, value in cell.settings) <= 2


def summary(verdicts: list[Verdict], seed: int) -> Record:
    """Returns counts, rows with their counts, and on what they were counted."""
    kinds = Counter(verdict.kind for verdict in verdicts)
    rows = Counter(id(row) for verdict in verdicts for row in verdict.rows)
    trained = [verdict for verdict in verdicts if verdict.kind == "trained"]
    checks = Counter(
        name
        for verdict in trained
        for name, text in verdict.record["checks"].items()
        if text == "same" and name != "sound"
    )
    rounded = sum(verdict.record["checks"]["other"].startswith("same but") for verdict in trained)
    counts = {
        "cells": len(verdicts),
        "pairs": len(all_pairs()),
        "hidden pairs": len(hidden(verdicts)),
        **{kind: kinds[kind] for kind in ("trained", "refused", "exception", "failed")},
        "in two processes": sum(verdict.cell.distributed for verdict in verdicts),
        **{f"equal: {name}": count for name, count in sorted(checks.items())},
        "equal: rounding": rounded,
    }
    return {
        "command": "make stress",
        "seed": seed,
        "counts": counts,
        "axes": {axis: len(values) for axis, values in AXES.items()},
        "refused": [{"what": row.what, "cells": rows[id(row)]} for row in REFUSED],
        "exceptions": [
            {"what": row.what, "cells": rows[id(row)], "why": row.why, "lightnings": row.control} for row in EXCEPTIONS
        ],
        "seconds": round(sum(verdict.record["seconds"] for verdict in verdicts)),
        "machine": {
            "device": _cpu(),
            "python": platform.python_version(),
            "versions": {package: version(package) for package in PACKAGES},
        },
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def fingerprint(seed: int) -> str:
    """Returns what tells results of other code, tests or versions apart."""
    digest = hashlib.sha256(repr((seed, [version(package) for package in PACKAGES])).encode())
    files = [
        *(ROOT / "lightning_optim").rglob("*.py"),
        *(ROOT / "tests" / "stress").glob("*.py"),
        ROOT / "tests" / "cases.py",
    ]
    for path in sorted(files):
        # What is known of cells changes their judgement, and not what they do.
        if path.name not in ("known.py", "report.py", "command.py"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
