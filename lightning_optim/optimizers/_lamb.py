"""LAMB: AdamW's update, scaled layer by layer to the length of the weights, for large batches.

Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, https://arxiv.org/abs/1904.00962.
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
from lightning_optim.optimizers._trust_ratio import Adapt, adapted, check_adapt, norms, ratios, scale
from lightning_optim.stepping import Update


class Lamb(OwnOptimizer):
    """LAMB: a layer moves by ``lr`` times its own norm, in the direction of AdamW's update with its decay.

    A layer is a parameter. Those with fewer than two dimensions, biases and norms, are not adapted, as in the authors'
    training of BERT: they get the update as it is.

    The gradients are not clipped here. NVIDIA's form, and so apex's and timm's, divides them by their norm over all
    parameters first: ``Trainer(gradient_clip_val=1.0)`` does.

    Args:
        params: Parameters or param groups, real and dense.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: Part of the weights in the update, before it is scaled.
        adapt: ``"matrices"`` adapts parameters with two dimensions or more, ``"all"`` every one, ``"none"`` none.
        trust_clip: Whether the trust ratio is at most 1 (LAMBC).

    Raises:
        InvalidParamGroups: If a parameter is complex or its gradient sparse.
        InvalidOption: If ``adapt`` is unknown.
    """

    sharded: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        adapt: Adapt = "matrices",
        trust_clip: bool = False,
    ) -> None:
        super().__init__(params, hyperparameters(locals()))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_adapt(type(self).__name__, group)

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {name: zeros_for(parameter) for name in ("exp_avg", "exp_avg_sq")}

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> Update:
        states = [self.state[parameter] for parameter in parameters]
        exp_avgs, exp_avg_sqs = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        values, given = to_compute_dtype(parameters), gradients(parameters)
        kernels.foreach_lerp_(exp_avgs, given, 1 - beta1)
        kernels.foreach_mul_(exp_avg_sqs, beta2)
        kernels.foreach_addcmul_(exp_avg_sqs, given, given, 1 - beta2)
        denominators = kernels.foreach_sqrt(exp_avg_sqs)
        kernels.foreach_div_(denominators, math.sqrt(1 - beta2**step))
        kernels.foreach_add_(denominators, group["eps"])
        updates = kernels.foreach_div(exp_avgs, denominators)
        del denominators
        kernels.foreach_div_(updates, 1 - beta1**step)
        if group["weight_decay"]:
            kernels.foreach_add_(updates, values, alpha=group["weight_decay"])
        if chosen := adapted(parameters, group["adapt"]):
            own = [updates[index] for index in chosen]
            layouts = [self.layout(parameters[index]) for index in chosen]
            lengths, steps = yield from norms(layouts, [values[index] for index in chosen], own)
            trust = ratios(lengths, steps)
            scale(own, trust.clamp_(max=1.0) if group["trust_clip"] else trust)
        kernels.foreach_add_(values, updates, alpha=-float(group["lr"]))
        write_back(parameters, values)
