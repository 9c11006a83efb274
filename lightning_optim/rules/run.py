"""Rules that need the model and, where there is one, the Trainer; they hold before the first batch."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_optim.parameters import NamedParameter, is_sharded
from lightning_optim.rules.request import Request
from lightning_optim.schedules import get_schedule
from lightning_optim.spec import OptimizerSpec


@dataclass(frozen=True)
class TrainerFacts:
    """What the rules need to know of a Trainer.

    Attributes:
        precision: The precision flag, such as ``"16-mixed"``.
        scales_loss: Whether a GradScaler is at work.
        clips: Whether ``gradient_clip_val`` is set.
        accumulation_changes: Whether the number of steps is that of epochs with different accumulation.
        callbacks: Class names of the callbacks and of their base classes.
        steps_in_backward: Whether the strategy makes every optimizer layerwise.
    """

    precision: str = "32-true"
    scales_loss: bool = False
    clips: bool = False
    accumulation_changes: bool = False
    callbacks: frozenset[str] = frozenset()
    steps_in_backward: bool = False


@dataclass(frozen=True)
class Run:
    """A request with the model's parameters, their groups and the Trainer, if there is one."""

    request: Request
    parameters: list[NamedParameter]
    groups: list[dict[str, Any]]
    trainer: TrainerFacts | None = None

    @property
    def spec(self) -> OptimizerSpec:
        """The row."""
        return self.request.spec

    @property
    def name(self) -> str:
        """The identifier as the user typed it."""
        return self.request.name


def _device(run: Run) -> str | None:
    devices = {parameter.parameter.device.type for parameter in run.parameters}
    unfit = sorted(devices - run.spec.devices) if run.spec.devices is not None else []
    if not unfit:
        return None
    return (
        f"optim={run.name!r} runs on {', '.join(sorted(run.spec.devices or ()))}, but parameters are on "
        f"{', '.join(unfit)}. Use optim='adamw_torch', or Trainer(accelerator=...) with a device it runs on."
    )


def _compiler(run: Run) -> str | None:
    on_cpu = any(parameter.parameter.device.type == "cpu" for parameter in run.parameters)
    if not (run.spec.compiles and on_cpu) or shutil.which(cpp_compiler()):
        return None
    return (
        f"optim={run.name!r} compiles its step, which on a CPU needs a C++ compiler, and {cpp_compiler()!r} is "
        "not on the PATH. Install it (apt-get install g++) or set CXX; optim='adamw_bnb_8bit' needs none."
    )


def cpp_compiler() -> str:
    """Returns the command that torch.compile takes for C++ on a CPU."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def _sparse_gradients(run: Run) -> str | None:
    sparse = [
        parameter
        for parameter in run.parameters
        if any(isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) and owner.sparse for owner in parameter.owners)
    ]
    if not sparse:
        return None
    name = sparse[0].name
    if not run.spec.sparse:
        return (
            f"optim={run.name!r} cannot step sparse gradients, and {name!r} belongs to an embedding with "
            "sparse=True. Use optim='adagrad' or 'sgd', or create the embedding with sparse=False."
        )
    decayed = [group for group in run.groups if group.get("weight_decay")]
    if any(sparse_p.parameter is p for sparse_p in sparse for group in decayed for p in group["params"]):
        return (
            f"weight_decay beside the sparse gradients of {name!r}: torch cannot decay them. Add "
            f"param_groups={{{name!r}: {{'weight_decay': 0.0}}}}, or create the embedding with sparse=False."
        )
    return None


def _complex_parameters(run: Run) -> str | None:
    found = [parameter for parameter in run.parameters if torch.is_complex(parameter.parameter)]
    if not found or run.spec.complex:
        return None
    return (
        f"optim={run.name!r} cannot step complex parameters, and {found[0].name!r} is "
        f"{found[0].parameter.dtype}. Use optim='adamw_torch', or store real and imaginary parts (torch.view_as_real)."
    )


def _half_weights(run: Run) -> str | None:
    found = [parameter for parameter in run.parameters if parameter.parameter.dtype is torch.float16]
    if not found or run.spec.half_weights:
        return None
    return (
        f"optim={run.name!r} computes in the parameters' dtype, and {found[0].name!r} is float16, in which its "
        "eps is zero: the first zero gradient would make it NaN. Use Trainer(precision='16-mixed') or 'bf16-true', or "
        "an optimizer with float32 arithmetic such as 'adamw_bnb_8bit'."
    )


def _sharded_parameters(run: Run) -> str | None:
    found = [parameter for parameter in run.parameters if is_sharded(parameter.parameter)]
    if not found or run.spec.sharded:
        return None
    ddp = "layerwise_ddp" if run.spec.layerwise else "ddp"
    return (
        f"optim={run.name!r} cannot step sharded parameters (DTensor), and {found[0].name!r} is one. Use "
        f"optim='adamw_torch' or 'adamw_torch_8bit', or Trainer(strategy={ddp!r})."
    )


def _flattened_parameters(run: Run) -> str | None:
    if not any(hasattr(parameter.parameter, "_fsdp_flattened") for parameter in run.parameters):
        return None
    return (
        "Trainer(strategy='fsdp') flattens the parameters, so that biases and norms cannot be told from weights and "
        "weight decay would reach none or all. Use lightning.pytorch.strategies.ModelParallelStrategy (FSDP2)."
    )


def _fused_scaler_and_clipping(run: Run) -> str | None:
    if not (run.trainer and run.spec.fixed.get("fused") and run.trainer.scales_loss and run.trainer.clips):
        return None
    if run.spec.layerwise or run.trainer.steps_in_backward:
        # The engine unscales and clips each bucket before the kernel sees it.
        return None
    return (
        f"optim={run.name!r} with precision={run.trainer.precision!r} and gradient_clip_val: a fused optimizer "
        "unscales the gradients itself, after Lightning would clip them. Use optim='adamw_torch', or "
        f"optim='{run.name}_layerwise', or precision='bf16-mixed', or leave gradient_clip_val out."
    )


def _two_averages(run: Run) -> str | None:
    rivals = {"WeightAveraging", "StochasticWeightAveraging"} & (run.trainer.callbacks if run.trainer else frozenset())
    if not (run.spec.averages_weights and rivals):
        return None
    return (
        f"the callback {min(rivals)} beside optim={run.name!r}: both exchange the weights around validation and "
        "saving. Remove the callback (schedule-free weights are averages already), or use optim='adamw_torch'."
    )


def _length_is_counted_wrongly(run: Run) -> str | None:
    name = run.request.config.lr_scheduler
    if not (run.trainer and run.trainer.accumulation_changes and name and get_schedule(name).needs_total):
        return None
    return (
        f"lr_scheduler={name!r} beside GradientAccumulationScheduler: Lightning counts the steps of the training as if "
        "the first epoch's accumulation lasted. Set Trainer(max_steps=...), or use lr_scheduler='constant_with_warmup'."
    )


RUN_RULES: tuple[Callable[[Run], str | None], ...] = (
    _device,
    _compiler,
    _sparse_gradients,
    _complex_parameters,
    _half_weights,
    _sharded_parameters,
    _flattened_parameters,
    _fused_scaler_and_clipping,
    _two_averages,
    _length_is_counted_wrongly,
)
