"""Fits that are saved between micro-batches and resumed, in two processes; ``test_accumulated.py`` starts them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_optim import IncompatibleTrainer
from tests.models import LENGTH, TOKENS, LitTokens, loader, trainer

RANK = int(os.environ.get("LOCAL_RANK", 0))
#: By strategy: the identifier.
FORMS = {
    "ddp": "adamw_torch",
    "layerwise_ddp": "adamw_torch_layerwise",
    "fsdp2": "adamw_torch",
    "layerwise_fsdp2": "adamw_torch_layerwise",
}


class ByIndex(LitTokens):
    """Its batches depend on their numbers and the process, so that a loader that starts anew changes nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * RANK + 100 * self.current_epoch + batch_idx)
        tokens = torch.randint(0, TOKENS, (4, LENGTH), generator=generator)
        return self._loss((tokens, (3 * tokens + 1) % TOKENS))


class Blocks(ByIndex):
    """One that can be sharded without ``configure_model``."""

    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        self.model = nn.Sequential(  # type: ignore[assignment]
            nn.Embedding(TOKENS, 16),
            *(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(2)),
            nn.Linear(16, TOKENS),
        )


class SaveAt(Callback):
    """Saves after a batch of the first epoch."""

    def __init__(self, batch: int, file: Path) -> None:
        self.batch, self.file = batch, file

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, _: Any, __: Any, index: int) -> None:
        if index == self.batch and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.file)


def weights(module: L.LightningModule) -> Tensor:
    """Returns all weights, whole."""
    found: list[Any] = list(module.parameters())
    return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten() for p in found])


def fit(strategy: str, *callbacks: Callback, checkpoint: Path | None = None) -> tuple[Tensor, Tensor]:
    """Trains two windows and a short one; returns the weights before and after."""
    torch.manual_seed(0)
    model = Blocks(optim=FORMS[strategy], lr=1e-2)
    before = weights(model)
    run = trainer(strategy=strategy, devices=2, max_epochs=1, accumulate_grad_batches=3, callbacks=list(callbacks))
    run.fit(model, loader(14), ckpt_path=checkpoint)
    return before, weights(model)


def resumed(strategy: str, file: Path) -> dict[str, Any]:
    """Trains, saves between micro-batches, and goes on from there."""
    before, whole = fit(strategy, SaveAt(4, file))
    try:
        _, after = fit(strategy, checkpoint=file)
    except IncompatibleTrainer as error:
        return {"refused": str(error)}
    return {"apart": float((whole - after).abs().max()), "moved": float((whole - before).abs().max())}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.save(
        {strategy: resumed(strategy, folder / f"{strategy}.ckpt") for strategy in FORMS}, folder / f"rank{RANK}.pt"
    )
