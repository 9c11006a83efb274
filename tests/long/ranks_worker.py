"""Fits in four processes, under ddp and layerwise_ddp; ``test_long.py`` starts them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from tests.cases import case_of
from tests.models import LitTokens, loader, trainer

RANK = int(os.environ.get("LOCAL_RANK", 0))


def made(name: str) -> LitTokens:
    """Returns the module that starts with the same weights in every process."""
    torch.manual_seed(0)
    return LitTokens(width=16, optim=name, lr=1e-2, optim_args=case_of(name).options)


def weights(module: LitTokens) -> Tensor:
    """Returns all weights in one."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def fit(name: str) -> Tensor:
    """Returns the weights after two epochs."""
    model = made(name)
    strategy = "layerwise_ddp" if name.endswith("_layerwise") else "ddp"
    run = trainer(max_epochs=2, strategy=strategy, devices=4, accumulate_grad_batches=2, gradient_clip_val=0.5)
    run.fit(model, loader(24, batch_size=2))
    return weights(model)


if __name__ == "__main__":
    names = ("adamw_torch", "adamw_torch_layerwise", "muon", "muon_layerwise")
    found = {"start": weights(made("sgd")), **{name: fit(name) for name in names}}
    torch.save(found, Path(sys.argv[1]) / f"rank{RANK}.pt")
