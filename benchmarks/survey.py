"""Holds every optimizer class of torch.optim, pytorch_optimizer, timm and heavyball to every promise of the contract.

``make survey`` installs the collections and runs it; the results are a page and a JSON file::

    python benchmarks/survey.py                        # goes on where it was interrupted; writes what there is
    python benchmarks/survey.py torch timm             # only these
    python benchmarks/survey.py --anew heavyball       # forgets what is known of these

Classes hang, compile for minutes and crash. Each is tried in a process of its own, which forks from one that has
imported its collection, and may take so many seconds in all. A class that takes longer is not asked for the rest.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import declare_torchvision_operators
import survey_page
import torch
from torch.optim import Optimizer
from tqdm import tqdm

from lightning_optim.table import COLLECTIONS, REGISTRY
from lightning_optim.testing import PROMISES, held

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "build" / "survey"
TORCH = "torch"
ORDER = (TORCH, "pytorch_optimizer", "timm", "heavyball")
# For classes without a default.
LEARNING_RATE = 1e-2
# What classes ask for that have no default, or only for parameters without groups: lengths of trainings, a rank.
OPTIONS = {
    "heavyball:PSGDLRA": {"rank": 4},
    "pytorch_optimizer:bsam": {"num_data": 16},
    "pytorch_optimizer:ranger21": {"num_iterations": 20},
}


def main() -> None:
    """Tries what has not been tried, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collections", nargs="*", metavar="COLLECTION", help=f"of {', '.join(ORDER)}; all by default")
    parser.add_argument("--anew", action="store_true", help="try again what has been tried")
    parser.add_argument("--limit", type=float, default=45.0, help="seconds for one class")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder for the page and bench/survey.json")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    asked = arguments.collections or ORDER
    if set(asked) - set(ORDER):
        parser.error(f"there are {', '.join(ORDER)}, got {', '.join(asked)}")
    if arguments.in_process:
        survey(asked[0], arguments.limit)
        return
    for collection in asked:
        if arguments.anew:
            _file(collection).unlink(missing_ok=True)
        # A process for each: importing one may change what torch does.
        options = ["--in-process", "--limit", str(arguments.limit)]
        subprocess.run([sys.executable, __file__, collection, *options], check=True)
    write(arguments.output, arguments.limit)


def survey(collection: str, limit: float) -> None:
    """Tries the classes of a collection that have not been tried, and appends what becomes of each."""
    torch.set_num_threads(1)
    known = {record["name"] for record in _read(collection)}
    classes = {name: kind for name, kind in sorted(_classes(collection).items()) if name not in known}
    file = _file(collection)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines, tqdm(classes.items(), unit="class", disable=None) as bar:
        for name, kind in bar:
            bar.set_description(name)
            lines.write(json.dumps(_try(name, kind, limit)) + "\n")
            lines.flush()


def write(folder: Path, limit: float) -> None:
    """Writes the page, and the JSON that it is made of."""
    distributions = {name: COLLECTIONS[name].distribution if name in COLLECTIONS else name for name in ORDER}
    known = {name: _read(name) for name in ORDER}
    report = {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "hardware": f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}), one thread",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(distributions[name]) for name in ORDER if known[name]},
        "torchvision": _torchvision(),
        "promises": {name: str(promise.__doc__).partition("\n")[0] for name, promise in PROMISES.items()},
        "lr": LEARNING_RATE,
        "limit": limit,
        "collections": {
            name: [
                survey_page.compact(record, PROMISES) for record in sorted(records, key=lambda one: one["name"].lower())
            ]
            for name, records in known.items()
        },
    }
    (folder / "bench").mkdir(parents=True, exist_ok=True)
    (folder / "bench" / "survey.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "other-optimizers.md").write_text(survey_page.page(report), encoding="utf-8")


def _torchvision() -> str:
    """Returns the version that timm imports, and whether its operators are only declared."""
    code = Path(str(importlib.util.find_spec("torchvision").origin)).read_text(encoding="utf-8")  # type: ignore[union-attr]
    declared = code.startswith(declare_torchvision_operators.DECLARATIONS)
    whole = (
        "its compiled operators declared only, as this build of torch cannot load them"
        if declared
        else "with its operators"
    )
    return f"{importlib.metadata.version('torchvision')}, {whole}"


def _classes(collection: str) -> dict[str, type[Optimizer]]:
    """Returns each class once, by the name that says least besides."""
    if collection == TORCH:
        own = (kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer))
        return {f"torch.optim.{kind.__name__}": kind for kind in own if kind is not Optimizer}
    members = COLLECTIONS[collection].members(f"{collection}:*").values()
    shortest = sorted(members, key=lambda member: (len(member.defaults), len(member.name)))
    named = {member.kind: member.name for member in reversed(shortest) if not member.path.startswith("torch.")}
    return {name: kind for kind, name in named.items()}


def _try(name: str, kind: type[Optimizer], limit: float) -> dict[str, Any]:
    """Returns what becomes of a class, and of each promise as far as there was time."""
    begun = time.monotonic()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    # As daemons may not start processes, and compilers do, it is none.
    child = multiprocessing.get_context("fork").Process(target=_hold, args=(name, sender))
    child.start()
    sender.close()
    results: dict[str, Any] = {}
    problem = None
    try:
        while receiver.poll(max(0.0, begun + limit - time.monotonic())):
            said = receiver.recv()
            if isinstance(said, str):
                problem = _clean(said)
            else:
                promise, status, text = said
                results[promise] = {"status": status, "text": _clean(text)}
        late = True
    except EOFError:
        late = False
        child.join(5)
    assert child.pid is not None
    # With what it started, such as compilers.
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.join()
    rest = [promise for promise in PROMISES if promise not in results]
    if problem is None and rest:
        what = f"it took longer than {limit:.0f} s" if late else f"the process ended with {child.exitcode}"
        results |= {promise: {"status": "late", "text": what} for promise in rest[:1]}
        results |= {promise: {"status": "untried", "text": ""} for promise in rest[1:]}
    elif problem is not None:
        results = {}
    seconds = round(time.monotonic() - begun, 1)
    return {
        "name": name,
        "class": f"{kind.__module__}.{kind.__name__}",
        "problem": problem,
        "results": results,
        "seconds": seconds,
    }


def _hold(name: str, sender: Connection) -> None:
    """Runs in a process of its own, and sends what becomes of each promise, or why it cannot be built."""
    os.setsid()
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        warnings.simplefilter("ignore")
        try:
            for result in _results(name):
                sender.send(result)
        except Exception as error:  # whatever a class does
            sender.send(f"{type(error).__name__}: {error}")
        # What the class registered to run at exit belongs to the parent.
        sender.close()
        os._exit(0)


def _results(name: str) -> Iterator[tuple[str, str, str]]:
    arguments: dict[str, Any] = {} if REGISTRY.find(name).default_lr else {"lr": LEARNING_RATE}
    if name in OPTIONS:
        arguments["optim_args"] = OPTIONS[name]
    for result in held(name, arguments):  # type: ignore[arg-type]
        yield result.promise, result.status, result.text


def _clean(text: str) -> str:
    """Returns a text without what another machine or run would say otherwise."""
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    text = re.sub(r"(?:/[\w.+-]+){2,}/([\w.+-]+)", r"\1", text)
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:300]}..."


def _file(collection: str) -> Path:
    return RECORDS / f"{collection}.jsonl"


def _read(collection: str) -> list[dict[str, Any]]:
    file = _file(collection)
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


if __name__ == "__main__":
    main()
