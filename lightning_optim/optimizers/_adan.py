"""Adan: Adam with Nesterov momentum, estimated from the differences of successive gradients.

Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models, https://arxiv.org/abs/2208.06677.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from lightning_optim._compat import kernels
from lightning_optim.optimizers._base import (
    OwnOptimizer,
    gradients,
    hyperparameters,
    to_compute_dtype,
    write_back,
    zeros_for,
)

# The second moment is not the gradient's, and so has another name than Adam's.
_STATE = ("exp_avg", "exp_avg_diff", "exp_avg_ahead_sq", "previous_gradient")


class Adan(OwnOptimizer):
    """Adan: averages of the gradients, of their differences, and of the squares of both together.

    It keeps the previous gradient, as it was after clipping, besides three moments. A parameter without a gradient
    skips the step; its next difference is to the last gradient that it had.

    Without the paper's restarts, which its authors' code leaves out, too. Decay rates say how much is kept, as theirs
    and Adam's do: the paper's are one minus these.

    Args:
        params: Parameters or param groups, real and dense.
        lr: Learning rate.
        betas: Decay rates of the gradients' average, of their differences' average, and of the second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        no_prox: Decay before the update, as AdamW does, instead of dividing by ``1 + lr * weight_decay`` after it.

    Raises:
        InvalidParamGroups: If a parameter is complex or its gradient sparse.
    """

    sharded: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_prox: bool = False,
    ) -> None:
        super().__init__(params, hyperparameters(locals()))

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {name: zeros_for(parameter) for name in _STATE}

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        exp_avgs, exp_avg_diffs, exp_avg_ahead_sqs, previous = ([state[name] for state in states] for name in _STATE)
        beta1, beta2, beta3 = group["betas"]
        lr, values, given = float(group["lr"]), to_compute_dtype(parameters), gradients(parameters)
        if step == 1:
            _keep(previous, given)
        differences = kernels.foreach_add(given, previous, alpha=-1)
        _keep(previous, given)
        kernels.foreach_lerp_(exp_avgs, given, 1 - beta1)
        kernels.foreach_lerp_(exp_avg_diffs, differences, 1 - beta2)
        ahead = kernels.foreach_add(given, differences, alpha=beta2)
        kernels.foreach_mul_(exp_avg_ahead_sqs, beta3)
        kernels.foreach_addcmul_(exp_avg_ahead_sqs, ahead, ahead, 1 - beta3)
        del differences, ahead
        denominators = kernels.foreach_sqrt(exp_avg_ahead_sqs)
        kernels.foreach_div_(denominators, math.sqrt(1 - beta3**step))
        kernels.foreach_add_(denominators, group["eps"])
        decay = lr * group["weight_decay"]
        if decay and group["no_prox"]:
            kernels.foreach_mul_(values, 1 - decay)
        kernels.foreach_addcdiv_(values, exp_avgs, denominators, -lr / (1 - beta1**step))
        kernels.foreach_addcdiv_(values, exp_avg_diffs, denominators, -lr * beta2 / (1 - beta2**step))
        if decay and not group["no_prox"]:
            kernels.foreach_div_(values, 1 + decay)
        write_back(parameters, values)


def _keep(kept: list[Tensor], tensors: list[Tensor]) -> None:
    # One by one: a DTensor has no operation for lists of them.
    for own, tensor in zip(kept, tensors, strict=True):
        own.copy_(tensor)
