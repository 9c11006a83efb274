"""Counts the tests of what docs/reliability.md names, and the identifiers among their cases: docs/bench/tried.json."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lightning_optim import REGISTRY, __version__

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Tried:
    """What was tried.

    Attributes:
        what: In words.
        command: What runs it.
        arguments: What pytest collects it by, where the command is not pytest itself.
        variable: Which variable of the environment chooses the long form.
    """

    what: str
    command: str
    arguments: str = ""
    variable: str = ""


TRIED = (
    Tried("all that runs everywhere", "make test", "--ignore tests/test_benchmarks.py"),
    Tried(
        "a run through the Trainer equals a loop with the upstream class, bit for bit; our own algorithms equal a "
        "reference of at most 25 lines",
        "pytest tests/trainer/test_reference.py tests/optimizers/test_references.py",
    ),
    Tried(
        "a fresh process goes on from a checkpoint, bit for bit",
        "pytest tests/trainer/test_resume.py",
    ),
    Tried("layerwise equals plain", "pytest tests/layerwise"),
    Tried(
        "what torch demands of its own optimizers",
        "pytest tests/table/test_promises.py",
    ),
    Tried(
        "states of torch, bitsandbytes, torchao, schedulefree, optimi, galore-torch, transformers and peft, and the "
        "checkpoints of every release",
        "pytest tests/build/test_foreign_state.py tests/build/test_migrate.py tests/old_checkpoints",
    ),
    Tried(
        "processes that are killed, full disks, folders without permission, files that are cut off, changed, foreign "
        "or malicious; `LIGHTNING_OPTIM_HITS=20` kills more often",
        "pytest tests/faults",
    ),
    Tried(
        "shards of 1, 2 and 4 processes equal one process, and checkpoints go between them",
        "make test-sharded",
        "tests/sharded tests/trainer/test_composite_ddp.py",
        "LIGHTNING_OPTIM_SHARDED_TESTS",
    ),
    Tried(
        "10,000 steps and 300 fits in one process without growth of memory, files, threads or hooks; 2,000 parameters; "
        "threads, fork and spawn; four processes",
        "make test-long",
        "tests/long",
        "LIGHTNING_OPTIM_LONG_TESTS",
    ),
)


def collected(tried: Tried) -> list[str]:
    """Returns the tests that pytest finds.

    Raises:
        subprocess.CalledProcessError: If it finds none, or cannot import one.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "--quiet",
        *(tried.arguments or tried.command.removeprefix("pytest ")).split(),
    ]
    environment = {**os.environ, tried.variable: "1"} if tried.variable else os.environ
    found = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=600)
    return [line for line in found.stdout.splitlines() if "::" in line and not line.startswith("SKIPPED")]


def main(target: Path) -> None:
    """Writes the counts, the date and the version into the file ``target``."""
    rows = []
    for tried in TRIED:
        tests = collected(tried)
        # A case's parameters are joined by dashes, and its name is one of them.
        parts = {part for test in tests for part in re.split(r"[\[\]-]", test)[1:]}
        names = len(parts & {name for plain in REGISTRY.plain for name in (plain, f"{plain}_layerwise")})
        rows.append({"what": tried.what, "command": tried.command, "tests": len(tests), "identifiers": names})
        print(f"{len(tests):6,} tests, {names:3} identifiers  {tried.command}")
    written = {
        "command": "make tried",
        "date": datetime.date.today().isoformat(),
        "version": __version__,
        "rows": rows,
    }
    target.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
