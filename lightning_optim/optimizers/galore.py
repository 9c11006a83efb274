"""GaLore with AdamW: moments are kept in the subspace of the gradient's leading singular vectors.

GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, https://arxiv.org/abs/2403.03507.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_optim.optimizers.base import gradients
from lightning_optim.optimizers.low_rank import LowRankAdamW, as_matrices, weight_matrices
from lightning_optim.optimizers.projection import (
    ProjectionMethod,
    ProjectionType,
    add_projected_back_,
    project,
)


class GaLoreAdamW(LowRankAdamW):
    """AdamW whose moments live in a subspace of ``rank`` directions, found anew every ``update_proj_gap`` steps.

    A projected matrix ``[m, n]``, ``m <= n``, keeps ``2 * rank * n`` moments and a basis of ``m * rank`` elements.
    AdamW is torch's: decoupled decay of the weights, bias-corrected epsilon. The moments stay as they are when the
    projection changes, as in the paper.

    Args:
        params: Parameters or param groups; all arguments below may differ between groups.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        rank: Directions of the subspace; ``None``: the group is not projected.
        update_proj_gap: Steps between two searches for the subspace.
        scale: Factor on the learning rate of projected parameters.
        proj_type: Side to project, see :func:`~lightning_optim.optimizers.projection.sides`; ``"full"`` is both.
        projection: ``"randomized"`` or ``"svd"``, see :func:`~lightning_optim.optimizers.projection.find_bases`.
        match_galore_torch: Do as galore-torch 1.0, for comparisons: the epsilon is not bias-corrected, and the decay
            comes after the update.

    Raises:
        InvalidOption: If ``rank`` or ``update_proj_gap`` is no whole number of at least 1.
        InvalidParamGroups: If a parameter is complex or sharded, or a gradient is sparse.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: ProjectionType = "std",
        projection: ProjectionMethod = "randomized",
        match_galore_torch: bool = False,
        *,
        _more: Mapping[str, Any] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "projection": projection,
            "match_galore_torch": match_galore_torch,
        }
        super().__init__(params, {**defaults, **(_more or {})})

    def _step_projected(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        gradient = as_matrices(gradients(parameters))
        left, right = self._bases(parameters, gradient, step, group)
        low = project(gradient, left, right)
        lr, match = float(group["lr"]), group["match_galore_torch"]
        if match:
            # What is added to the uncorrected denominator is this much more beside the corrected one.
            group = {**group, "eps": group["eps"] / math.sqrt(1 - group["betas"][1] ** step)}
        update = self._adamw_of(parameters, low, step, group, lr * group["scale"])
        decay = 1 - lr * group["weight_decay"]
        add_to_weights(parameters, update, left, right, beta=decay, alpha=decay if match else 1.0)


def add_to_weights(
    parameters: Sequence[Tensor],
    update: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    beta: float | Tensor,
    alpha: float = 1.0,
) -> None:
    """Computes ``beta * parameter + alpha * (update projected back)`` for parameters of one shape, in place.

    Args:
        parameters: Weights of one shape.
        update: ``[batch, ...]`` in the subspace, in the working dtype.
        left: Left bases or ``None``.
        right: Right bases or ``None``.
        beta: Factor on the weights; a tensor ``[batch]`` has one for each.
        alpha: Factor on the update.
    """
    with weight_matrices(parameters) as weights:
        if isinstance(beta, Tensor):
            weights.mul_(beta.view(-1, 1, 1))
            beta = 1.0
        add_projected_back_(weights, update, left, right, beta=beta, alpha=alpha)
