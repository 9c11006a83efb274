"""Rules that need the model and, where there is one, the Trainer; they are checked before the first batch."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from lightning_optim._compat.torch import capturable_devices, is_flattened, sgd_is_wrong_on_half
from lightning_optim.build._curves import MODULE_SCHEDULE, follows_the_step
from lightning_optim.build.rules._fused import half_sgd
from lightning_optim.build.rules._request import Request
from lightning_optim.groups import NamedParameter, device_types
from lightning_optim.stepping import HALF, is_packed, is_sharded
from lightning_optim.table import OptimizerSpec


@dataclass(frozen=True)
class TrainerFacts:
    """What the rules need to know about a Trainer.

    Attributes:
        forgetful: Class name of a finder that would make Lightning forget the checkpoint it resumes, or empty.
        averaging: Class name of a callback that replaces the weights by its own average, or empty.
        scales: Whether a ``GradScaler`` is used.
        accumulates: Batches per step, the most of them.
        processes: How many train together.
        makes_graphs: Whether ``LightningModule.backward`` can be called with ``create_graph=True``.
        steps_in_backward: Whether the strategy makes every optimizer layerwise.
        logs: Whether ``self.log`` is heard.
    """

    forgetful: str = ""
    averaging: str = ""
    scales: bool = False
    accumulates: int = 1
    processes: int = 1
    makes_graphs: bool = True
    steps_in_backward: bool = False
    logs: bool = True


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

    @property
    def devices(self) -> set[str]:
        """The device types that the parameters are on."""
        return device_types(self.parameters)

    @property
    def is_fused(self) -> bool:
        """Whether the optimizer is built with one of torch's fused kernels."""
        return bool(self.spec.fixed.get("fused") or getattr(self.request.options, "fused", False))


def _device(run: Run) -> str | None:
    unfit = sorted(run.devices - run.spec.devices) if run.spec.devices is not None else []
    if not unfit:
        return None
    return (
        f"optim={run.name!r} runs on {', '.join(sorted(run.spec.devices or ()))}, but parameters are on "
        f"{', '.join(unfit)}. Use optim='adamw', which takes the best that the device has, or "
        "Trainer(accelerator=...) with a device it runs on."
    )


def _paging(run: Run) -> str | None:
    if not run.request.config.optim_fallback or run.spec.paged_on is None or run.devices <= run.spec.paged_on:
        # Without a fallback they train unpaged where they cannot be paged, with a warning.
        return None
    return f"optim={run.name!r} pages its states on {', '.join(sorted(run.spec.paged_on))} only."


def _xla(run: Run) -> str | None:
    if not (run.spec.xla and "xla" in run.devices):
        return None
    return f"optim={run.name!r} cannot run on XLA devices: {run.spec.xla}. Use optim='adamw' or 'adamw_torch_xla'."


def _capturable(run: Run) -> str | None:
    unfit = sorted(run.devices - set(capturable_devices()))
    settings = [run.request.options.select("group"), *run.groups]
    if run.is_fused or not (unfit and any(setting.get("capturable") for setting in settings)):
        return None
    return (
        f"optim={run.name!r} with capturable=True, which is for CUDA graphs, and parameters are on "
        f"{', '.join(unfit)}. Leave it out."
    )


def _compiler(run: Run) -> str | None:
    if not (run.spec.compiles and "cpu" in run.devices) or shutil.which(cpp_compiler()):
        return None
    return (
        f"optim={run.name!r} compiles its step, which on a CPU needs a C++ compiler, and {cpp_compiler()!r} is "
        "not on the PATH. Install it (apt-get install g++) or set CXX; optim='adamw_bnb_8bit' needs none."
    )


def cpp_compiler() -> str:
    """Returns the C++ compiler command that torch.compile uses on a CPU."""
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
            f"weight_decay together with the sparse gradients of {name!r}: torch cannot decay them. Add "
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
    return sharded_parameters(run.name, run.spec, run.parameters)


