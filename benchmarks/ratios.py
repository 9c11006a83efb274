"""What the benchmarks share: ratios of times taken side by side, the file they are kept in, and what moved since."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_optim.bench._run import machine

CONFIDENCE = 0.95
# What a record is known by in another run; the rest of it was measured.
KEYS = ("model", "optimizer", "variant", "against")

Record = dict[str, Any]


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios within rounds, and between which values that of endless rounds lies.

    Within rounds, because a machine's drift hits both alike. The interval is one of order statistics: half of all
    rounds are below the true median, whatever disturbs them.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, mine: Sequence[float], other: Sequence[float]) -> Ratio:
        """Compares the seconds of the same rounds."""
        each = sorted(one / two for one, two in zip(mine, other, strict=True))
        outside = _outside(len(each))
        return cls(statistics.median(each), each[outside], each[-1 - outside])

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} - {self.high:.2f})"


def _outside(rounds: int) -> int:
    """Returns how many of the sorted values on either side are outside of the median's interval."""
    number, below = 0, 0.5**rounds
    while below + math.comb(rounds, number + 1) * 0.5**rounds <= (1 - CONFIDENCE) / 2:
        number += 1
        below += math.comb(rounds, number) * 0.5**rounds
    return number


# What is kept.


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that write and compare."""
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write the figures there as JSON")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="say which ratios moved since that JSON was written"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch's; one is steadier (default: %(default)s)")
    parser.add_argument("--wall", action="store_true", help="count wall-clock time, not CPU seconds of this process")


def clock(wall: bool) -> Callable[[], float]:
    """Returns what tells the time: on a CPU, unless told otherwise, what other processes disturb least."""
    return time.perf_counter if wall or torch.cuda.is_available() else time.process_time


def report(records: list[Record], wall: bool) -> Record:
    """Returns everything that a later run and a page need to know."""
    return {
        "time": "CPU seconds of the process" if clock(wall) is time.process_time else "wall-clock time",
        "interval": f"{CONFIDENCE:.0%} interval of the median, by order statistics of the rounds",
        "machine": machine(),
        "records": records,
    }


def as_kept(ratio: Ratio) -> dict[str, float]:
    """Returns a ratio for a record, with as many digits as mean something."""
    return {name: round(value, 4) for name, value in asdict(ratio).items()}


def legend(measured: Record) -> str:
    """Returns what the figures are and where they were measured, for the end of a table."""
    where = measured["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    return (
        f"{measured['time']}; in parentheses the {measured['interval']}\n"
        f"{where['device']}, {where['cores']} cores, threads: {where['threads']}; {versions}"
    )


def finish(measured: Record, arguments: argparse.Namespace, name: str) -> None:
    """Writes and compares, as asked."""
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / f"{name}.json"
        path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten: {path}")
    if arguments.compare:
        print("", *moved(json.loads(arguments.compare.read_text(encoding="utf-8")), measured), sep="\n")


def moved(before: Record, after: Record) -> Iterator[str]:
    """Yields the lines that say which ratios lie outside of what they were, intervals taken into account."""
    if before["machine"]["device"] != after["machine"]["device"]:
        yield f"Compared with another machine: {before['machine']['device']}"
    old = {_key(record): record["ratio"] for record in before["records"]}
    both = [(_key(record), record["ratio"]) for record in after["records"] if _key(record) in old]
    lines = [
        f"{'slower' if new['low'] > old[key]['high'] else 'faster'}  {' / '.join(key)}: "
        f"{Ratio(**old[key])} is now {Ratio(**new)}"
        for key, new in both
        if new["low"] > old[key]["high"] or new["high"] < old[key]["low"]
    ]
    yield f"{len(lines)} of {len(both)} ratios moved beyond their intervals"
    yield from lines


def _key(record: Record) -> tuple[str, ...]:
    return tuple(str(record[name]) for name in KEYS)
