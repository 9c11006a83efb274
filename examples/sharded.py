"""Trains the GPT of ``gpt.py`` in two processes, each of which holds half of everything, and goes on in one.

FSDP2 shards weights, gradients and the optimizer's state. Each gradient is reduced, stepped and freed while backward
runs. The checkpoint is a folder of shards; ``consolidate`` makes one file of it, for any number of processes::

    python examples/sharded.py
    lightning-optim consolidate demo_output/shards.ckpt demo_output/whole.ckpt
    python examples/sharded.py --devices 1 --steps 100 --resume demo_output/whole.ckpt

It prints how much of everything the first process holds, and the perplexity at the checkpoint as each of them sees it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from gpt import GPT, PythonTopics
from lightning import Trainer, seed_everything
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


class ShardedGPT(GPT):
    """The same, which says what is sharded together. A module without tied weights need not: see docs/sharded.md."""

    def configure_model(self) -> None:
        if isinstance(self, FSDPModule):  # Lightning calls it for training and for validation
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)  # the rest; the embedding is the output layer, too


def share(values: Iterable[Any]) -> str:
    """Returns how much of the tensors among some values this process holds."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    held = sum((each.to_local() if isinstance(each, DTensor) else each).nbytes for each in tensors)
    return f"{held / 2**20:.2f} of {sum(each.nbytes for each in tensors) / 2**20:.2f} MiB"


def main() -> None:
    """Trains, or goes on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optim", default="muon", help="identifier (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="all in all (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()

    seed_everything(0)
    torch.set_num_threads(1)  # of each process
    several = arguments.devices > 1
    trainer = Trainer(
        strategy="layerwise_fsdp2" if several else "layerwise",
        devices=arguments.devices,
        accelerator="cpu",
        num_sanity_val_steps=0,
        max_steps=arguments.steps,
        logger=False,
        enable_checkpointing=False,
    )
    model = (ShardedGPT if several else GPT)(optim=arguments.optim, lr=0.02)
    data = PythonTopics(batch_size=16 // arguments.devices)
    if arguments.resume:
        (metrics,) = trainer.validate(model, data, ckpt_path=arguments.resume, verbose=False)
        print(f"Perplexity of {arguments.resume}: {metrics['val_perplexity']:.4f}")
    trainer.fit(model, data, ckpt_path=arguments.resume)
    moments = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
    held = f"{share(model.parameters())} of weights, {share(moments)} of state"  # before validation gathers anything
    checkpoint = arguments.output / ("shards.ckpt" if several else "longer.ckpt")
    trainer.save_checkpoint(checkpoint, weights_only=False)
    (metrics,) = trainer.validate(model, data, verbose=False)
    if trainer.is_global_zero:
        print(f"The first of {arguments.devices} holds {held}")
        print(f"Perplexity of {checkpoint}: {metrics['val_perplexity']:.4f}")


if __name__ == "__main__":
    main()
