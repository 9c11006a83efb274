"""Trains the GPT of ``examples/`` with GaLore's exact and randomized projections, for ``optimizers.py``."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer, seed_everything

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from gpt import GPT, PythonTopics

SETTINGS: dict[str, Any] = {"lr": 2e-2, "lr_scheduler": "cosine", "warmup_steps": 0.05}
RANK, GAP = 16, 25  # the model is 128 wide; ten projections in 250 steps
AVERAGED = 20


@dataclass(frozen=True)
class Losses:
    """Losses at the end of training, in nats per byte."""

    train: float  # mean of the last steps
    val: float


class TrainLosses(Callback):
    """Keeps the loss of every training step."""

    def __init__(self) -> None:
        self.each: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.each.append(outputs["loss"].item())


def quiet_trainer(steps: int, callback: Callback) -> Trainer:
    """Returns a Trainer on the CPU that clips, validates at the end, and writes and shows nothing."""
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=callback,
    )


def train(projection: str, seed: int, steps: int) -> Losses:
    """Trains from scratch; the seed decides the initial weights and the order of the data."""
    seed_everything(seed, verbose=False)
    options = {"rank": RANK, "update_proj_gap": GAP, "projection": projection}
    model, data, losses = GPT(optim="galore_adamw", optim_args=options, **SETTINGS), PythonTopics(), TrainLosses()
    trainer = quiet_trainer(steps, losses)
    trainer.fit(model, data)
    return Losses(statistics.fmean(losses.each[-AVERAGED:]), trainer.callback_metrics["val_loss"].item())
