"""AnyPrecisionAdamW: AdamW with configurable state dtypes and Kahan summation for low-precision parameters.

The algorithm of torchdistx (https://github.com/pytorch/torchdistx); Kahan summation of bfloat16 weights: Revisiting
BFloat16 Training, https://arxiv.org/abs/2010.06192.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_optim._compat import kernels
from lightning_optim.errors import InvalidOption, listing
from lightning_optim.optimizers._base import OwnOptimizer, hyperparameters
from lightning_optim.stepping import as_group

#: The dtypes that a state may have.
StateDtype = Literal["float32", "bfloat16", "float16", "float64"]

_DTYPES = ("momentum_dtype", "variance_dtype", "compensation_buffer_dtype")


class AnyPrecisionAdamW(OwnOptimizer):
    """AdamW that updates parameters in their own dtype and keeps each state in a dtype of your choice.

    Every in-place operation rounds to the dtype of its target. In bfloat16 this loses updates smaller than half a unit
    in the last place of a weight; Kahan summation keeps what was lost in a compensation buffer and adds it in a later
    step. Weight decay is not compensated.

    Dtypes are given as ``"bfloat16"``, ``"torch.bfloat16"`` or ``torch.bfloat16`` and may differ between param groups,
    which store them as plain strings.

    Args:
        params: Parameters or param groups, real and dense.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator, in the dtype of the second moment.
        weight_decay: Decoupled weight decay.
        use_kahan_summation: Whether to compensate the rounding of parameter updates.
        momentum_dtype: Dtype of the first moment.
        variance_dtype: Dtype of the second moment; torchdistx's own default is bfloat16, Hugging Face's float32.
        compensation_buffer_dtype: Dtype of the compensation buffer.

    Raises:
        InvalidOption: If a dtype is not one of float32, bfloat16, float16 and float64.
        InvalidParamGroups: If a parameter is complex or its gradient sparse.
    """

    sharded: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        use_kahan_summation: bool = False,
        momentum_dtype: str | torch.dtype = "float32",
        variance_dtype: str | torch.dtype = "float32",
        compensation_buffer_dtype: str | torch.dtype = "bfloat16",
    ) -> None:
        super().__init__(params, _with_dtype_names(hyperparameters(locals())))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(_with_dtype_names(as_group(param_group)))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_epsilon(group["eps"], group["variance_dtype"])

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = {"exp_avg": group["momentum_dtype"], "exp_avg_sq": group["variance_dtype"]}
        if group["use_kahan_summation"]:
            state["compensation"] = group["compensation_buffer_dtype"]
        return {name: torch.zeros_like(parameter, dtype=getattr(torch, dtype)) for name, dtype in state.items()}

    def _loaded_dtype(self, tensor: Tensor, parameter: Tensor) -> torch.dtype:
        return tensor.dtype  # as configured

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        anyprecision_update(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["compensation"] for state in states] if group["use_kahan_summation"] else None,
            step=step,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )


def anyprecision_update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    compensations: list[Tensor] | None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Takes one AnyPrecisionAdamW step in place; each list has its own dtype, and the first ``step`` is 1.

    ``compensations`` hold what rounding has taken from the parameters so far; ``None`` means no Kahan summation.
    """
    beta1, beta2 = betas
    if weight_decay:
        _scale_(parameters, 1 - lr * weight_decay)
    # Separate products and sums, as in torchdistx: a lerp rounds once and gives different bits in bfloat16.
    _scale_(exp_avgs, beta1)
    kernels.foreach_add_(exp_avgs, gradients, alpha=1 - beta1)
    _scale_(exp_avg_sqs, beta2)
    kernels.foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - beta2)

    denominators = kernels.foreach_sqrt(exp_avg_sqs)
    kernels.foreach_div_(denominators, math.sqrt(1 - beta2**step))
    kernels.foreach_add_(denominators, eps)
    step_size = lr / (1 - beta1**step)
    if compensations is None:
        kernels.foreach_addcdiv_(parameters, exp_avgs, denominators, -step_size)
        return
    kernels.foreach_addcdiv_(compensations, exp_avgs, denominators, -step_size)
    arrived = kernels.foreach_neg(parameters)
    kernels.foreach_add_(parameters, compensations)
    kernels.foreach_add_(arrived, parameters)
    kernels.foreach_sub_(compensations, arrived)


def check_epsilon(eps: float, variance_dtype: str) -> None:
    """Raises :class:`InvalidOption` for an epsilon that the second moment's dtype rounds to 0: zero by zero is NaN."""
    float16 = torch.finfo(torch.float16)
    smallest = float16.smallest_normal * float16.eps
    if variance_dtype == "float16" and eps < smallest:
        raise InvalidOption(
            f"eps={eps:g} rounds to 0 with variance_dtype='float16', and parameters would become NaN; set "
            f"eps={smallest:.0e} or larger, or variance_dtype='bfloat16'",
            code="LO215",
        )


def _scale_(tensors: list[Tensor], factor: float) -> None:
    # On CPU, _foreach_mul_ rounds a Python number to the tensors' dtype first, where 0.999 may become 1.
    dtype, device = torch.promote_types(tensors[0].dtype, torch.float32), tensors[0].device
    kernels.foreach_mul_(tensors, torch.full((), factor, dtype=dtype, device=device))


def _with_dtype_names(group: dict[str, Any]) -> dict[str, Any]:
    return {name: _dtype_name(name, value) if name in _DTYPES else value for name, value in group.items()}


def _dtype_name(option: str, value: Any) -> str:
    name = str(value).removeprefix("torch.")
    if name not in get_args(StateDtype):
        raise InvalidOption(
            f"{option}={value!r} is not a state dtype; allowed: {listing(get_args(StateDtype))}", code="LO207"
        )
    return name
