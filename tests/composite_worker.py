"""Fits of pairs of optimizers under DDP and layerwise_ddp, all in the same two processes, in float16 with a scaler.

``trainer/test_composite_ddp.py`` starts both and compares what each writes to ``rank<n>.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from tests.composites import ON_TWO_RANKS, fit, request, state_of, steps_in_backward

RANK = int(os.environ.get("LOCAL_RANK", 0))
# The strategies, and what each appends to the main optimizer's name.
_FORMS = {"ddp": "", "layerwise_ddp": "_layerwise"}


class Watch(Callback):
    """Notes after every batch whether the processes have the same weights; may end the fit with the first epoch."""

    def __init__(self, ends: bool) -> None:
        self.ends = ends
        self.same: list[bool] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        mine = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        everyone = [torch.empty_like(mine), torch.empty_like(mine)]
        dist.all_gather(everyone, mine)
        self.same.append(torch.equal(*everyone))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.ends


def run(main: str, other: str, first: str, second: str, directory: Path) -> dict[str, Any]:
    """Trains an epoch under one strategy, resumes under another; returns how it ended."""
    same: list[bool] = []
    for strategy, given in ((first, {"directory": directory}), (second, {"resume": directory / "step=5.ckpt"})):
        watch = Watch(ends=not same)
        asked = request(main, other, _FORMS[strategy], scaled=True)
        flags = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
        model = fit(asked, "norm", scaled=True, rank=RANK, callbacks=[watch], **flags, **given)
        same += watch.same
    scaler = model.trainer.scaler
    assert scaler is not None
    return {**state_of(model), "same": same, "scale": scaler.get_scale()}


if __name__ == "__main__":
    folder, found = Path(sys.argv[1]), {}
    for pair in ON_TWO_RANKS:
        orders = [("ddp", "layerwise_ddp"), ("layerwise_ddp", "ddp")] if steps_in_backward(*pair) else [("ddp", "ddp")]
        found[pair] = {" then ".join(order): run(*pair, *order, folder / "-".join((*pair, *order))) for order in orders}
    torch.save(found, folder / f"rank{RANK}.pt")