def sharded_parameters(name: str, spec: OptimizerSpec, parameters: Sequence[NamedParameter]) -> str | None:
    """Returns why an identifier cannot step these parameters, if they are sharded and it cannot step shards."""
    found = [parameter for parameter in parameters if is_sharded(parameter.parameter)]
    if not found or spec.sharded:
        return None
    ddp = "layerwise_ddp" if spec.layerwise else "ddp"
    return (
        f"optim={name!r} cannot step sharded parameters (DTensor), and {found[0].name!r} is one: {spec.unsharded}. Use "
        f"optim='adamw_torch' or 'adafactor', or Trainer(strategy={ddp!r})."
    )


def _flattened_parameters(run: Run) -> str | None:
    if not any(is_flattened(parameter.parameter) for parameter in run.parameters):
        return None
    return (
        "Trainer(strategy='fsdp') flattens the parameters, so that biases and norms cannot be told from weights and "
        "weight decay would reach none or all. Use Trainer(strategy='fsdp2')."
    )


def _fused_sgd_on_cpu_is_not_half(run: Run) -> str | None:
    if not run.is_fused or not issubclass(run.spec.load(), SGD):
        return None
    half = [p for p in run.parameters if p.parameter.dtype in HALF and p.parameter.device.type == "cpu"]
    if not half or not sgd_is_wrong_on_half():
        return None
    wrong = half_sgd(repr(half[0].name), half[0].parameter)
    return f"optim={run.name!r} with fused=True: {wrong} Leave fused out, or use optim='sgd'."


def _fused_parameters_are_packed(run: Run) -> str | None:
    if not run.is_fused:
        return None
    unfit = [p for p in run.parameters if not (is_sharded(p.parameter) or is_packed(p.parameter))]
    if not unfit:
        return None
    return (
        f"optim={run.name!r}: fused kernels step blocks of memory, and {unfit[0].name!r} is a view with gaps or "
        "overlaps. Create it with nn.Parameter(tensor.contiguous()), or use optim='adamw_torch'."
    )


def _two_averages(run: Run) -> str | None:
    rival = run.trainer.averaging if run.trainer else ""
    if not (run.spec.averages_weights and rival):
        return None
    return (
        f"the callback {rival} together with optim={run.name!r}: both exchange the weights around validation and "
        "saving. Remove the callback (schedule-free weights are averages already), or use optim='adamw_torch'."
    )


def _finder_with_resume(run: Run) -> str | None:
    finder = run.trainer.forgetful if run.trainer else ""
    if not finder:
        return None
    return (
        f"the callback {finder} together with fit(ckpt_path=...): when it has run, Lightning has forgotten the "
        "checkpoint, and optimizer, schedule and progress would start anew. Remove the callback for the resumed run: "
        "the checkpoint holds the learning rate; the batch size is an argument of the module or datamodule."
    )


def _plateau_hears_its_metric(run: Run) -> str | None:
    name = run.request.config.lr_scheduler
    watches = name is not None and name != MODULE_SCHEDULE.name and not follows_the_step(name)
    if not watches or run.trainer is None or run.trainer.logs:
        return None
    return (
        f"lr_scheduler={name!r} with Trainer(barebones=True), in which self.log does nothing: there is no metric to "
        "watch. Leave barebones out, or use another schedule, such as 'linear'."
    )


#: By code: see lightning_optim/refusals.
RUN_RULES: Mapping[str, Callable[[Run], str | None]] = {
    "LO501": _device,
    "LO502": _paging,
    "LO503": _xla,
    "LO504": _capturable,
    "LO505": _compiler,
    "LO506": _sparse_gradients,
    "LO507": _complex_parameters,
    "LO508": _half_weights,
    "LO509": _sharded_parameters,
    "LO510": _flattened_parameters,
    "LO511": _fused_sgd_on_cpu_is_not_half,
    "LO512": _fused_parameters_are_packed,
    "LO513": _two_averages,
    "LO514": _finder_with_resume,
    "LO515": _plateau_hears_its_metric,
}
