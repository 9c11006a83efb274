"""What every trial trains, made anew for each: the built-in GPT, or the user's module and data."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningDataModule, LightningModule

from lightning_optim.bench._gpt import GPT, PythonTopics
from lightning_optim.build import OptimConfig


class Parts(NamedTuple):
    """A module, its data and the arguments of the Trainer, used once."""

    module: LightningModule
    data: LightningDataModule | None
    trainer: dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        name: What it is called.
        make: Makes it anew; random numbers are seeded by the caller.
        facts: What decides what it computes, as plain values.
        shared: What all optimizers are given, as far as they take it: arguments of :class:`OptimConfig`.
        own: What the config names itself, whose learning rate and options are its own; ``None`` if it names nothing.
        steps: How many steps it trains; ``None`` if it does not say.
        defaults: The optimizers that are compared if none are named, where they need options to fit it.
        left_out: What of the config takes no part, with the reason.
    """

    name: str
    make: Callable[[], Parts]
    facts: Mapping[str, Any]
    shared: Mapping[str, Any]
    own: OptimConfig | None = None
    steps: int | None = None
    defaults: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


#: What is shared where a config says nothing.
SCHEDULE: Mapping[str, Any] = {"lr_scheduler": "cosine", "warmup_steps": 0.05}


def demo(quick: bool) -> Workload:
    """Returns the built-in GPT on the Python documentation, smaller for a quick look."""
    layers, context, batch_size = (2, 32, 8) if quick else (3, 128, 16)
    width = 128
    model = {"layers": layers, "width": width, "heads": 4}
    data = {"context": context, "batch_size": batch_size}
    trainer: dict[str, Any] = {"gradient_clip_val": 1.0}
    if quick:
        trainer["limit_val_batches"] = 20

    def make() -> Parts:
        return Parts(GPT(**model), PythonTopics(**data), dict(trainer))

    # A quarter of the width, and several projections in a short training.
    projected = f"rank={width // 4},update_proj_gap=50"
    return Workload(
        name=f"the built-in GPT: {layers} layers, width {width}, context {context}, on the Python documentation",
        make=make,
        facts={"model": model, "data": data, "trainer": trainer, "sources": sources(GPT, PythonTopics)},
        shared={**SCHEDULE, "weight_decay": 0.1},
        steps=1000,
        defaults={
            name: f"{name},{projected}" for name in ("galore_adamw", "galore_adamw_8bit_layerwise", "apollo_adamw")
        },
    )


def sources(*classes: type) -> dict[str, str]:
    """Returns a digest of the files that define these classes: a changed module is another module."""
    found = {}
    for kind in classes:
        file = inspect.getsourcefile(kind)
        if file is not None:
            found[f"{kind.__module__}.{kind.__qualname__}"] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    return found
