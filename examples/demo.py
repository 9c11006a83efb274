"""Trains the GPT of ``gpt.py`` with each of ``OPTIMIZERS`` from the same seed and batches, and compares them.

Another identifier in ``OPTIMIZERS`` is another row of the table and another curve of the figure::

    python examples/demo.py --steps 250 --output demo_output
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import logging
import os
import platform
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpt import GPT, PythonTopics
from lightning import Callback, Trainer, seed_everything
from matplotlib.figure import Figure
from torch.utils.hooks import RemovableHandle

from lightning_optim import REGISTRY
from lightning_optim.build import measured_bytes, state_bytes

OPTIMIZERS = ("adamw_torch", "adamw_torch_layerwise", "adamw_8bit")
SETTINGS = {"lr": 4e-3, "weight_decay": 0.1, "lr_scheduler": "cosine", "warmup_steps": 0.05}
SEED = 0
AVERAGED = 20
WATCHED = 5


class Recorder(Callback):
    """Keeps the losses and the seconds of every training step, and how many bytes of gradients the first ones hold."""

    def __init__(self) -> None:
        self.train_losses: list[float] = []
        self.val_losses: dict[int, float] = {}  # by step
        self.seconds: list[float] = []
        self.start = 0.0
        self.gradient_bytes = 0
        self.hooks: list[RemovableHandle] = []

    def setup(self, trainer: Trainer, model: GPT, stage: str) -> None:
        def count(_: torch.Tensor) -> None:
            alive = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
            self.gradient_bytes = max(self.gradient_bytes, alive)

        if stage == "fit":
            # Before the optimizer is built, so that a gradient is counted before a layerwise optimizer steps it.
            self.hooks = [parameter.register_post_accumulate_grad_hook(count) for parameter in model.parameters()]

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, model: GPT, outputs: dict[str, torch.Tensor], *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.train_losses.append(outputs["loss"].item())
        if len(self.seconds) == WATCHED:  # counting takes time
            for hook in self.hooks:
                hook.remove()

    def on_validation_end(self, trainer: Trainer, model: GPT) -> None:
        self.val_losses[trainer.global_step] = trainer.callback_metrics["val_loss"].item()


@dataclass(frozen=True)
class Result:
    """What one optimizer achieved, and what its state costs in bytes."""

    optimizer: str
    record: Recorder
    val_loss: float
    val_perplexity: float
    state_measured: int
    state_counted: int | None
    checkpoint: Path


def train(optimizer: str, steps: int, output: Path) -> Result:
    """Trains from scratch, validates at the end and saves a checkpoint."""
    seed_everything(SEED, verbose=False)
    model, data, record = GPT(optim=optimizer, **SETTINGS), PythonTopics(), Recorder()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=min(50, steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=record,
    )
    trainer.fit(model, data)
    built, spec, checkpoint = trainer.optimizers[0], REGISTRY.find(optimizer), output / f"{optimizer}.ckpt"
    trainer.save_checkpoint(checkpoint, weights_only=False)  # the optimizer's state, too
    metrics = trainer.callback_metrics  # of the last validation
    if steps not in record.val_losses:
        (metrics,) = trainer.validate(model, data, verbose=False)
    return Result(
        optimizer,
        record,
        float(metrics["val_loss"]),
        float(metrics["val_perplexity"]),
        measured_bytes(built.state_dict()),
        state_bytes(spec, spec.options(), built.param_groups),
        checkpoint,
    )


def print_table(results: list[Result]) -> None:
    """Prints one row per optimizer, what the columns mean, which runs are equal, and where this ran."""
    row = "{:<21}{:>11}{:>9}{:>11}{:>12}{:>10}{:>11}{:>7}"
    names = ("optimizer", "train loss", "val loss", "perplexity", "state bytes", "counted", "gradients", "s/step")
    print("\n" + row.format(*names))
    for result in results:
        train_loss = statistics.fmean(result.record.train_losses[-AVERAGED:])
        losses = (f"{train_loss:.4f}", f"{result.val_loss:.4f}", f"{result.val_perplexity:.3f}")
        counted = "unknown" if result.state_counted is None else f"{result.state_counted:,}"
        gradients, seconds = f"{result.record.gradient_bytes:,}", f"{statistics.median(result.record.seconds):.3f}"
        print(row.format(result.optimizer, *losses, f"{result.state_measured:,}", counted, gradients, seconds))
    print(
        f"""
