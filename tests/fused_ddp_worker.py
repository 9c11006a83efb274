"""Fits under DDP and fused_ddp in float16, all in the same two processes; each writes ``rank<n>.pt``.

``test_fused_ddp.py`` starts both and compares.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_optim import FusedDDPStrategy
from tests.models import LitTokens, fp16_mixed, loader, trainer

RANK = int(os.environ.get("LOCAL_RANK", 0))
STEPS = 12
OVERFLOWED = (0, 5)
#: The optimizers with their options, by name.
OPTIMS: dict[str, dict[str, Any]] = {"adamw_torch": {}, "sgd": {"momentum": 0.9}, "adagrad": {}}
CLIPPING: dict[str, dict[str, Any]] = {
    "norm": {"gradient_clip_val": 0.1},
    "value": {"gradient_clip_val": 0.003, "gradient_clip_algorithm": "value"},
    "norm, accumulation": {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
}
SEVERAL = {"model[.]head[.].*": {"optim": "adagrad", "lr": 1e-2}}
VIEWS = {"gradient_as_bucket_view": True, "static_graph": True, "find_unused_parameters": False}


class Model(LitTokens):
    """The second process's losses overflow in some batches."""

    overflows: tuple[int, ...] = ()

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 1e36 if RANK == 1 and len(self.losses) - 1 in self.overflows else loss


class OverflowsOnOneRank(Model):
    overflows = OVERFLOWED


class Watch(Callback):
    """Notes after every batch whether the processes agree, whether weights moved, and the scale."""

    def __init__(self) -> None:
        self.same: list[bool] = []
        self.moved: list[bool] = []
        self.scales: list[float] = []
        self.wrapped = False
        self._last = torch.zeros(())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.wrapped = isinstance(trainer.strategy.model, DistributedDataParallel)
        self._last = self._weights(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        mine = self._weights(pl_module)
        everyone = [torch.empty_like(mine), torch.empty_like(mine)]
        dist.all_gather(everyone, mine)
        self.same.append(torch.equal(everyone[0], everyone[1]))
        self.moved.append(not torch.equal(self._last, mine))
        self._last = mine
        assert trainer.scaler is not None
        self.scales.append(trainer.scaler.get_scale())

    @staticmethod
    def _weights(module: L.LightningModule) -> Tensor:
        return torch.cat([p.detach().flatten() for p in module.parameters()])


class Calls:
    """Counts the calls of the fused kernels."""

    count = 0

    @classmethod
    def watch(cls, name: str) -> None:
        """Counts a kernel's calls from now on."""
        kernel = getattr(torch, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            cls.count += 1
            return kernel(*args, **kwargs)

        setattr(torch, name, call)


def fit(
    optim: str,
    strategy: Any,
    module: type[Model] = Model,
    param_groups: dict[str, Any] | None = None,
    **flags: Any,
) -> dict[str, Any]:
    """Trains twelve steps; returns the weights and what was noted."""
    torch.manual_seed(0)
    Calls.count = 0
    model = module(optim=optim, lr=1e-2, weight_decay=0.1, optim_args=OPTIMS[optim], param_groups=param_groups)
    watch = Watch()
    run = trainer(strategy=strategy, devices=2, max_steps=STEPS, plugins=[fp16_mixed()], callbacks=[watch], **flags)
    run.fit(model, loader(20))
    noted = {key: getattr(watch, key) for key in ("same", "moved", "scales", "wrapped")}
    groups = [{key: group[key] for key in ("fused", "foreach")} for group in run.optimizers[0].param_groups]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    return {"weights": weights, "kernels": Calls.count, "steps": run.global_step, "groups": groups, **noted}


def runs() -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Yields every pair of runs by name."""
    for optim in OPTIMS:
        for clipping, flags in CLIPPING.items():
            yield (
                f"{optim}, {clipping}",
                {
                    "ddp": fit(optim, "ddp", **flags),
                    "fused": fit(optim, "fused_ddp", **flags),
                },
            )
        yield (
            f"{optim}, overflow",
            {
                "ddp": fit(optim, "ddp", OverflowsOnOneRank, **CLIPPING["norm"]),
                "fused": fit(optim, "fused_ddp", OverflowsOnOneRank, **CLIPPING["norm"]),
            },
        )
    several = {"param_groups": SEVERAL, **CLIPPING["norm"]}
    yield (
        "several optimizers",
        {
            "ddp": fit("adamw_torch", "ddp", OverflowsOnOneRank, **several),
            "fused": fit("adamw_torch", "fused_ddp", OverflowsOnOneRank, **several),
        },
    )
    yield (
        "bucket views",
        {
            "ddp": fit("adamw_torch", DDPStrategy(**VIEWS), **CLIPPING["norm"]),
            "fused": fit("adamw_torch", FusedDDPStrategy(**VIEWS), **CLIPPING["norm"]),
        },
    )


if __name__ == "__main__":
    for kernel in ("_fused_adamw_", "_fused_sgd_", "_fused_adagrad_"):
        Calls.watch(kernel)
    torch.save(dict(runs()), Path(sys.argv[1]) / f"rank{RANK}.pt")
