"""GaLore with AdamW: moments live in the subspace of the gradient's leading singular vectors.

GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, https://arxiv.org/abs/2403.03507.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from lightning_optim.optimizers._base import gradients, hyperparameters, to_compute_dtype, write_back
from lightning_optim.optimizers._low_rank import LowRankAdamW, StateDtype
from lightning_optim.optimizers._matrices import as_matrices, as_matrix
from lightning_optim.optimizers._projection import ProjectionMethod, ProjectionType, products, project
from lightning_optim.stepping import Update, as_group


class GaLoreAdamW(LowRankAdamW):
    """AdamW whose moments live in a subspace of ``rank`` directions, recomputed every ``update_proj_gap`` steps.

    A projected matrix ``[m, n]``, ``m <= n``, keeps ``2 * rank * n`` moments and a basis of ``m * rank`` elements.
    AdamW is torch's: decoupled weight decay, epsilon added to the bias-corrected denominator. As in the paper, a change
    of the projection leaves the moments as they are.

    Args:
        params: Parameters or param groups; all arguments below may differ between groups.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator; ``None`` means 1e-8, or galore-torch's 1e-6 with ``match_galore_torch``.
        weight_decay: Decoupled weight decay.
        rank: Directions of the subspace; ``None``: the group is not projected.
        update_proj_gap: Steps between two searches for the subspace.
        scale: Factor on the learning rate of projected parameters.
        proj_type: Side to project, see :func:`~lightning_optim.optimizers._projection.sides`; ``"full"`` is both.
        projection: ``"randomized"`` or ``"svd"``, see :func:`~lightning_optim.optimizers._projection.find_bases`.
        match_galore_torch: Match galore-torch 1.0, for comparisons: epsilon without bias correction, and weight decay
            after the update.
        state_dtype: Dtype of moments and bases: ``"float32"`` (float64 for float64 parameters), or ``"parameter"``, the
            parameter's own; arithmetic is float32 in both cases.
        stack_dims: How many leading dimensions of the group's parameters index matrices: 1 for experts ``[E, m, n]``.

    Raises:
        InvalidOption: If ``rank`` or ``update_proj_gap`` is not a whole number of at least 1; for float16 parameters
            with ``state_dtype="parameter"``.
        InvalidParamGroups: If a parameter is complex, or a gradient is sparse.
    """

    sharded: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 0.0,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: ProjectionType = "std",
        projection: ProjectionMethod = "randomized",
        match_galore_torch: bool = False,
        state_dtype: StateDtype = "float32",
        stack_dims: int = 0,
    ) -> None:
        super().__init__(params, hyperparameters(locals()))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        eps, match = (as_group(param_group).get(name, self.defaults[name]) for name in ("eps", "match_galore_torch"))
        super().add_param_group({**param_group, "eps": default_eps(match) if eps is None else eps})

    def _step_plainly(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        if not group["match_galore_torch"]:
            super()._step_plainly(parameters, step, group)
            return
        super()._step_plainly(parameters, step, {**_as_upstream(group, step), "weight_decay": 0.0})
        for parameter in parameters:
            parameter.mul_(1 - float(group["lr"]) * group["weight_decay"])

    def _step_projected(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> Update:
        matrices = as_matrices(gradients(parameters), group["stack_dims"])
        left, right = yield from self._bases(parameters, matrices, step, group)
        low = yield from project(matrices, left, right, as_matrix(self.layout(parameters[0]), group["stack_dims"]))
        lr, match = float(group["lr"]), group["match_galore_torch"]
        if match:
            group = _as_upstream(group, step)
        update = self._adamw_of(parameters, low, step, group, lr * group["scale"])
        decay = 1 - lr * group["weight_decay"]
        alpha = decay if match else 1.0
        add_to_weights(parameters, update, left, right, beta=decay, alpha=alpha, stack_dims=group["stack_dims"])


def default_eps(match_galore_torch: bool) -> float:
    """Returns the default epsilon, torch's or galore-torch's."""
    return 1e-6 if match_galore_torch else 1e-8


def _as_upstream(group: dict[str, Any], step: int) -> dict[str, Any]:
    """Returns the group with the epsilon that, after bias correction, equals ``eps`` before it."""
    return {**group, "eps": group["eps"] / math.sqrt(1 - group["betas"][1] ** step)}


def add_to_weights(
    parameters: Sequence[Tensor],
    update: Tensor,
    left: Sequence[Tensor] | None,
    right: Sequence[Tensor] | None,
    *,
    beta: float | Tensor,
    alpha: float = 1.0,
    stack_dims: int = 0,
) -> None:
    """Computes ``beta * matrix + alpha * left @ update @ rightᵀ`` for the matrices of parameters, in place.

    ``update`` is ``[batch, ...]``, one per matrix, in the subspace and the compute dtype; a tensor ``beta`` is
    ``[batch, 1, 1]``. The parameters share one shape.
    """
    if left is not None and right is not None:
        update, left = products(left, update.unbind()), None
    # The factors of each product, of which one is the update.
    one: Sequence[Tensor] = update.unbind() if left is None else left
    other: Sequence[Tensor] = update.unbind() if right is None else [basis.mT for basis in right]
    weights = to_compute_dtype(parameters)
    # One pass over the weights if all have the same factor.
    for index, (weight, first, second) in enumerate(zip(as_matrices(weights, stack_dims), one, other, strict=True)):
        if isinstance(beta, Tensor):
            weight.mul_(beta[index])
        weight.addmm_(first, second, beta=1.0 if isinstance(beta, Tensor) else beta, alpha=alpha)
    write_back(parameters, weights)
