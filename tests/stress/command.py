"""The command line: the whole matrix, its quick form, or one cell."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.processes import ROOT
from tests.stress.axes import AXES, Cell
from tests.stress.driver import Record, run
from tests.stress.known import clashes, examples
from tests.stress.pairs import array, singles
from tests.stress.report import fingerprint, judge, summary, unused

SEED = 16


def main(arguments: list[str] | None = None) -> int:
    """Runs what is asked; returns 0 if all is as it is known to be."""
    asked = _parse(arguments)
    if asked.cell:
        return _one(Cell.parse(asked.cell))
    cells = singles(asked.seed, clashes) if asked.quick else [*array(asked.seed, clashes), *examples()]
    cells = list(dict.fromkeys(cells))
    if asked.only:
        cells = [cell for cell in cells if asked.only in cell.name]
    print(f"seed {asked.seed}: {len(cells)} cells", flush=True)
    if asked.list:
        print(*(cell.name for cell in cells), sep="\n")
        return 0
    results = (
        asked.results
        or ROOT / "build" / "stress" / f"{'quick' if asked.quick else 'matrix'}-{fingerprint(asked.seed)}.jsonl"
    )
    verdicts = [judge(record) for record in _records(cells, results, asked.jobs)]
    whole = not asked.only and not asked.quick
    stale = unused(verdicts) if whole else []
    for verdict in verdicts:
        if verdict.kind == "failed":
            print(f"\nFAILED {verdict.cell.name}\n  {verdict.trouble}\n  {_again(verdict.cell)}")
    for known in stale:
        print(f"\nSTALE  nothing ended by the row {known.what!r} of tests/stress/known.py")
    found = summary(verdicts, asked.seed)
    print(json.dumps(found["counts"], indent=1))
    if asked.output and whole:
        asked.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(bool(stale) or any(verdict.kind == "failed" for verdict in verdicts))


def _records(cells: list[Cell], results: Path, jobs: int) -> list[Record]:
    """Returns the record of every cell, those of an earlier run of the same code from its file."""
    results.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, Record] = {}
    if results.exists():
        lines = results.read_text(encoding="utf-8").splitlines(keepends=True)
        # The last line may be half of one, of a run that was killed.
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        done = {record["cell"]: record for record in records}
        results.write_text("".join(line for line in lines if line.endswith("\n")), encoding="utf-8")
    missing = [cell for cell in cells if cell.name not in done]
    print(f"{len(cells) - len(missing)} cells are in {results}", flush=True)
    with results.open("a", encoding="utf-8") as file:
        for number, record in enumerate(run(missing, jobs), 1):
            file.write(json.dumps(record) + "\n")
            file.flush()
            done[record["cell"]] = record
            verdict = judge(record)
            if verdict.kind == "failed":
                print(f"[{number}/{len(missing)}] failed: {_again(verdict.cell)}: {verdict.trouble[:300]}", flush=True)
            elif number % 50 == 0:
                print(f"[{number}/{len(missing)}]", flush=True)
    return [done[cell.name] for cell in cells]


def _again(cell: Cell) -> str:
    return f"python -m tests.stress --cell {cell.name!r}"


def _one(cell: Cell) -> int:
    """Runs one cell and prints all that is known of it."""
    print(*(f"{axis:14}{value}" for axis, value in cell.settings), sep="\n")
    (record,) = run([cell], 2)
    verdict = judge(record)
    print(json.dumps(record, indent=1).replace("\\n", "\n"))
    print(f"{verdict.kind}: {verdict.trouble or 'equal in every way'}")
    return int(verdict.kind == "failed")


def _parse(arguments: Iterable[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__)
    parser.add_argument(
        "--cell", help=f"only this one: 'AXIS=VALUE; ...' of {', '.join(AXES)}; the others are ordinary"
    )
    parser.add_argument("--quick", action="store_true", help="every value once, instead of every pair of values")
    parser.add_argument("--only", help="cells whose name has this text")
    parser.add_argument("--list", action="store_true", help="print the cells and run none")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once, at least 2")
    parser.add_argument("--results", type=Path, help="file of records; those in it are not run again")
    parser.add_argument("--output", type=Path, help="where to write the counts")
    return parser.parse_args(None if arguments is None else list(arguments))


if __name__ == "__main__":
    sys.exit(main())
