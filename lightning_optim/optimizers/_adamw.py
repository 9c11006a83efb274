"""The AdamW update, shared by GaLore and APOLLO (inside and outside of their subspaces) and GrokAdamW.

Decoupled Weight Decay Regularization, https://arxiv.org/abs/1711.05101, as in ``torch.optim.AdamW``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim._compat import kernels
from lightning_optim.errors import InvalidOption

# Devices with torch's fused kernel, which reads and writes everything once.
_FUSED = frozenset({"cpu", "cuda", "mps", "xpu"})


def adamw_update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Takes one AdamW step in place, as torch does: decoupled decay, epsilon added to the bias-corrected denominator.

    All tensors are contiguous and share one dtype and device; parameters and moments change in place. The first
    ``step`` is 1.

    Raises:
        InvalidOption: If a moment does not have its parameter's shape; torch's kernel would write out of bounds.
    """
    if not parameters:
        return
    for parameter, moment in zip(parameters, exp_avgs, strict=True):
        check_moment(parameter, moment)
    beta1, beta2 = betas
    device = parameters[0].device
    if device.type in _FUSED:
        count = torch.full((), float(step), dtype=torch.float32, device=device)
        kernels.fused_adamw_(
            list(parameters),
            list(gradients),
            list(exp_avgs),
            list(exp_avg_sqs),
            [],
            [count] * len(parameters),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        return
    if weight_decay:
        kernels.foreach_mul_(list(parameters), 1 - lr * weight_decay)
    kernels.foreach_lerp_(list(exp_avgs), list(gradients), 1 - beta1)
    kernels.foreach_mul_(list(exp_avg_sqs), beta2)
    kernels.foreach_addcmul_(list(exp_avg_sqs), list(gradients), list(gradients), 1 - beta2)
    denominators = kernels.foreach_sqrt(list(exp_avg_sqs))
    kernels.foreach_div_(denominators, math.sqrt(1 - beta2**step))
    kernels.foreach_add_(denominators, eps)
    kernels.foreach_addcdiv_(list(parameters), list(exp_avgs), denominators, -lr / (1 - beta1**step))


def check_moment(gradient: Tensor, moment: Tensor) -> None:
    """Raises :class:`InvalidOption` if a moment does not have its gradient's shape."""
    if gradient.shape != moment.shape:
        raise InvalidOption(
            f"the optimizer keeps moments of shape {tuple(moment.shape)} for gradients of shape "
            f"{tuple(gradient.shape)}: rank or proj_type was changed after the first step, or the state is another "
            "model's. Start with a new optimizer.",
            code="LO808",
        )
