"""Processes of their own on the stand-in device "npu"; see test_npu.py.

``python -m tests.npu_worker train DIR``, ``... resume DIR`` and ``... ddp DIR PORT ...``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.models import LitTokens, loader, trainer


def on_npu(**flags: Any) -> L.Trainer:
    """A quiet Trainer on one NPU."""
    return trainer(**{"accelerator": "npu", "strategy": "npu", "devices": 1, **flags})


FUSED = "adamw_torch_npu_fused"
RESUMED = [("adamw_torch", "32-true"), ("adamw_torch_layerwise", "16-mixed"), (FUSED, "32-true"), (FUSED, "16-mixed")]


def train(name: str, folder: Path, **flags: Any) -> LitTokens:
    """Trains 20 steps; step 10 is saved as ``NAME.ckpt``."""
    torch.manual_seed(0)
    model = LitTokens(optim=name, lr=1e-3)
    saver = ModelCheckpoint(folder, filename=f"{name}-{{step}}", every_n_train_steps=10, save_top_k=-1)
    on_npu(max_steps=20, callbacks=[saver], enable_checkpointing=True, **flags).fit(model, loader())
    (folder / f"{name}-step=10.ckpt").rename(folder / f"{name}.ckpt")
    (folder / f"{name}-step=20.ckpt").unlink()
    return model


def train_all(folder: Path) -> None:
    """Trains each of ``RESUMED``; leaves ``NAME@PRECISION.ckpt``, and the last weights as ``NAME@PRECISION.whole``."""
    for name, precision in RESUMED:
        model = train(name, folder, precision=precision, gradient_clip_val=0.5)
        torch.save(model.state_dict(), folder / f"{name}@{precision}.whole")
        (folder / f"{name}.ckpt").rename(folder / f"{name}@{precision}.ckpt")


def resume(folder: Path) -> None:
    """Trains on from every ``NAME@PRECISION.ckpt`` to step 20; the weights go to ``NAME@PRECISION.out``."""
    for path in sorted(folder.glob("*.ckpt")):
        name, _, precision = path.stem.partition("@")
        model = LitTokens(optim=name, lr=1e-3)
        run = on_npu(max_steps=20, precision=precision, gradient_clip_val=0.5)
        run.fit(model, loader(), ckpt_path=path, weights_only=True)
        torch.save(model.state_dict(), path.with_suffix(".out"))


# Accelerator, strategy and identifier; the first is what the others are compared with.
DDP_RUNS = (
    ("cpu", "ddp", "adamw_torch"),
    ("npu", "npu_ddp", "adamw_torch"),
    ("npu", "npu_ddp", "adamw_torch_npu_fused"),
    ("npu", "layerwise_ddp", "adamw_torch_layerwise"),
)


def ddp(folder: Path, ports: list[str]) -> None:
    """Trains as one of two nodes with one device each; weights and where they were go to ``STRATEGY-OPTIM.RANK``.

    Two nodes, because torch asks the device for the number of its queues, and a device in Python has but one.
    """
    os.environ |= {"NODE_RANK": os.environ["LOCAL_RANK"], "LOCAL_RANK": "0"}
    for (accelerator, strategy, optim), port in zip(DDP_RUNS, ports, strict=True):
        os.environ["MASTER_PORT"] = port
        torch.manual_seed(0)
        model = LitTokens(optim=optim, lr=1e-3)
        run = trainer(
            accelerator=accelerator, strategy=strategy, devices=1, num_nodes=2, max_steps=6, gradient_clip_val=0.5
        )
        run.fit(model, loader(12), loader(4, seed=1))
        outcome = {
            "weights": model.state_dict(),
            "device": str(run.strategy.root_device),
            "backend": dist.get_backend(),
        }
        torch.save(outcome, folder / f"{strategy}-{optim}.{run.global_rank}")
        run.strategy.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    # As in the tests: several threads round sums differently.
    torch.set_num_threads(1)
    task, folder, *ports = sys.argv[1:]
    if task == "ddp":
        ddp(Path(folder), ports)
    else:
        {"train": train_all, "resume": resume}[task](Path(folder))
