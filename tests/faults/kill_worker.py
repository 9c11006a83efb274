"""Trains with checkpoints, and is hit by a signal at a moment; or goes on from what is there: see ``test_kills.py``.

A moment is a number of function calls after the fit began: the same in every run, wherever it is in Lightning, torch or
this package.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.models import LitTokens, loader, trainer

STEPS = 6


class Moments:
    """Counts the calls of functions, and those inside of what writes a checkpoint; sends a signal at one of them."""

    def __init__(self, at: int, number: int) -> None:
        self.at, self.number = at, number
        self.calls = 0
        self.writes: list[list[int]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        writes = frame.f_code.co_name == "save_checkpoint" and frame.f_code.co_filename.endswith("_checkpoint_files.py")
        if writes and event == "return":
            self.writes[-1].append(self.calls)
        if event != "call":
            return
        self.calls += 1
        if writes:
            self.writes.append([self.calls])
        if self.calls == self.at:
            os.kill(os.getpid(), self.number)


def fit(name: str, folder: Path, checkpoint: Path | None = None, at: int = 0, number: int = 0) -> Moments:
    """Trains up to the last step, with a signal at a moment; returns what moments there were."""
    torch.manual_seed(0)
    model = LitTokens(8, optim=name, lr=1e-2, weight_decay=0.1)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)
    run = trainer(max_steps=STEPS, callbacks=[saver], enable_checkpointing=True)
    moments = Moments(at, number)
    sys.setprofile(moments)
    try:
        run.fit(model, loader(2), ckpt_path=checkpoint, weights_only=True)
    finally:
        sys.setprofile(None)
    torch.save({"weights": model.state_dict(), "optimizer": run.optimizers[0].state_dict()}, folder / "ended.pt")
    return moments


def main(folder: Path, tasks: list[dict[str, Any]]) -> None:
    """Does what is asked for: fits into folders; notes the moments of each."""
    torch.set_num_threads(1)
    for task in tasks:
        place = folder / task.pop("folder")
        moments = fit(folder=place, **task)
        (place / "moments.json").write_text(json.dumps({"calls": moments.calls, "writes": moments.writes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