train loss   mean of the last {AVERAGED} steps, nats per byte
perplexity   exp(val loss): of validation, per byte
state bytes  measured in the optimizer's state_dict(); 8-bit optimizers keep 32 bits for embeddings and for
             parameters with fewer than 4096 elements
counted      what lightning_optim.build computes from the shapes alone, without lookup tables that tensors share
gradients    most bytes of gradients alive at once, counted whenever one arrives, in the first {WATCHED} steps
s/step       median; clipping by norm costs a layerwise optimizer a second backward
"""
    )
    for one, other in itertools.combinations(results, 2):
        if (one.record.train_losses, one.record.val_losses) == (other.record.train_losses, other.record.val_losses):
            print(f"Bit for bit the same losses in every step: {one.optimizer} and {other.optimizer}.\n")
    packages = ("torch", "lightning", "bitsandbytes", "lightning-optim")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    hardware = f"{torch.get_num_threads()} thread on {os.cpu_count()} CPU cores ({platform.machine()})"
    print(f"{hardware}, Python {platform.python_version()}, {versions}")


def plot(results: list[Result], path: Path) -> None:
    """Draws the losses by step next to the bytes of states and gradients."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    losses, memory = figure.subplots(1, 2, width_ratios=(2, 1))
    for number, result in enumerate(results):
        color = f"C{number}"
        thickness = 2 * (len(results) - number)  # what lies below stays visible where curves agree
        losses.plot(result.record.train_losses, color=color, alpha=0.4, linewidth=thickness / 2)
        steps, val_losses = zip(*result.record.val_losses.items(), strict=True)
        style = {"color": color, "linewidth": thickness, "marker": "o", "markersize": 4 + thickness}
        losses.plot(steps, val_losses, label=result.optimizer, **style)
        sizes = {"state": result.state_measured / 2**20, "gradients": result.record.gradient_bytes / 2**20}
        for offset, (kind, size), alpha in zip((-0.2, 0.2), sizes.items(), (1.0, 0.4), strict=True):
            bar = memory.bar(number + offset, size, width=0.36, color=color, alpha=alpha)
            memory.bar_label(bar, labels=[f"{size:.2f}\n{kind}"], padding=2, fontsize="x-small")
    losses.set(title="Loss: validation (dots) and training", xlabel="step", ylabel="nats per byte")
    losses.legend(frameon=False)
    losses.grid(alpha=0.3)
    memory.set(title="Optimizer state and live gradients", ylabel="MiB")
    memory.set_xticks(range(len(results)), ["_\n".join(result.optimizer.rsplit("_", 1)) for result in results])
    memory.margins(y=0.15)
    for axes in (losses, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def show_checkpoint(path: Path) -> None:
    """Lists what a checkpoint holds, and what the model in it writes."""
    checkpoint = torch.load(path, weights_only=True)
    print(f"\n{path} ({path.stat().st_size / 2**20:.2f} MiB, read with torch.load(weights_only=True)):")
    print("  " + ", ".join(checkpoint))
    model = GPT.load_from_checkpoint(path)
    seed_everything(SEED, verbose=False)
    text = model.sample("The ")
    print("  GPT.load_from_checkpoint(...).sample('The ') writes:")
    print("\n".join(f"    | {line}" for line in text.splitlines()))


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250, help="training steps per optimizer (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # several wait for each other on a busy machine, and sums depend on their number
    # Remarks that do not apply: the data is in memory, LeafSpec is Lightning's, nobody multiplies 4-bit matrices.
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*LeafSpec.*")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

    arguments.output.mkdir(parents=True, exist_ok=True)
    results = [train(optimizer, arguments.steps, arguments.output) for optimizer in OPTIMIZERS]
    for result in results:
        show_checkpoint(result.checkpoint)
    print_table(results)
    plot(results, arguments.output / "losses.png")
    print(f"The loss curves are in {arguments.output / 'losses.png'}")


if __name__ == "__main__":
    main()
