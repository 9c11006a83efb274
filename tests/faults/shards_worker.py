"""Writes a distributed checkpoint, or is killed while it writes the next; reads what was made of it: ``found.json``."""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_optim import LayerwiseFSDP2Strategy
from tests.models import loader, trainer
from tests.sharded.layerwise_fsdp2_worker import Sharded

NAMES = {"ours": "adamw_torch_layerwise", "lightnings": "adamw_torch"}


class Saves(Callback):
    """Saves after every step in ``last.ckpt``; dies in the middle of writing that of step ``dies``."""

    def __init__(self, file: Path, dies: int) -> None:
        self.file, self.dies = file, dies

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.dies:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        trainer.save_checkpoint(self.file)


def fit(kind: str, steps: int, checkpoint: Path | None = None, save: Callback | None = None) -> Sharded:
    torch.manual_seed(0)
    module = Sharded(optim=NAMES[kind], lr=1e-2)
    strategy = LayerwiseFSDP2Strategy() if kind == "ours" else ModelParallelStrategy(1, 1)
    run = trainer(max_steps=steps, devices=1, strategy=strategy, callbacks=[save] if save else [])
    run.fit(module, loader(8), ckpt_path=checkpoint)
    return module


def main(task: str, folder: Path) -> None:
    if task in NAMES:
        fit(task, 3, save=Saves(folder / task / "last.ckpt", dies=2))
        raise AssertionError("not killed")
    found: dict[str, str] = {}
    for kind in NAMES:
        for place in sorted((folder / kind).iterdir()):
            try:
                fit(kind, 2, place)
            except Exception as error:
                found[f"{kind}/{place.name}"] = f"{type(error).__name__}: {error}"
            else:
                found[f"{kind}/{place.name}"] = "read"
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
