"""The AdamW update: GaLore and APOLLO take it in their subspaces and where they do not project, GrokAdamW everywhere.

Decoupled Weight Decay Regularization, https://arxiv.org/abs/1711.05101, as ``torch.optim.AdamW`` has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim._compat import kernels
from lightning_optim.errors import InvalidOption

# Where torch has the kernel that reads and writes everything once.
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
    """Takes one AdamW step in place, with torch's semantics: decoupled decay, epsilon beside the corrected denominator.

    Args:
        parameters: What to step; contiguous tensors of one dtype and device, as all other lists are.
        gradients: Their gradients.
        exp_avgs: First moments, changed in place.
        exp_avg_sqs: Second moments, changed in place.
        step: Number of this step; the first is 1.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.

    Raises:
        InvalidOption: If a moment is not of its parameter's shape; torch's kernel would write beyond it.
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
    """Raises :class:`InvalidOption` for a moment that cannot be of this gradient."""
    if gradient.shape != moment.shape:
        raise InvalidOption(
            f"the optimizer keeps moments of shape {tuple(moment.shape)} for gradients of shape "
            f"{tuple(gradient.shape)}: rank or proj_type was changed after the first step, or the state is another "
            "model's. Start with a new optimizer."
        )
