"""Example code for an identifier."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import MISSING
from typing import Any

from lightning_optim.table import OptimizerSpec, OptionInfo, describe

# For a row without a default.
_LR = 1e-3

_PYTHON = """\
import lightning as L
import torch
from lightning_optim import OptimMixin

class LitModel(OptimMixin, L.LightningModule):
    def __init__(self, **optim):
        super().__init__(**optim)
        self.layer = torch.nn.Linear(64, 64)

model = LitModel(
{arguments}
)
optimizer = model.configure_optimizers()  # what L.Trainer.fit(model) calls"""


def example(name: str, spec: OptimizerSpec) -> dict[str, str]:
    """Returns code that builds ``name`` with its defaults; ``...`` stands for required options."""
    numbers = {"lr": _LR if spec.default_lr is None else spec.default_lr}
    if spec.decays:
        numbers["weight_decay"] = spec.default_weight_decay
    options = _shown_options(spec)

    arguments = [f'optim="{name}"', *(f"{key}={value!r}" for key, value in numbers.items())]
    words = ["python", "train.py", "fit", "--optim", name]
    for key, value in numbers.items():
        words += [f"--{key}", repr(value)]
    if options:
        pairs = ", ".join(f'"{key}": {"..." if value is ... else repr(value)}' for key, value in options.items())
        arguments.append(f"optim_args={{{pairs}}}")
    for key, value in options.items():
        # The command line reads YAML, a superset of JSON, where a word is a string without quotes.
        words += [f"--optim_args.{key}", _word(value)]
    python = _PYTHON.format(arguments="\n".join(f"    {argument}," for argument in arguments))
    return {"python": python, "command_line": shlex.join(words)}


def _word(value: Any) -> str:
    if value is ...:
        return "..."
    return value if isinstance(value, str) else json.dumps(value)


def _shown_options(spec: OptimizerSpec) -> dict[str, Any]:
    """Returns the required options; if there are none, the first whose default can be written as a literal."""
    infos = describe(spec.options)
    required: dict[str, Any] = {info.name: ... for info in infos if info.default is MISSING}
    return required or dict([(info.name, info.default) for info in infos if _is_telling(info)][:1])


def _is_telling(info: OptionInfo) -> bool:
    parts = info.default if isinstance(info.default, tuple) else (info.default,)
    return all(
        isinstance(part, (bool, int, str)) or (isinstance(part, float) and math.isfinite(part)) for part in parts
    )
