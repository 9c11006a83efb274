"""Fits that go on, in two processes, from checkpoints of one device, and write distributed ones; ``rank<n>.pt``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optim import LayerwiseFSDP2Strategy
from tests.cases import case_of
from tests.models import loader, trainer
from tests.sharded.layerwise_fsdp2_worker import Sharded

#: The optimizers on one device, on two, and on one again. The model has groups with and without weight decay.
MOVED = (
    ("adamw_torch", "adamw_torch", "adamw_torch_layerwise"),
    ("adafactor_layerwise", "adafactor", "adafactor"),
    ("galore_adamw", "galore_adamw_layerwise", "galore_adamw"),
    ("lomo", "lomo", "lomo"),
    ("muon", "muon", "muon"),
)


class States(Callback):
    """Notes weights and states, whole, where a fit begins and ends."""

    def __init__(self) -> None:
        self.begun: dict[str, Tensor] = {}
        self.ended: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begun = states(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ended = states(trainer, pl_module)


def states(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Tensor]:
    found = {}
    for name, parameter in module.named_parameters():
        for key, value in {"": parameter, **trainer.optimizers[0].state[parameter]}.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)
            found[f"{name} {key}"] = whole.detach().clone()
    return found


class OnOneDevice(Sharded):
    """The same module, not sharded."""

    def configure_model(self) -> None:
        pass


def made(kind: type[Sharded], name: str) -> Sharded:
    case = case_of(name)
    torch.manual_seed(0)
    targets = "all-linear" if case.projects else None
    return kind(optim=name, lr=case.lr, weight_decay=0.1, optim_args=case.options, optim_target_modules=targets)


def fit(module: L.LightningModule, steps: int, checkpoint: Path | None, save: Path, **flags: Any) -> States:
    """Trains up to so many steps and saves."""
    noted = States()
    run = trainer(max_steps=steps, callbacks=[noted], **flags)
    run.fit(module, loader(8), ckpt_path=checkpoint)
    run.save_checkpoint(save)
    return noted


def main(folder: Path) -> None:
    found = {}
    for first, second, _ in MOVED:
        layerwise = case_of(second).in_backward or second.endswith("_layerwise")
        strategy = LayerwiseFSDP2Strategy() if layerwise else ModelParallelStrategy(2, 1)
        flags = {"devices": 2, "strategy": strategy}
        noted = fit(made(Sharded, second), 6, folder / f"{first}.ckpt", folder / f"{first}, shards", **flags)
        found[first] = {"begun": noted.begun, "ended": noted.ended}
    torch.save(found, folder / f"rank{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
