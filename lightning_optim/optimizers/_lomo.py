"""LOMO: stochastic gradient descent without state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_optim._compat import kernels
from lightning_optim.optimizers._base import OwnOptimizer, gradients, hyperparameters, to_compute_dtype, write_back


def lomo_update(parameters: Sequence[Tensor], gradients: Sequence[Tensor], *, lr: float, weight_decay: float) -> None:
    """Takes one step of gradient descent in place.

    Args:
        parameters: What to step; tensors of one dtype and device, float32 or float64.
        gradients: Their gradients, of the same shapes, dtype and device.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
    """
    if weight_decay:
        kernels.foreach_mul_(list(parameters), 1 - lr * weight_decay)
    kernels.foreach_add_(list(parameters), list(gradients), alpha=-lr)


class LOMO(OwnOptimizer):
    """LOMO: stochastic gradient descent without state, made to be stepped during backward.

    Full Parameter Fine-tuning for Large Language Models with Limited Resources, https://arxiv.org/abs/2306.09782.

    It has no hooks of its own: the layerwise engine steps it during backward, which is the paper's point.
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
        values = to_compute_dtype(parameters)
        lomo_update(values, gradients(parameters), lr=float(group["lr"]), weight_decay=group["weight_decay"])
        write_back(parameters, values)
