"""Rules for what torch's fused kernels step; they are checked before the first batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, AdamW, Optimizer

from lightning_optim._compat.torch import has_fused_kernel, sgd_is_wrong_on_half
from lightning_optim.errors import listing
from lightning_optim.stepping import HALF, fused_class, is_packed

# By the identifiers under which they are offered.
_CLASSES: Mapping[str, type[Optimizer]] = {"adamw": AdamW, "sgd": SGD, "adagrad": Adagrad}


@dataclass(frozen=True)
class Fusing:
    """An optimizer that a strategy would step by a fused kernel.

    Attributes:
        strategy: The flag of the strategy.
        optimizer: The optimizer as it was built.
        asked: The identifier it was built by, or ``None`` for the module's own.
        names: Names of the module's parameters.
        scales_loss: Whether a GradScaler is used.
        sparse: Name of a parameter whose gradient is sparse, or empty.
        in_backward: Whether it is stepped during backward.
    """

    strategy: str
    optimizer: Optimizer
    asked: str | None
    names: Mapping[Tensor, str]
    scales_loss: bool = False
    sparse: str = ""
    in_backward: bool = False

    @property
    def combination(self) -> str:
        """What was passed."""
        own = f"the module's {type(self.optimizer).__name__}"
        return f"strategy={self.strategy!r} with {own if self.asked is None else f'optim={self.asked!r}'}"

    @property
    def plainly(self) -> str:
        """What to type to do without fused kernels."""
        if any(parameter.device.type == "npu" for parameter in self.parameters):
            return "Trainer(strategy='npu')"
        return "Trainer(strategy='ddp')" if self.strategy == "fused_ddp" else "a Trainer without strategy"

    @property
    def parameters(self) -> Iterator[Tensor]:
        """The parameters it steps."""
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def name(self, parameter: Tensor) -> str:
        """Returns the name of a parameter, or its shape if it does not belong to the module."""
        return repr(self.names[parameter]) if parameter in self.names else f"a parameter of shape {parameter.shape}"


def _kernel_exists(fusing: Fusing) -> str | None:
    torch_class = fused_class(fusing.optimizer)
    devices = {parameter.device for parameter in fusing.parameters}
    lacking = [device for device in devices if torch_class is None or not has_fused_kernel(torch_class, device)]
    if not lacking:
        return None
    offered = [name for name, other in _CLASSES.items() if all(has_fused_kernel(other, device) for device in devices)]
    instead = f"Use one of optim={listing(offered)}, or {fusing.plainly}" if offered else f"Use {fusing.plainly}"
    return (
        f"{fusing.combination}: torch has no fused kernel of {type(fusing.optimizer).__name__} for "
        f"{lacking[0].type}. {instead}."
    )


def _not_stepped_in_backward(fusing: Fusing) -> str | None:
    if not fusing.in_backward:
        return None
    asked = fusing.asked or ""
    base = asked.removesuffix("_layerwise")
    plainly = fusing.plainly if base == asked else f"optim={base!r}, or {fusing.plainly}"
    return (
        f"{fusing.combination}, which is stepped during backward, bucket by bucket: it does not go through one fused "
        f"step. Use {plainly}; there optim='adamw_torch_fused_layerwise' steps the buckets by the fused kernel."
    )


def _flags_agree(fusing: Fusing) -> str | None:
    flags = {key for key in ("foreach", "differentiable") for g in fusing.optimizer.param_groups if g.get(key)}
    if not flags or fused_class(fusing.optimizer) is None:
        return None
    return f"{fusing.combination} and {min(flags)}=True, another way to step. Leave it out, or use {fusing.plainly}."


def _gradients_are_dense(fusing: Fusing) -> str | None:
    if not fusing.sparse:
        return None
    return (
        f"{fusing.combination}: fused kernels cannot step sparse gradients, and {fusing.sparse!r} belongs to an "
        f"embedding with sparse=True. Create it with sparse=False, or use {fusing.plainly}."
    )


def _parameters_are_real(fusing: Fusing) -> str | None:
    unfit = next((parameter for parameter in fusing.parameters if not parameter.is_floating_point()), None)
    if unfit is None:
        return None
    return (
        f"{fusing.combination}: fused kernels step real floating-point parameters, and {fusing.name(unfit)} is "
        f"{unfit.dtype}. Store real and imaginary parts (torch.view_as_real), or use {fusing.plainly}."
    )


def _parameters_are_packed(fusing: Fusing) -> str | None:
    unfit = next((parameter for parameter in fusing.parameters if not is_packed(parameter)), None)
    if unfit is None:
        return None
    return (
        f"{fusing.combination}: fused kernels step blocks of memory, and {fusing.name(unfit)} is a view with gaps or "
        f"overlaps. Create it with nn.Parameter(tensor.contiguous()), or use {fusing.plainly}."
    )


def _sgd_on_cpu_is_not_half(fusing: Fusing) -> str | None:
    half = next((p for p in fusing.parameters if p.dtype in HALF and p.device.type == "cpu"), None)
    if half is None or not isinstance(fusing.optimizer, SGD) or not sgd_is_wrong_on_half():
        return None
    wrong = half_sgd(fusing.name(half), half)
    return f"{fusing.combination}: {wrong} Use precision='bf16-mixed', or {fusing.plainly}."


def half_sgd(name: str, parameter: Tensor) -> str:
    """Describes what is wrong with torch's fused SGD for a half-precision parameter on a CPU."""
    return (
        f"the fused SGD of torch {torch.__version__} leaves half-precision parameters on a CPU unchanged, except for a "
        f"few elements, and {name} is {parameter.dtype} (https://github.com/pytorch/pytorch/issues/191763)."
    )


def _velocity_starts_at_zero(fusing: Fusing) -> str | None:
    dampened = any(group.get("dampening") and group.get("momentum") for group in fusing.optimizer.param_groups)
    if not (fusing.scales_loss and isinstance(fusing.optimizer, SGD) and dampened):
        return None
    return (
        f"{fusing.combination}, dampening and float16 loss scaling: a first step that overflows would leave the "
        f"velocity unwritten, and it cannot start at zero with dampening. Use dampening=0, precision='bf16-mixed', "
        f"or {fusing.plainly}."
    )


#: By code: see lightning_optim/refusals.
FUSED_RULES: Mapping[str, Callable[[Fusing], str | None]] = {
    "LO701": _kernel_exists,
    "LO702": _not_stepped_in_backward,
    "LO703": _flags_agree,
    "LO704": _gradients_are_dense,
    "LO705": _parameters_are_real,
    "LO706": _parameters_are_packed,
    "LO707": _sgd_on_cpu_is_not_half,
    "LO708": _velocity_starts_at_zero,
}
