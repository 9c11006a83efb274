"""GaLore with Adafactor, whose factored second moment lives in the subspace.

GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, https://arxiv.org/abs/2403.03507.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_optim.optimizers._adafactor import Adafactor, default_lr
from lightning_optim.optimizers._base import OwnOptimizer, gradients, hyperparameters, to_compute_dtype
from lightning_optim.optimizers._factored import moment_dims
from lightning_optim.optimizers._galore import add_to_weights
from lightning_optim.optimizers._low_rank import LowRankOptimizer, StateDtype, state_dtype
from lightning_optim.optimizers._matrices import as_matrices, as_matrix, as_stack, low_rank
from lightning_optim.optimizers._projection import ProjectionMethod, ProjectionType, project
from lightning_optim.stepping import Update


class GaLoreAdafactor(LowRankOptimizer, Adafactor):
    """Adafactor whose moments live in a subspace of ``rank`` directions, recomputed every ``update_proj_gap`` steps.

    A projected matrix ``[m, n]``, ``m <= n``, keeps a basis of ``m * rank`` elements, means of ``rank`` rows and ``n``
    columns and, with ``beta1``, a first moment of ``rank * n``.

    Args:
        params: Parameters or param groups; all arguments below may differ between groups.
        lr: As in :class:`~lightning_optim.optimizers.Adafactor`.
        eps: As in :class:`Adafactor`; the lower bound applies to the weights, not to their projection.
        clip_threshold: As in :class:`Adafactor`, but of the update in the subspace.
        decay_rate: As in :class:`Adafactor`.
        beta1: As in :class:`Adafactor`.
        weight_decay: As in :class:`Adafactor`.
        scale_parameter: As in :class:`Adafactor`.
        relative_step: As in :class:`Adafactor`.
        warmup_init: As in :class:`Adafactor`.
        rank: Directions of the subspace; ``None``: the group is not projected.
        update_proj_gap: Steps between two searches for the subspace.
        scale: Factor on the update of projected parameters.
        proj_type: Side to project, see :func:`~lightning_optim.optimizers._projection.sides`; ``"full"`` is both.
        projection: ``"randomized"`` or ``"svd"``, see :func:`~lightning_optim.optimizers._projection.find_bases`.
        state_dtype: Dtype of bases and first moments, see :class:`~lightning_optim.optimizers.GaLoreAdamW`; the
            factored second moment, which is small, stays float32: in bfloat16 it would soon stop changing.
        stack_dims: As in :class:`~lightning_optim.optimizers.GaLoreAdamW`; updates are clipped matrix by matrix.

    Raises:
        InvalidOption: If ``rank`` or ``update_proj_gap`` is not a whole number of at least 1, or a group has
            ``warmup_init`` without ``relative_step``.
        InvalidParamGroups: If a parameter is complex, or a gradient is sparse.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = False,
        relative_step: bool = False,
        warmup_init: bool = False,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: ProjectionType = "std",
        projection: ProjectionMethod = "randomized",
        state_dtype: StateDtype = "float32",
        stack_dims: int = 0,
    ) -> None:
        lr = default_lr(relative_step) if lr is None else lr
        OwnOptimizer.__init__(self, params, hyperparameters(locals()))

    _step_plainly = Adafactor._update

    def _initial_moments(self, parameter: Tensor, shape: tuple[int, ...], group: dict[str, Any]) -> dict[str, Any]:
        moments = Adafactor._initial_moments(self, parameter, shape, group)
        first = {name: moments[name].to(state_dtype(parameter, group)) for name in ("exp_avg",) if name in moments}
        return {**moments, **first}

    def _moment_dims(self, name: str, dims: Sequence[int | None]) -> Sequence[int | None]:
        return [dims[index] for index in moment_dims(name, len(dims))]

    def _step_projected(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> Update:
        stack_dims = group["stack_dims"]
        matrices = as_matrices(gradients(parameters), stack_dims)
        layout = as_matrix(self.layout(parameters[0]), stack_dims)
        left, right = yield from self._bases(parameters, matrices, step, group)
        weights = as_stack(to_compute_dtype(parameters), stack_dims) if group["scale_parameter"] else None
        rate = yield from self._rates(weights, layout, step, group)
        low = yield from project(matrices, left, right, layout)
        subspace = low_rank(layout, left is not None, right is not None, low.shape[1:])
        update = yield from self._moved(parameters, low, subspace, rate, step, group, stack_dims)
        beta = 1 - rate * group["weight_decay"]
        add_to_weights(parameters, update, left, right, beta=beta, alpha=-group["scale"], stack_dims=stack_dims)
