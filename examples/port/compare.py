"""Trains ``before.py`` and ``after.py`` side by side, and counts the lines that go.

The losses with AdamW and a cosine schedule are the same, bit for bit. Schedule-free ones agree up to rounding:
schedulefree computes one set of weights from the other at every switch, here the weights to train with are kept::

    python examples/port/compare.py
"""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any

import after
import before
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

#: How the module was asked before, and how it is now.
TRAININGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AdamW, warm-up and cosine": (
        {"lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 20},
        {"optim": "adamw_torch", "lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 20, "lr_scheduler": "cosine"},
    ),
    "schedule-free AdamW": (
        {"lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 20, "schedule_free": True},
        {"optim": "schedule_free_adamw", "lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 20},
    ),
}


class Losses(Callback):
    """Keeps the losses of training and validation."""

    def __init__(self) -> None:
        self.kept: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        self.kept.append(outputs["loss"].item())

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.kept.append(trainer.callback_metrics["val_loss"].item())


def losses(module_class: type[LightningModule], arguments: dict[str, Any], epochs: int = 3) -> torch.Tensor:
    """Trains from the same seed on the same batches."""
    seed_everything(0, verbose=False)
    images, digits = (torch.tensor(part) for part in load_digits(return_X_y=True))
    data = TensorDataset(images.float() / 16, digits)
    train, val = torch.utils.data.random_split(data, [0.8, 0.2])
    losses = Losses()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=losses,
    )
    trainer.fit(module_class(**arguments), DataLoader(train, 32, shuffle=True), DataLoader(val, len(val)))
    return torch.tensor(losses.kept)


def code(module: Any) -> list[str]:
    """Returns the lines of a file that are not empty."""
    return [line for line in Path(module.__file__).read_text(encoding="utf-8").splitlines() if line.strip()]


def main() -> None:
    """Compares."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for name, (old, new) in TRAININGS.items():
        one, other = losses(before.Classifier, old), losses(after.Classifier, new)
        apart = float((one - other).abs().max())
        print(f"{name}: {len(one)} losses, from {one[0]:.3f} to {one[-1]:.3f}; largest difference {apart:.1g}")
    changed = list(difflib.ndiff(code(before), code(after)))
    gone, came = (sum(line.startswith(sign) for line in changed) for sign in ("- ", "+ "))
    print(f"before.py: {len(code(before))} lines. after.py: {len(code(after))} lines. {gone} go, {came} come.")


if __name__ == "__main__":
    main()
