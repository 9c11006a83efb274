"""What GaLore and APOLLO have in common: which parameters are projected, when, and what happens if that fails."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from lightning_optim.errors import InvalidOption, listing
from lightning_optim.optimizers.adamw import adamw_update
from lightning_optim.optimizers.base import OwnOptimizer, gradients, working, working_dtype, write_back
from lightning_optim.optimizers.projection import (
    ProjectionMethod,
    ProjectionType,
    any_bases,
    base_shapes,
    find_bases,
    low_rank_shape,
    matrix_shape,
)
from lightning_optim.optimizers.stacks import batches, stacked

#: Names of AdamW's moments in the state.
MOMENTS = ("exp_avg", "exp_avg_sq")


class LowRankOptimizer(OwnOptimizer):
    """Base of optimizers that project the gradients of the groups whose ``rank`` is not ``None``.

    In such a group parameters with two or more dimensions are projected (a convolution's as the matrix
    ``[out, rest]``), the others are stepped as those of groups without a rank.

    A parameter whose gradient is not finite is not stepped: its weights, its state and its projection stay as they
    are, its state counts it (``"skipped"``) and a warning says so. If a decomposition fails, the last projection stays
    (``"kept"`` counts). If a gradient is zero when its subspace is due, the next one that is not is asked
    (``"found"`` is false until then).
    """

    def _initial_moments(self, parameter: Tensor, shape: tuple[int, ...], group: dict[str, Any]) -> dict[str, Any]:
        """Returns the state of the update that is taken in ``shape``."""
        raise NotImplementedError

    def _step_plainly(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        """Steps parameters of one kind that are not projected."""
        raise NotImplementedError

    def _step_projected(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        """Steps projected parameters of one kind and of one shape."""
        raise NotImplementedError

    #: The values that the arguments which are words may have.
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "proj_type": get_args(ProjectionType),
        "projection": get_args(ProjectionMethod),
    }

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for name, allowed in self.choices.items():
            if group[name] not in allowed:
                raise InvalidOption(
                    f"{name}={group[name]!r} of {type(self).__name__} is unknown; use one of {listing(allowed)}"
                )
        for name in ("rank", "update_proj_gap"):
            value = group[name]
            if not (isinstance(value, Integral) and int(value) >= 1) and not (name == "rank" and value is None):
                raise InvalidOption(f"{name}={value!r} of {type(self).__name__} is no whole number of at least 1")

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        if not _is_projected(parameter, group):
            return {"skipped": 0, **self._initial_moments(parameter, tuple(parameter.shape), group)}
        shape = low_rank_shape(parameter.shape, group["rank"], group["proj_type"])
        return {"skipped": 0, "kept": 0, "found": False, **self._initial_moments(parameter, shape, group)}

    def _steppable(self, parameters: list[Tensor]) -> list[Tensor]:
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = torch._foreach_norm(found)
        device = norms[0].device
        # One answer from the device for all of them.
        if bool(torch.stack([norm if norm.device == device else norm.to(device) for norm in norms]).isfinite().all()):
            return parameters
        # A norm may overflow where the gradient is finite.
        finite = {p: bool(torch.isfinite(gradient).all()) for p, gradient in zip(parameters, found, strict=True)}
        skipped = [parameter for parameter in parameters if not finite[parameter]]
        for parameter in skipped:
            state = self.state[parameter]
            state["skipped"] = state.get("skipped", 0) + 1
        if skipped:
            count = max(self.state[parameter]["skipped"] for parameter in skipped)
            self._say(f"{len(skipped)} parameters whose gradients are not finite were not stepped", count)
        return [parameter for parameter in parameters if finite[parameter]]

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        projected: list[Tensor] = []
        others: list[Tensor] = []
        for parameter in parameters:
            (projected if _is_projected(parameter, group) else others).append(parameter)
        self._step_plainly(others, step, group)

        def shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
            bases = base_shapes(shape, group["rank"], group["proj_type"])
            return matrix_shape(shape), low_rank_shape(shape, group["rank"], group["proj_type"]), *bases.values()

        for batch in batches(projected, shapes):
            self._step_projected(batch, step, group)

    def _bases(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: int, group: dict[str, Any]
    ) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """Returns the left and the right bases to project with; finds new ones from the gradients where that is due."""
        shapes = base_shapes(parameters[0].shape, group["rank"], group["proj_type"])
        due = (step - 1) % group["update_proj_gap"] == 0
        states = [self.state[parameter] for parameter in parameters]
        for state, gradient in zip(states, gradients, strict=True):
            if due or not (state.get("found") and shapes.keys() <= state.keys()):
                state.update(self._found(state, gradient, shapes, group))
        left, right = ([state[name] for state in states] if name in shapes else None for name in ("left", "right"))
        return left, right

    def _found(
        self, state: Mapping[str, Any], gradient: Tensor, shapes: Mapping[str, tuple[int, int]], group: dict[str, Any]
    ) -> dict[str, Any]:
        """Returns what a search for bases of these shapes changes in the state."""
        found = bool(gradient.any())  # else it is looked for again in the next step
        if found:
            (_, rank), *_ = shapes.values()
            try:
                bases = find_bases(gradient, rank, group["projection"])
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                bases = {}
            if bases and all(bool(bases[name].isfinite().all()) for name in shapes):
                kept = {name: bases[name].clone(memory_format=torch.contiguous_format) for name in shapes}
                return {"found": True, **kept}
        changed: dict[str, Any] = {"found": found, "kept": state.get("kept", 0) + found}
        if found:
            self._say("the decomposition of a gradient failed; its last projection stays", changed["kept"])
        if not shapes.keys() <= state.keys():
            changed |= any_bases(shapes, gradient)
        return changed

    def _say(self, what: str, count: int) -> None:
        if math.log2(count).is_integer():
            warnings.warn(
                f"{type(self).__name__}: {what} (time number {count}; said again when that has doubled)",
                RuntimeWarning,
                stacklevel=2,
            )


class LowRankAdamW(LowRankOptimizer):
    """A low-rank optimizer whose moments are AdamW's, in the working dtype."""

    def _initial_moments(self, parameter: Tensor, shape: tuple[int, ...], group: dict[str, Any]) -> dict[str, Any]:
        return {name: torch.zeros(shape, dtype=working_dtype(parameter), device=parameter.device) for name in MOMENTS}

    def _step_plainly(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        weights = working(parameters)
        self._adamw(parameters, weights, gradients(parameters), step, group)
        write_back(parameters, weights)

    def _adamw_of(
        self, parameters: Sequence[Tensor], low: Tensor, step: int, group: dict[str, Any], lr: float = 1.0
    ) -> Tensor:
        """Returns what AdamW adds to zeros for a stack of gradients in the subspace, and advances the moments."""
        update = torch.zeros_like(low)
        # As one tensor: the fused kernel starts and joins the threads once for each.
        with stacked([self.state[parameter] for parameter in parameters], MOMENTS) as moments:
            adamw_update(
                [update],
                [low],
                [moments["exp_avg"]],
                [moments["exp_avg_sq"]],
                step=step,
                lr=lr,
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=0.0,
            )
        return update

    def _adamw(
        self,
        parameters: Sequence[Tensor],
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        step: int,
        group: dict[str, Any],
    ) -> None:
        """Steps ``weights`` in place with the moments that the state keeps for ``parameters``."""
        adamw_update(
            weights,
            gradients,
            [self.state[parameter]["exp_avg"] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
            step=step,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )


def as_matrices(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns contiguous tensors as matrices, views of those that are none."""
    return [tensor if tensor.ndim == 2 else tensor.view(matrix_shape(tensor.shape)) for tensor in tensors]


def _is_projected(parameter: Tensor, group: dict[str, Any]) -> bool:
    return group["rank"] is not None and parameter.ndim >= 2
