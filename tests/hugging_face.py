"""Hugging Face's Trainer without accelerate: its arguments, and the optimizer and the schedule that it makes."""

from __future__ import annotations

import dataclasses

import torch
import transformers
from torch import nn


@dataclasses.dataclass
class Arguments(transformers.TrainingArguments):
    """The real ones; they want accelerate for no more than a look at the devices."""

    device = torch.device("cpu")


def trainer_of(model: nn.Module, args: Arguments) -> transformers.Trainer:
    """Returns a Trainer of which only ``create_optimizer`` and ``create_scheduler`` work."""
    trainer = object.__new__(transformers.Trainer)
    trainer.args, trainer.model = args, model
    trainer.optimizer = trainer.optimizer_cls_and_kwargs = trainer.lr_scheduler = None
    return trainer
