"""Killed at any moment, a training leaves whole checkpoints, and goes on from the last one as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim.files import check_file
from tests.processes import run_fresh
from tests.trainer.test_resume import assert_equal

NAMES = ("adamw_torch_layerwise", "schedule_free_adamw")
#: How often each hits: `LIGHTNING_OPTIM_HITS=20 pytest tests/faults/test_kills.py` takes minutes.
TIMES = int(os.environ.get("LIGHTNING_OPTIM_HITS", 1))
#: What hits the training, and where: anywhere, or while a checkpoint is written.
HITS = ("SIGKILL", "SIGKILL while writing", "SIGTERM")
ASKED = [(name, hit, count) for name in NAMES for hit in HITS for count in range(TIMES)]
Outcome = dict[str, Any]


def work(folder: Path, *tasks: dict[str, Any]) -> int:
    done = run_fresh("-m", "tests.faults.kill_worker", str(folder), json.dumps(tasks), timeout=120)
    assert done.returncode <= 0 or "SIGTERM" in done.stderr, done.stderr[-2000:]
    return done.returncode


def moment(folder: Path, hit: str, chance: random.Random) -> int:
    moments = json.loads((folder / "moments.json").read_text())
    begin, end = chance.choice(moments["writes"]) if "writing" in hit else (1, moments["calls"] * 9 // 10)
    return chance.randint(begin, end)


@pytest.fixture(scope="module")
def hit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of trainings that were hit, ``NAME HIT COUNT``, and of those that went on from there, ``... resumed``."""
    folder, chance, resumed = tmp_path_factory.mktemp("kills"), random.Random(16), []
    work(folder, *({"name": name, "folder": name} for name in NAMES))
    for name, what, count in ASKED:
        place = f"{name} {what} {count}"
        number = signal.Signals[what.split()[0]]
        status = work(
            folder, {"name": name, "folder": place, "at": moment(folder / name, what, chance), "number": number}
        )
        assert status == -signal.SIGKILL or number is signal.SIGTERM
        last = max(whole(folder / place), key=lambda held: held[0], default=(0, None))[1]
        resumed.append({"name": name, "folder": f"{place} resumed", "checkpoint": last and str(last)})
    work(folder, *resumed)
    return folder


def whole(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yields the step and the path of every checkpoint; fails if one is not whole."""
    for file in folder.glob("*.ckpt"):
        check_file(file)
        yield torch.load(file, weights_only=True)["global_step"], file


@pytest.mark.parametrize(("name", "what", "count"), ASKED)
def test_it_goes_on_from_the_last_checkpoint(hit: Path, name: str, what: str, count: int) -> None:
    place = hit / f"{name} {what} {count}"
    resumed = torch.load(hit / f"{place.name} resumed" / "ended.pt", weights_only=True)
    assert_equal(resumed, torch.load(hit / name / "ended.pt", weights_only=True), place.name)


def test_something_was_lost_and_something_was_there(hit: Path) -> None:
    """The moments are not all before the first checkpoint or after the last."""
    there = {f"{name} {what} {count}": [*whole(hit / f"{name} {what} {count}")] for name, what, count in ASKED}
    assert any(there.values())
    assert not all((hit / place / "ended.pt").exists() for place in there)
