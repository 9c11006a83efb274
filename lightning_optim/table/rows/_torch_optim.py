"""Rows whose class is PyTorch's own (https://docs.pytorch.org/docs/stable/optim.html)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import MappingProxyType

from lightning_optim.errors import InvalidOption
from lightning_optim.table._options import NON_NEGATIVE, UNIT, Options, option
from lightning_optim.table._spec import Buffer, OptimizerSpec, StateLayout

_FOREACH_HELP = "batch the arithmetic over tensors; None lets torch choose"
_MAXIMIZE_HELP = "ascend instead of descend"
_CAPTURABLE_HELP = "keep counters on the device, for CUDA graphs"


@dataclass(frozen=True)
class AdamOptions(Options):
    """The options that every Adam has."""

    betas: tuple[float, float] = option((0.9, 0.999), "decay rates of the first and second moment", UNIT)
    eps: float = option(1e-8, "added to the denominator", NON_NEGATIVE)


@dataclass(frozen=True)
class FusedAdamWOptions(AdamOptions):
    """Options of ``torch.optim.AdamW(fused=True)``."""

    amsgrad: bool = option(False, "divide by the largest second moment seen")
    maximize: bool = option(False, _MAXIMIZE_HELP)
    capturable: bool = option(False, _CAPTURABLE_HELP)


@dataclass(frozen=True)
class AdamWOptions(FusedAdamWOptions):
    """Options of ``torch.optim.AdamW``."""

    foreach: bool | None = option(None, _FOREACH_HELP)


@dataclass(frozen=True)
class SGDOptions(Options):
    """Options of ``torch.optim.SGD``."""

    momentum: float = option(0.0, "decay rate of the velocity", NON_NEGATIVE)
    dampening: float = option(0.0, "part of the gradient kept out of the velocity")
    nesterov: bool = option(False, "Nesterov momentum")
    maximize: bool = option(False, _MAXIMIZE_HELP)
    foreach: bool | None = option(None, _FOREACH_HELP)

    def check(self) -> None:
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise InvalidOption("nesterov=True needs momentum > 0 and dampening = 0", code="LO208")


@dataclass(frozen=True)
class AdagradOptions(Options):
    """Options of ``torch.optim.Adagrad``."""

    lr_decay: float = option(0.0, "lr is divided by 1 + (step - 1) * lr_decay", NON_NEGATIVE)
    initial_accumulator_value: float = option(0.0, "start of the sum of squares", NON_NEGATIVE, scope="constructor")
    eps: float = option(1e-10, "added to the denominator", NON_NEGATIVE)
    maximize: bool = option(False, _MAXIMIZE_HELP)
    foreach: bool | None = option(None, _FOREACH_HELP)


@dataclass(frozen=True)
class RMSpropOptions(Options):
    """Options of ``torch.optim.RMSprop``."""

    alpha: float = option(0.99, "decay rate of the mean of squares", UNIT)
    eps: float = option(1e-8, "added to the denominator", NON_NEGATIVE)
    momentum: float = option(0.0, "decay rate of the velocity", NON_NEGATIVE)
    centered: bool = option(False, "normalize by the estimated variance")
    maximize: bool = option(False, _MAXIMIZE_HELP)
    capturable: bool = option(False, _CAPTURABLE_HELP)
    foreach: bool | None = option(None, _FOREACH_HELP)


ADAMW_SOURCE = "Decoupled Weight Decay Regularization, https://arxiv.org/abs/1711.05101; torch.optim.AdamW"
ADAMW_STATE = StateLayout(
    buffers=(Buffer("exp_avg"), Buffer("exp_avg_sq"), Buffer("max_exp_avg_sq", when=lambda o: o.amsgrad)),
    scalar_bytes=4,
)
#: Also of other packages' kernels for the same algorithm.
ADAMW_FORMAT = "torch.AdamW/1"

_ADAMW = OptimizerSpec(
    name="adamw_torch",
    target="torch.optim:AdamW",
    summary="AdamW",
    source=ADAMW_SOURCE,
    options=AdamWOptions,
    default_lr=1e-3,
    default_weight_decay=1e-2,
    state=ADAMW_STATE,
    state_format=ADAMW_FORMAT,
    complex=True,
    sharded=True,
)

ROWS = (
    dataclasses.replace(
        _ADAMW,
        name="adamw",
        summary="AdamW with the best kernel that the device has",
        options=FusedAdamWOptions,
        choices=("adamw_torch_xla", "adamw_torch_fused", "adamw_torch"),
    ),
    _ADAMW,
    dataclasses.replace(
        _ADAMW,
        name="adamw_torch_fused",
        summary="AdamW, one fused kernel per step",
        options=FusedAdamWOptions,
        fixed=MappingProxyType({"fused": True}),
        devices=frozenset({"cpu", "cuda", "mps", "npu", "xpu"}),
        complex=False,
        in_place=frozenset({"cpu", "cuda", "mps", "npu", "xpu"}),
        fallbacks=("adamw",),
    ),
    OptimizerSpec(
        name="sgd",
        target="torch.optim:SGD",
        summary="stochastic gradient descent, with momentum on request",
        source="torch.optim.SGD",
        options=SGDOptions,
        default_lr=1e-3,
        default_weight_decay=0.0,
        state=StateLayout(buffers=(Buffer("momentum_buffer", when=lambda o: o.momentum != 0),)),
        state_format="torch.SGD/1",
        sparse=True,
        complex=True,
        sharded=True,
        half_weights=True,
    ),
    OptimizerSpec(
        name="adagrad",
        target="torch.optim:Adagrad",
        summary="Adagrad, the choice for sparse data",
        source="Duchi, Hazan, Singer, https://jmlr.org/papers/v12/duchi11a.html; torch.optim.Adagrad",
        options=AdagradOptions,
        default_lr=1e-2,
        default_weight_decay=0.0,
        state=StateLayout(buffers=(Buffer("sum"),), scalar_bytes=4),
        state_format="torch.Adagrad/1",
        sparse=True,
        complex=True,
        sharded=True,
    ),
    OptimizerSpec(
        name="rmsprop",
        target="torch.optim:RMSprop",
        summary="RMSprop",
        source="Hinton, https://www.cs.toronto.edu/~hinton/coursera/lecture6/lec6.pdf; torch.optim.RMSprop",
        options=RMSpropOptions,
        default_lr=1e-2,
        default_weight_decay=0.0,
        state=StateLayout(
            buffers=(
                Buffer("square_avg"),
                Buffer("momentum_buffer", when=lambda o: o.momentum > 0),
                Buffer("grad_avg", when=lambda o: o.centered),
            ),
            scalar_bytes=4,
        ),
        state_format="torch.RMSprop/1",
        complex=True,
        sharded=True,
    ),
)
