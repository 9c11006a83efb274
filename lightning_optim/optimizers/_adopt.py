"""ADOPT: Adam whose gradient is divided by a second moment that does not contain it.

ADOPT: Modified Adam Can Converge with Any beta2 with the Optimal Rate, https://arxiv.org/abs/2411.02853.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lightning_optim._compat import kernels
from lightning_optim.errors import InvalidOption
from lightning_optim.optimizers._base import (
    OwnOptimizer,
    gradients,
    hyperparameters,
    to_compute_dtype,
    write_back,
    zeros_for,
)


class Adopt(OwnOptimizer):
    """ADOPT: the gradient is normalized by the second moment of those before it, then averaged.

    So it converges whatever ``betas[1]`` is, where Adam may need one that depends on the problem. There is no bias
    correction: the first step of a parameter only sets its second moment, and does not move it.

    It is the paper's algorithm with clipping: a normalized gradient is at most ``(step - 1) ** clip_exp``, which keeps
    early steps from being long where the first gradient was small. Weight decay is decoupled; as in the authors' code,
    the first step does not decay.

    Args:
        params: Parameters or param groups, real and dense.
        lr: Learning rate.
        betas: Decay rates of the normalized gradients' average and of the second moment.
        eps: Smallest root of a second moment to divide by.
        weight_decay: Decoupled weight decay.
        clip_exp: Exponent of the bound; ``None`` for no clipping.

    Raises:
        InvalidParamGroups: If a parameter is complex or its gradient sparse.
    """

    sharded: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        clip_exp: float | None = 0.25,
    ) -> None:
        super().__init__(params, hyperparameters(locals()))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["clip_exp"] is not None and not group["clip_exp"] >= 0:
            raise InvalidOption(
                f"clip_exp={group['clip_exp']!r} of Adopt is out of range: 0 <= value, or None", code="LO204"
            )

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {name: zeros_for(parameter) for name in ("exp_avg", "exp_avg_sq")}

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        exp_avg_sqs = [state["exp_avg_sq"] for state in states]
        given = gradients(parameters)
        if step == 1:
            kernels.foreach_addcmul_(exp_avg_sqs, given, given, 1.0)
            return
        beta1, beta2 = group["betas"]
        lr, values = float(group["lr"]), to_compute_dtype(parameters)
        exp_avgs = [state["exp_avg"] for state in states]
        roots = kernels.foreach_sqrt(exp_avg_sqs)
        kernels.foreach_clamp_min_(roots, group["eps"])
        normalized = kernels.foreach_div(given, roots)
        if group["clip_exp"] is not None:
            bound = float((step - 1) ** group["clip_exp"])
            kernels.foreach_clamp_min_(normalized, -bound)
            kernels.foreach_clamp_max_(normalized, bound)
        kernels.foreach_lerp_(exp_avgs, normalized, 1 - beta1)
        if group["weight_decay"]:
            kernels.foreach_mul_(values, 1 - lr * group["weight_decay"])
        kernels.foreach_add_(values, exp_avgs, alpha=-lr)
        # Last: the gradient counts from the next step on.
        kernels.foreach_mul_(exp_avg_sqs, beta2)
        kernels.foreach_addcmul_(exp_avg_sqs, given, given, 1 - beta2)
        write_back(parameters, values)
