"""Promises about the parameters that can be stepped."""

from __future__ import annotations

import torch

from lightning_optim.testing._broken import expecting
from lightning_optim.testing._subject import Subject
from lightning_optim.testing._training import STEPS, all_moved
from lightning_optim.testing._trial import Shapes


def shapes(subject: Subject) -> None:
    """Parameters of no dimension and of five are stepped, beside empty ones."""
    trial = subject.trial(Shapes)
    start = trial.weights()
    with expecting("steps of parameters of any shape"):
        trial.advance(range(STEPS))
    all_moved(start, trial)


def bf16_weights(subject: Subject) -> None:
    """bfloat16 parameters are stepped and stay bfloat16."""
    trial = subject.trial(dtype=torch.bfloat16)
    start = trial.weights()
    with expecting("steps of bfloat16 parameters"):
        trial.advance(range(STEPS))
    all_moved(start, trial)
