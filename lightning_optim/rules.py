"""What cannot work together, in one table: each rule says what was passed, why it fails and what to type instead.

Two tables: :data:`CONFIG_RULES` need only the request and hold when it is written down, :data:`RUN_RULES` need the
model and, where there is one, the Trainer, and hold before the first batch.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_optim.errors import IncompatibleTrainer
from lightning_optim.param_groups import NamedParameter
from lightning_optim.schedules import get_schedule
from lightning_optim.spec import OptimizerSpec

if TYPE_CHECKING:
    from lightning_optim.config import OptimConfig


@dataclass(frozen=True)
class Request:
    """An identifier's row and what the user asked of it."""

    spec: OptimizerSpec
    config: OptimConfig

    @property
    def name(self) -> str:
        """The identifier as the user typed it, which may be an alias."""
        return self.config.optim


@dataclass(frozen=True)
class TrainerFacts:
    """What the rules need to know of a Trainer.

    Attributes:
        precision: The precision flag, such as ``"16-mixed"``.
        scales_loss: Whether a GradScaler is at work.
        clips: Whether ``gradient_clip_val`` is set.
        accumulation_changes: Whether the number of steps is that of epochs with different accumulation.
        callbacks: Class names of the callbacks and of their base classes.
    """

    precision: str = "32-true"
    scales_loss: bool = False
    clips: bool = False
    accumulation_changes: bool = False
    callbacks: frozenset[str] = frozenset()


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


def _no_schedule_for_averages(request: Request) -> str | None:
    name = request.config.lr_scheduler
    if not request.spec.averages_weights or name in (None, "constant"):
        return None
    return (
        f"lr_scheduler={name!r} beside optim={request.name!r}, which averages its iterates instead of following a "
        "schedule. Leave lr_scheduler out"
        + ("; warmup_steps is handed to the optimizer itself." if request.spec.warmup == "optimizer" else ".")
    )


def _warmup_has_an_effect(request: Request) -> str | None:
    config, spec = request.config, request.spec
    if not config.warmup_steps:
        return None
    if spec.warmup == "none":
        return (
            f"warmup_steps={config.warmup_steps} beside optim={request.name!r}, which needs no warm-up. Leave it out."
        )
    if spec.warmup == "schedule" and config.lr_scheduler is None:
        return (
            f"warmup_steps={config.warmup_steps} without lr_scheduler would be ignored. Add "
            "lr_scheduler='constant_with_warmup', 'linear' or 'cosine'."
        )
    return None


def _plateau_and_constant_do_not_warm_up(request: Request) -> str | None:
    config = request.config
    if request.spec.warmup != "schedule" or not config.warmup_steps or config.lr_scheduler is None:
        return None
    if get_schedule(config.lr_scheduler).warms_up:
        return None
    return (
        f"warmup_steps={config.warmup_steps} beside lr_scheduler={config.lr_scheduler!r}, which has no warm-up. "
        "Use lr_scheduler='constant_with_warmup'."
    )


def _schedule_args_need_a_schedule(request: Request) -> str | None:
    if request.config.lr_scheduler_args and request.config.lr_scheduler is None:
        return "lr_scheduler_args without lr_scheduler would be ignored. Add lr_scheduler, for instance 'cosine'."
    return None


def _layer_pattern_needs_layer_decay(request: Request) -> str | None:
    if request.config.layer_pattern is not None and request.config.layer_decay is None:
        return "layer_pattern without layer_decay would be ignored. Add layer_decay, for instance 0.75."
    return None


def _lr_is_known(request: Request) -> str | None:
    if request.config.lr is None and request.spec.default_lr is None:
        return f"optim={request.name!r} has no default learning rate. Give lr, for instance lr=1e-3."
    return None


def _weight_decay_exists(request: Request) -> str | None:
    if request.config.weight_decay and not request.spec.decays:
        return (
            f"weight_decay={request.config.weight_decay} beside optim={request.name!r}, which has none. Leave it out."
        )
    return None


def _averages_need_a_learning_rate(request: Request) -> str | None:
    if request.spec.averages_weights and request.config.lr == 0:
        return f"lr=0 beside optim={request.name!r}: the average is weighted by the learning rate. Use lr > 0."
    return None


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
    # By name: importing DTensor costs, and a DTensor cannot exist before torch.distributed.tensor is imported.
    found = [parameter for parameter in run.parameters if type(parameter.parameter.data).__name__ == "DTensor"]
    if not found or run.spec.sharded:
        return None
    return (
        f"optim={run.name!r} cannot step sharded parameters (DTensor), and {found[0].name!r} is one. Use "
        "optim='adamw_torch' or 'adamw_torch_8bit', or Trainer(strategy='ddp')."
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
    return (
        f"optim={run.name!r} with precision={run.trainer.precision!r} and gradient_clip_val: a fused optimizer "
        "unscales the gradients itself, after Lightning would clip them. Use optim='adamw_torch', or "
        "precision='bf16-mixed', or leave gradient_clip_val out."
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


CONFIG_RULES: tuple[Callable[[Request], str | None], ...] = (
    _no_schedule_for_averages,
    _warmup_has_an_effect,
    _plateau_and_constant_do_not_warm_up,
    _schedule_args_need_a_schedule,
    _layer_pattern_needs_layer_decay,
    _lr_is_known,
    _weight_decay_exists,
    _averages_need_a_learning_rate,
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


def check_config(request: Request) -> None:
    """Raises :class:`IncompatibleTrainer` with every rule of :data:`CONFIG_RULES` that the request breaks."""
    _raise([rule(request) for rule in CONFIG_RULES])


def check_run(run: Run) -> None:
    """Raises :class:`IncompatibleTrainer` with every rule of :data:`RUN_RULES` that the run breaks."""
    _raise([rule(run) for rule in RUN_RULES])


def _raise(problems: list[str | None]) -> None:
    found = [problem for problem in problems if problem]
    if found:
        raise IncompatibleTrainer("\n".join(found))
