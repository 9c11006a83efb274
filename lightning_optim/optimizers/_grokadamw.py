"""GrokAdamW: AdamW on gradients with an amplified slow component, amplified less while the model overfits.

The algorithm of the package grokadamw (https://github.com/cognitivecomputations/grokadamw) after Grokfast: Accelerated
Grokking by Amplifying Slow Gradients, https://arxiv.org/abs/2405.20233.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from lightning_optim._compat import kernels
from lightning_optim.optimizers._adamw import adamw_update
from lightning_optim.optimizers._base import (
    OwnOptimizer,
    gradients,
    hyperparameters,
    to_compute_dtype,
    write_back,
    zeros_for,
)


class GrokAdamW(OwnOptimizer):
    """AdamW that amplifies the slow component of the gradient, an exponential moving average.

    The average's decay rate falls with the grokking signal, the relative excess of the evaluation loss over the
    training loss. Both losses are entries of the param groups, ``"train_loss"`` and ``"eval_loss"``, floats or ``None``
    if unknown (the signal is then 0). :class:`~lightning_optim.GrokkingSignal` writes them, and checkpoints hold them.

    The first decay rate falls along a group: its i-th parameter, counted whether or not it has a gradient, uses
    ``betas[0] * (1 - gamma) ** i``. The order within a group is thus a hyperparameter.

    It differs from the package on purpose: bias correction uses each parameter's own decay rate; a parameter's position
    does not depend on which others have a gradient; epsilon is added to the bias-corrected denominator, as in
    ``torch.optim.AdamW``; arithmetic and states of bfloat16 and float16 parameters are float32; states stay on the
    parameter's device; gradients are neither clipped nor changed.

    Args:
        params: Parameters or param groups, real and dense.
        lr: Learning rate.
        betas: Decay rates of the first moment (of the first parameter of a group) and of the second.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        alpha_init: Decay rate of the gradient's average when the signal is 0.
        lamb: Factor on the average when it is added to the gradient.
        gamma: Fraction by which the first decay rate falls from one parameter of a group to the next.
        grokking_signal_decay_rate: How fast the average's decay rate falls with the signal.

    Raises:
        InvalidParamGroups: If a parameter is complex or its gradient sparse.
    """

    sharded: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        alpha_init: float = 0.98,
        lamb: float = 2.0,
        gamma: float = 0.1,
        grokking_signal_decay_rate: float = 0.1,
    ) -> None:
        super().__init__(params, {**hyperparameters(locals()), "train_loss": None, "eval_loss": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch pickles and copies only defaults, groups and state.
        self._number()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._number()

    def _number(self) -> None:
        # An attribute: the layerwise engine's inner optimizers share it, while their groups hold one bucket only.
        self._positions = {p: index for group in self.param_groups for index, p in enumerate(group["params"])}

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {name: zeros_for(parameter) for name in ("exp_avg", "exp_avg_sq", "grok_ema")}

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        signal = grokking_signal(group["train_loss"], group["eval_loss"])
        beta1, beta2 = group["betas"]
        positions = [self._positions[self.origin(parameter)] for parameter in parameters]
        values = to_compute_dtype(parameters)
        grokadamw_update(
            values,
            gradients(parameters),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["grok_ema"] for state in states],
            step=step,
            lr=float(group["lr"]),
            beta1s=[beta1 * (1 - group["gamma"]) ** position for position in positions],
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            alpha=group["alpha_init"] * math.exp(-group["grokking_signal_decay_rate"] * signal),
            lamb=group["lamb"],
        )
        write_back(parameters, values)


def grokking_signal(train_loss: float | None, eval_loss: float | None) -> float:
    """Returns the excess of the evaluation loss over the training loss, as a fraction of the evaluation loss.

    It is 0 if the evaluation loss is not the larger one or not positive, or if one is unknown or not finite.
    """
    if train_loss is None or eval_loss is None or not (math.isfinite(train_loss) and math.isfinite(eval_loss)):
        return 0.0
    return (eval_loss - train_loss) / eval_loss if eval_loss > max(train_loss, 0.0) else 0.0


def grokadamw_update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grok_emas: list[Tensor],
    *,
    step: int,
    lr: float,
    beta1s: list[float],
    beta2: float,
    eps: float,
    weight_decay: float,
    alpha: float,
    lamb: float,
) -> None:
    """Takes one GrokAdamW step in place, with the semantics of :func:`adamw_update`.

    ``beta1s`` are the first moments' decay rates, one per parameter; ``alpha`` is that of the gradients' averages
    ``grok_emas``, which are added to the gradients ``lamb`` times.
    """
    kernels.foreach_lerp_(grok_emas, gradients, 1 - alpha)
    amplified = kernels.foreach_add(gradients, grok_emas, alpha=lamb)
    # One by one, because decay rates differ: the fused kernel gains more than lists of tensors would.
    for tensors in zip(beta1s, parameters, amplified, exp_avgs, exp_avg_sqs, strict=True):
        beta1, lists = tensors[0], [[tensor] for tensor in tensors[1:]]
        adamw_update(*lists, step=step, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
