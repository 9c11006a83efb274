"""Runs cells, each in forks of a process that has imported everything and computed nothing."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.processes import free_ports
from tests.stress.axes import Cell
from tests.stress.fits import run_part, splits

#: Seconds for a process, much more than any takes on an idle machine, and for the others once one has ended badly.
LIMIT, GRACE = 300.0, 20.0
Record = dict[str, Any]
_TAKEN = "has failed to listen"


@dataclass
class Job:
    """A cell at work: which part of it, in which processes."""

    cell: Cell
    folder: Path
    part: str
    started: float
    children: dict[int, int]
    seconds: float = 0.0
    statuses: dict[int, int] = field(default_factory=dict)
    deadline: float = 0.0
    tries: int = 0
    record: Record = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """How many processes it takes."""
        return 2 if self.cell.distributed else 1


def run(cells: Iterable[Cell], jobs: int) -> Iterator[Record]:
    """Runs cells in at most so many processes at once; yields a record of each when it is done."""
    _import_all()
    waiting, running = list(cells)[::-1], list[Job]()
    with tempfile.TemporaryDirectory() as root:
        number = 0
        while waiting or running:
            while waiting and sum(job.ranks for job in running) < jobs:
                if running and sum(job.ranks for job in running) + (2 if waiting[-1].distributed else 1) > jobs:
                    break
                number += 1
                folder = Path(root) / str(number)
                folder.mkdir()
                running.append(_start(Job(waiting.pop(), folder, "first", 0.0, {})))
            time.sleep(0.005)
            for job in list(running):
                if _ended(job):
                    running.remove(job)
                    if record := _next(job, running):
                        yield record


def _import_all() -> None:
    """Imports what optimizers need, once for all forks. No fork keeps a thread."""
    torch.set_num_threads(1)
    for name in ("bitsandbytes", "torchao.optim", "schedulefree", "optimi"):
        importlib.import_module(name)
    # Garbage is looked for among what a fork has made, and its pages stay shared.
    gc.collect()
    gc.freeze()


def _start(job: Job) -> Job:
    sys.stdout.flush()
    sys.stderr.flush()
    port = free_ports(1)[0]
    job.started, job.children, job.statuses = time.monotonic(), {}, {}
    job.deadline = job.started + LIMIT
    for rank in range(job.ranks):
        child = os.fork()
        if not child:
            _become(job, rank, port)
        job.children[child] = rank
    return job


def _become(job: Job, rank: int, port: str) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        os.chdir(job.folder)
        output = os.open(f"{job.part}{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        if job.ranks > 1:
            os.environ.update({"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        run_part(job.part, job.cell, job.folder)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _ended(job: Job) -> bool:
    """Whether all of its processes have ended, as they do when their time is over."""
    for child, rank in job.children.items():
        if rank in job.statuses:
            continue
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            job.statuses[rank] = os.waitstatus_to_exitcode(status)
            if job.statuses[rank] or _refused(job, rank):
                job.deadline = min(job.deadline, time.monotonic() + GRACE)
    if len(job.statuses) == job.ranks:
        return True
    if time.monotonic() > job.deadline:
        for child, rank in job.children.items():
            if rank not in job.statuses:
                with suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
    return False


def _found(job: Job, rank: int) -> Record:
    path = job.folder / f"{job.part}{rank}.json"
    found: Record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _log(job: Job, rank: int) -> str:
    path = job.folder / f"{job.part}{rank}.log"
    return path.read_text(encoding="utf-8", errors="replace")[-2000:] if path.exists() else ""


def _refused(job: Job, rank: int) -> bool:
    return "error" in _found(job, rank)


def _next(job: Job, running: list[Job]) -> Record | None:
    """Starts the second part of a cell, or returns its record."""
    job.seconds += (time.monotonic() - job.started) * job.ranks
    ranks = [_found(job, rank) for rank in range(job.ranks)]
    lost = [rank for rank, found in enumerate(ranks) if not found]
    if job.tries < 3 and _TAKEN in json.dumps(ranks) + "".join(map(str, (_log(job, rank) for rank in lost))):
        # Somebody else took the port in the moment between.
        job.tries += 1
        for path in job.folder.glob(f"{job.part}*"):
            path.unlink()
        running.append(_start(job))
        return None
    # An error counts before an agreement, of whichever process.
    ranks.sort(key=lambda found: "error" not in found)
    merged: Record = ranks[0]
    if "checks" in merged:
        for name in merged["checks"]:
            merged["checks"][name] = next(
                (f["checks"][name] for f in ranks if f and f["checks"][name] != "same"), "same"
            )
    if lost:
        log = _log(job, lost[0])
        which = f"process {lost[0]} of {job.ranks}"
        status = job.statuses[lost[0]]
        how = "was killed, after its time or while the other had ended" if status == -9 else f"ended with {status}"
        merged = {**merged, "lost": f"{which} {how} in the {job.part} part", "log": log}
    job.record.update({name: value for name, value in merged.items() if name != "checks"})
    job.record.setdefault("checks", {}).update(merged.get("checks", {}))
    if job.part == "second" and "split" in merged:
        job.record["checks"]["split"] = next((f["split"] for f in ranks if f and f["split"] != "same"), "same")
        job.record.pop("split")
    if job.part == "first" and "steps" in job.record and not lost and splits(job.cell):
        job.part = "second"
        running.append(_start(job))
        return None
    return {"cell": job.cell.name, "seconds": round(job.seconds, 3), **job.record}
