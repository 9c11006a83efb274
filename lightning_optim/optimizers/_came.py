"""CAME: Adafactor with momentum that trusts an update as far as it agrees with the momentum.

CAME: Confidence-guided Adaptive Memory Efficient Optimization, https://arxiv.org/abs/2307.02047.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_optim.optimizers._base import OwnOptimizer, compute_dtype, hyperparameters
from lightning_optim.optimizers._factored import TENSORS, moment_dims, moment_shapes, over_root, rms
from lightning_optim.optimizers._stacks import batches, stacked, stacked_weights
from lightning_optim.stepping import Layout, Together, Update, side_by_side

#: Names of the tensors of the second moment of residuals, which only matrices have.
RESIDUAL = _ROW, _COLUMN, _FULL = "exp_avg_res_row", "exp_avg_res_col", "exp_avg_res"


class CAME(OwnOptimizer):
    """CAME: Adafactor's updates are averaged, and each element divided by how far updates scatter around the average.

    Both second moments, of the gradients and of that scatter, are factored over the last two dimensions, so that only
    the average has the size of the parameter. A vector has an unfactored second moment and no scatter, as in the
    authors' code.

    As there, no moment is corrected for its start at zero: the first steps are about ten times as long as the learning
    rate says, and want a warm-up.

    Args:
        params: Parameters or param groups.
        lr: Learning rate.
        betas: Decay rates of the updates' average, of the gradients' second moment, and of the residuals'.
        eps: Added to squared gradients, and to squared residuals.
        clip_threshold: Largest root mean square of an update before it is averaged.
        weight_decay: Decoupled weight decay.

    Raises:
        InvalidParamGroups: If a parameter is complex or its gradient sparse.
    """

    sharded: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float = 2e-4,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, hyperparameters(locals()))

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        dtype, device = compute_dtype(parameter), parameter.device
        shapes = state_shapes(tuple(parameter.shape))
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}

    def _dims(self, name: str, parameter: Tensor, value: Tensor) -> Sequence[int | None]:
        return moment_dims(dict(zip(RESIDUAL, TENSORS, strict=True)).get(name, name), parameter.ndim)

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> Update:
        lr = float(group["lr"])

        def stepped(batch: list[Tensor], layout: Layout) -> Update:
            names = state_shapes(tuple(batch[0].shape))
            with stacked_weights(batch) as (values, given), stacked([self.state[p] for p in batch], names) as state:
                update = yield from came_update(
                    given, state, layout, betas=group["betas"], eps=group["eps"], clip_threshold=group["clip_threshold"]
                )
                if group["weight_decay"]:
                    values.mul_(1 - lr * group["weight_decay"])
                values.add_(update, alpha=-lr)

        kinds = batches(parameters, lambda shape: state_shapes(shape).values(), self.layout)
        yield from side_by_side(stepped(*batch) for batch in kinds)


def state_shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the state's tensors by name, for a parameter of this shape."""
    moments = moment_shapes(shape)
    residuals = dict(zip(RESIDUAL, moments.values(), strict=False)) if len(moments) == 2 else {}
    return {"exp_avg": shape, **moments, **residuals}


def came_update(
    gradients: Tensor,
    state: Mapping[str, Tensor],
    layout: Layout,
    *,
    betas: tuple[float, float, float],
    eps: tuple[float, float],
    clip_threshold: float,
) -> Together[Tensor]:
    """Advances the state of a stack of parameters and returns the updates, before the learning rate.

    ``layout`` is that of one parameter.
    """
    beta1, beta2, beta3 = betas
    update = yield from over_root(gradients, gradients.square(), state, layout, weight=1 - beta2, eps=eps[0])
    size = yield from rms(update, layout)
    update.div_((size / clip_threshold).clamp_(min=1.0))
    average = state["exp_avg"].lerp_(update, 1 - beta1)
    if _ROW not in state:
        return average
    residuals = update.sub_(average).square_()
    return (yield from over_root(average, residuals, state, layout, weight=1 - beta3, eps=eps[1], names=RESIDUAL))
