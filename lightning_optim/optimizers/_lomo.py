"""LOMO: stochastic gradient descent without state."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_optim._compat import kernels
from lightning_optim.optimizers._base import OwnOptimizer, gradients, hyperparameters, to_compute_dtype, write_back


class LOMO(OwnOptimizer):
    """LOMO: stochastic gradient descent without state, for optimizer-in-backward.

    Full Parameter Fine-tuning for Large Language Models with Limited Resources, https://arxiv.org/abs/2306.09782.

    It registers no hooks: the layerwise engine steps it during backward, which is the paper's point.
    Parameters of two bytes per element are stepped in float32 and rounded once.

    Args:
        params: Parameters or param groups.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
    """

    sharded = True

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        super().__init__(params, hyperparameters(locals()))

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {}

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        lr, values = float(group["lr"]), to_compute_dtype(parameters)
        if group["weight_decay"]:
            kernels.foreach_mul_(values, 1 - lr * group["weight_decay"])
        kernels.foreach_add_(values, gradients(parameters), alpha=-lr)
        write_back(parameters, values)
