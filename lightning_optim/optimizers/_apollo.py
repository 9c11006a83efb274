"""APOLLO: scales gradients, per channel or as a whole, as AdamW scales their random projection.

APOLLO: SGD-like Memory, AdamW-level Performance, https://arxiv.org/abs/2412.05270.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_optim.optimizers._base import gradients, hyperparameters, to_compute_dtype, write_back
from lightning_optim.optimizers._low_rank import LowRankAdamW, StateDtype
from lightning_optim.optimizers._matrices import as_matrices, as_matrix, as_stack, low_rank
from lightning_optim.optimizers._projection import base_shapes, gaussian, project
from lightning_optim.optimizers._stacks import stacked, unstack
from lightning_optim.stepping import Sum, Together, Update

# Elements whose squares fit into the cache; smaller blocks would start and join the threads more often.
_BLOCK = 2**22


class ApolloAdamW(LowRankAdamW):
    """Steps along the gradient, each channel as far as AdamW would step in a random subspace of ``rank`` directions.

    A projected matrix ``[m, n]``, ``m <= n``, keeps ``2 * rank * n`` moments: those of ``R = P @ G``, where ``P`` is
    Gaussian ``N(0, 1 / rank)`` and redrawn every ``update_proj_gap`` steps. With ``R~``, AdamW's update for ``R``, the
    step is ``G`` with its columns scaled by ``‖R~[:, j]‖ / ‖R[:, j]‖``, or all of it by ``‖R~‖ / ‖R‖``. The state holds
    the seed of ``P``, not ``P``. Other parameters are stepped as by ``torch.optim.AdamW``.

    APOLLO-Mini is ``rank=1, scale=128.0, scale_type="tensor"``.

    A channel whose gradient is zero, or projects to zero, is not changed. The growth of an update is measured against
    the last nonzero update.

    Args:
        params: Parameters or param groups; all arguments below may differ between groups.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        rank: Directions of the subspace; ``None``: the group is not projected.
        update_proj_gap: Steps between two subspaces.
        scale: Updates of projected parameters are multiplied by its square root, as in apollo-torch.
        proj_type: Side to project, see :func:`~lightning_optim.optimizers._projection.sides`; not ``"full"``.
        proj: ``"random"``, or ``"svd"``: the leading singular vectors of the gradient, which are stored.
        scale_type: ``"channel"`` or ``"tensor"``.
        norm_growth_limit: Upper bound of an update's norm relative to the previous one's; ``None``: no limit.
        seed: Seed of the first random projection; later ones use the numbers that follow.
        state_dtype: Dtype of moments and bases, see :class:`~lightning_optim.optimizers.GaLoreAdamW`.
        stack_dims: How many leading dimensions of the group's parameters index matrices: 1 for experts ``[E, m, n]``.
            Each matrix is scaled, and its growth limited, separately.

    Raises:
        InvalidOption: If ``rank`` or ``update_proj_gap`` is not a whole number of at least 1; if ``proj``,
            ``proj_type``, ``scale_type`` or ``state_dtype`` is not one of the above; for float16 parameters with
            ``state_dtype="parameter"``.
        InvalidParamGroups: If a parameter is complex, or a gradient is sparse.
    """

    sharded: ClassVar[bool] = True
    choices: ClassVar = {
        "proj": ("random", "svd"),
        # Not "full": a channel is a row or a column, so one side must not be projected.
        "proj_type": ("std", "reverse_std", "right", "left"),
        "scale_type": ("channel", "tensor"),
        "state_dtype": get_args(StateDtype),
    }

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: Literal["std", "reverse_std", "right", "left"] = "std",
        proj: Literal["random", "svd"] = "random",
        scale_type: Literal["channel", "tensor"] = "channel",
        norm_growth_limit: float | None = 1.01,
        seed: int = 0,
        state_dtype: StateDtype = "float32",
        stack_dims: int = 0,
    ) -> None:
        defaults = hyperparameters(locals())
        self._forget_projections()
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_projections()

    def _step_projected(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> Update:
        found, stack_dims = gradients(parameters), group["stack_dims"]
        matrices = as_matrices(found, stack_dims)
        layout = as_matrix(self.layout(parameters[0]), stack_dims)
        left, right = yield from self._bases(parameters, matrices, step, group)
        low = yield from project(matrices, left, right, layout)
        gradient = as_stack(found, stack_dims)
        update = self._adamw_of(parameters, low, step, group)
        scaled = (0, 1) if group["scale_type"] == "tensor" else (0,) if right is None else (1,)
        subspace = low_rank(layout, left is not None, right is not None, low.shape[1:])
        stepped_by, projected, norms = yield [
            *(Sum(_norms(each, scaled), subspace, scaled, is_norm=True) for each in (update, low)),
            Sum(_norms(gradient, scaled), layout, scaled, is_norm=True),
        ]
        # Zero divided by zero, or a moment that outlasts its gradient.
        scaling = (stepped_by / projected).nan_to_num_(0.0, 0.0)
        if group["norm_growth_limit"] is not None:
            norm = torch.linalg.vector_norm(norms * scaling, dim=(1, 2)).unsqueeze(1)
            others = tuple({0, 1} - set(scaled))
            (norm,) = yield [Sum(norm, layout, others, is_norm=True)]
            scaling *= self._limited(parameters, norm, group["norm_growth_limit"]).unsqueeze(2)

        lr = float(group["lr"])
        weights = to_compute_dtype(parameters)
        stepped = as_stack(weights, stack_dims)
        if group["weight_decay"]:
            stepped.mul_(1 - lr * group["weight_decay"])
        stepped.addcmul_(gradient, scaling, value=-lr * math.sqrt(group["scale"]))
        if len(weights) > 1:
            unstack(stepped, as_matrices(weights))
        write_back(parameters, weights)

    def _moment_dims(self, name: str, dims: Sequence[int | None]) -> Sequence[int | None]:
        return (None,) if name == "update_norm" else dims

    def _limited(self, parameters: Sequence[Tensor], norm: Tensor, growth: float) -> Tensor:
        """Returns factors ``[matrices, 1]`` that limit the updates' growth, and stores the limited norms."""
        states = [self.state[parameter] for parameter in parameters]
        for state in states:
            if "update_norm" not in state:
                # No limit yet. Infinite, it would pass for a state that a gradient has spoiled.
                largest = torch.finfo(norm.dtype).max
                state["update_norm"] = norm.new_full((len(norm) // len(states),), largest)
        with stacked(states, ("update_norm",)) as noted:
            last = noted["update_norm"].view(norm.shape)
            limited = torch.minimum(norm, growth * last)
            # After a stored norm of zero, every later update would be zero.
            last.copy_(torch.where(limited > 0, limited, last))
        return (limited / norm).nan_to_num_(0.0)

    def _bases(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: int, group: dict[str, Any]
    ) -> Together[tuple[list[Tensor] | None, list[Tensor] | None]]:
        if group["proj"] == "svd":
            return (yield from super()._bases(parameters, gradients, step, {**group, "projection": "svd"}))
        states = [self.state[parameter] for parameter in parameters]
        if (step - 1) % group["update_proj_gap"] == 0:
            for state in states:
                state["seed"] = state["seed"] + 1 if "seed" in state else group["seed"]
        layout = as_matrix(self.layout(parameters[0]), group["stack_dims"])
        ((name, (side, rank)),) = base_shapes(layout.shape, group["rank"], group["proj_type"]).items()
        seeds = [state["seed"] for state in states]
        # A single seed, unless the gap was changed while some parameters had no gradient.
        found = {seed: self._projection(seed, side, rank, gradients[0]) for seed in set(seeds)}
        found = {seed: layout.entries(basis, 0 if name == "left" else 1) for seed, basis in found.items()}
        bases = [found[seed] for seed in seeds for _ in range(len(gradients) // len(parameters))]
        return (bases, None) if name == "left" else (None, bases)

    def _projection(self, seed: int, side: int, rank: int, like: Tensor) -> Tensor:
        """Returns the transposed random projection ``[side, rank]`` of a seed; the last one is cached."""
        kind = side, rank, like.dtype, like.device
        if kind not in self._projections or self._projections[kind][0] != seed:
            self._projections[kind] = seed, gaussian(seed, side, rank, like).div_(math.sqrt(rank))
        return self._projections[kind][1]

    def _forget_projections(self) -> None:
        # Redrawn from the seeds in the state; torch leaves such attributes out of copies and pickles.
        self._projections: dict[tuple[int, int, torch.dtype, torch.device], tuple[int, Tensor]] = {}


def _norms(matrices: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Returns the 2-norms of a stack of matrices over dimensions of a matrix, which are kept with size 1."""
    if dims != (0,) or matrices.device.type != "cpu" or not matrices.numel():
        norms: Tensor = torch.linalg.vector_norm(matrices, dim=tuple(dim + 1 for dim in dims), keepdim=True)
        return norms
    # On CPU, 20 times faster than torch's norm over the rows, without a temporary of the matrix's size.
    blocks = torch.split(matrices, max(1, _BLOCK // matrices.shape[-1]), dim=1)
    squares = [(block * block).sum(1, keepdim=True) for block in blocks]
    return torch.stack(squares).sum(0).sqrt_()
