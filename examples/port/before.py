"""A module as packages write them: its own parameter groups, its own schedule, schedule-free by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning import LightningModule
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Classifier(LightningModule):
    """A perceptron for digits."""

    def __init__(
        self,
        width: int = 64,
        lr: float = 1e-2,
        weight_decay: float = 0.1,
        warmup_steps: int = 20,
        schedule_free: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(64, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        loss = cross_entropy(self.network(images), digits)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, digits = batch
        self.log("val_loss", cross_entropy(self.network(images), digits))

    def configure_optimizers(self) -> Any:
        settings = self.hparams
        decay = [parameter for parameter in self.parameters() if parameter.ndim >= 2]
        no_decay = [parameter for parameter in self.parameters() if parameter.ndim < 2]
        groups = [
            {"params": decay, "weight_decay": settings.weight_decay},
            {"params": no_decay, "weight_decay": 0.0},
        ]
        if settings.schedule_free:
            return AdamWScheduleFree(groups, lr=settings.lr, warmup_steps=settings.warmup_steps)
        optimizer = torch.optim.AdamW(groups, lr=settings.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _factor(self, step: int) -> float:
        """Returns the learning rate of a step as a share of the highest: it rises, then falls as a cosine does."""
        warmup = self.hparams["warmup_steps"]
        if step < warmup:
            return step / max(1, warmup)
        progress = (step - warmup) / max(1, self.trainer.estimated_stepping_batches - warmup)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))

    def _switch(self, training: bool) -> None:
        """Puts the weights to train with into the model, or their averages."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        if isinstance(optimizer, AdamWScheduleFree):
            optimizer.train() if training else optimizer.eval()

    def on_fit_start(self) -> None:
        self._switch(training=True)

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "fit":
            self._switch(training=False)

    def on_validation_end(self) -> None:
        if self.trainer.state.fn == "fit":
            self._switch(training=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._switch(training=False)
        checkpoint["state_dict"] = {name: value.clone() for name, value in self.state_dict().items()}
        self._switch(training=self.trainer.training)

    def on_fit_end(self) -> None:
        self._switch(training=False)
