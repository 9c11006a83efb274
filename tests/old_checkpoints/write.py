"""Writes what later versions have to read: ``python -m tests.old_checkpoints.write DIRECTORY``.

The files of a folder were written by the version of its name, on the CPU, with this script as it was then: those of
``0.1.0/`` before its modules were moved, those of ``0.2.0/`` at the commit that gave it its number. For every name
there is a checkpoint after 5 steps, ``NAME.ckpt``, and the weights after 5 more, ``NAME.weights``. ``module.pt`` and
``optimizer.pt`` are whole objects, pickled.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from lightning_optim import build_optimizer
from tests.models import LitTokens, loader, trainer

WIDTH = 16
_BLOCK = {"min_8bit_size": 256}
#: One name for each format of states and each way of stepping; with options under which a small model shows them.
REQUESTS: dict[str, dict[str, Any]] = {
    "adamw_torch": {"lr_scheduler": "cosine", "warmup_steps": 2},
    "adamw_torch_fused": {},
    "adamw_torch_layerwise": {"lr_scheduler": "linear"},
    "adamw_8bit": {"optim_args": _BLOCK},
    "paged_lion_8bit_layerwise": {"optim_args": _BLOCK},
    "adamw_torch_8bit": {},
    "adamw_anyprecision": {"optim_args": {"use_kahan_summation": True}},
    "galore_adamw_8bit_layerwise": {"optim_args": {"rank": 4, **_BLOCK}},
    "galore_adafactor": {"optim_args": {"rank": 4}},
    "apollo_adamw": {"optim_args": {"rank": 4}},
    "adafactor": {},
    "adalomo": {},
    "grokadamw": {},
    "stable_adamw": {"optim_args": {"triton": False}},
    "schedule_free_adamw": {"warmup_steps": 2},
    "torch.optim.NAdam": {"lr_scheduler": "reduce_lr_on_plateau"},
}


def made(name: str) -> LitTokens:
    """Returns the module that asks for ``name``."""
    torch.manual_seed(0)
    return LitTokens(width=WIDTH, optim=name, lr=1e-2, weight_decay=0.1, **REQUESTS[name])


def fit(model: LitTokens, steps: int, checkpoint: Path | None = None) -> Any:
    """Trains up to ``steps`` and returns the Trainer."""
    run = trainer(max_steps=steps)
    run.fit(model, loader(batches=5), loader(batches=1, seed=1), ckpt_path=checkpoint, weights_only=True)
    return run


def main(directory: Path) -> None:
    """Writes all files."""
    torch.set_num_threads(1)
    directory.mkdir(parents=True, exist_ok=True)
    for name in REQUESTS:
        model, file = made(name), directory / f"{name}.ckpt"
        fit(model, 5).save_checkpoint(file)
        resumed = made(name)
        fit(resumed, 10, file)
        torch.save(resumed.state_dict(), file.with_suffix(".weights"))
    torch.save(made("adamw_8bit"), directory / "module.pt")
    optimizer = build_optimizer(made("adamw_torch").model, "galore_adamw", lr=1e-2, optim_args={"rank": 4})
    torch.save(optimizer, directory / "optimizer.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
