"""What GaLore and APOLLO have in common: which parameters are projected, when, and what happens if that fails."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_optim.errors import InvalidOption
from lightning_optim.optimizers.adamw import adamw_update
from lightning_optim.optimizers.base import OwnOptimizer, gradients, working, working_dtype, write_back
from lightning_optim.optimizers.projection import (
    any_bases,
    base_shapes,
    find_bases,
    low_rank_shape,
    matrix_shape,
)
from lightning_optim.optimizers.stacks import batches, stack, stacked, unstack

_MOMENTS = ("exp_avg", "exp_avg_sq")


class LowRankOptimizer(OwnOptimizer):
    """Base of optimizers that project the gradients of the groups whose ``rank`` is not ``None``.

    In such a group parameters with two or more dimensions are projected (a convolution's as the matrix
    ``[out, rest]``), the others are stepped as those of groups without a rank.

    A parameter whose gradient is not finite is not stepped: its weights, its state and its projection stay as they
    are, its state counts it (``"skipped"``) and a warning says so. If a decomposition fails, the last projection stays
    (``"kept"`` counts).
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

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for name in ("rank", "update_proj_gap"):
            value = group[name]
            if not (isinstance(value, int) and value >= 1) and not (name == "rank" and value is None):
                raise InvalidOption(f"{name}={value!r} of {type(self).__name__} is no whole number of at least 1")

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        counts = {"skipped": 0}
        if not _is_projected(parameter, group):
            return {**counts, **self._initial_moments(parameter, tuple(parameter.shape), group)}
        shape = low_rank_shape(parameter.shape, group["rank"], group["proj_type"])
        return {**counts, "kept": 0, **self._initial_moments(parameter, shape, group)}

    def _steppable(self, parameters: list[Tensor]) -> list[Tensor]:
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = torch._foreach_norm(found)
        # One answer from the device for all of them.
        if bool(torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).isfinite().all()):
            return parameters
        # A norm may overflow where the gradient is finite.
        finite = {p: bool(torch.isfinite(gradient).all()) for p, gradient in zip(parameters, found, strict=True)}
        skipped = [parameter for parameter in parameters if not finite[parameter]]
        for parameter in skipped:
            state = self.state[parameter]
            state["skipped"] = state.get("skipped", 0) + 1
        if skipped:
            self._say("skipped", f"{len(skipped)} parameters whose gradients are not finite were not stepped", skipped)
        return [parameter for parameter in parameters if finite[parameter]]

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        projected = [parameter for parameter in parameters if _is_projected(parameter, group)]
        self._step_plainly([parameter for parameter in parameters if not _is_projected(parameter, group)], step, group)

        def shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
            bases = base_shapes(shape, group["rank"], group["proj_type"])
            return matrix_shape(shape), low_rank_shape(shape, group["rank"], group["proj_type"]), *bases.values()

        for batch in batches(projected, shapes):
            self._step_projected(batch, step, group)

    def _bases(
        self, parameters: Sequence[Tensor], gradient: Tensor, step: int, group: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns the bases to project with, stacked; finds new ones from ``gradient`` where that is due."""
        names = base_shapes(parameters[0].shape, group["rank"], group["proj_type"])
        if (step - 1) % group["update_proj_gap"] == 0:
            self._refresh(parameters, gradient, group, tuple(names))
        stacked = {name: stack([self.state[parameter][name] for parameter in parameters]) for name in names}
        return stacked.get("left"), stacked.get("right")

    def _refresh(
        self, parameters: Sequence[Tensor], gradient: Tensor, group: dict[str, Any], names: tuple[str, ...]
    ) -> None:
        rows, columns = gradient.shape[-2:]
        rank = min(group["rank"], rows, columns)
        try:
            bases = find_bases(gradient, rank, group["projection"])
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if len(parameters) > 1:
                for index, parameter in enumerate(parameters):
                    self._refresh([parameter], gradient[index : index + 1], group, names)
                return
            bases = {name: gradient.new_full((1, 1, 1), math.nan) for name in names}
        for index, parameter in enumerate(parameters):
            state = self.state[parameter]
            found = {name: bases[name][index] for name in names}
            if not all(bool(basis.isfinite().all()) for basis in found.values()):
                state["kept"] += 1
                self._say("kept", "the decomposition of a gradient failed; its last projection stays", [parameter])
                if names[0] in state:
                    continue
                found = {name: any_bases(rows, columns, rank, gradient)[name] for name in names}
            state.update({name: basis.clone(memory_format=torch.contiguous_format) for name, basis in found.items()})

    def _say(self, counter: str, what: str, parameters: Any) -> None:
        count = max(self.state[parameter][counter] for parameter in parameters)
        if math.log2(count).is_integer():
            warnings.warn(
                f"{type(self).__name__}: {what} (time number {count}; said again when that has doubled)",
                RuntimeWarning,
                stacklevel=2,
            )


class LowRankAdamW(LowRankOptimizer):
    """A low-rank optimizer whose moments are AdamW's, in the working dtype."""

    def _initial_moments(self, parameter: Tensor, shape: tuple[int, ...], group: dict[str, Any]) -> dict[str, Any]:
        return {name: torch.zeros(shape, dtype=working_dtype(parameter), device=parameter.device) for name in _MOMENTS}

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
        with stacked([self.state[parameter] for parameter in parameters], _MOMENTS) as moments:
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


def as_matrices(tensors: Sequence[Tensor]) -> Tensor:
    """Returns contiguous tensors of one shape as a stack of matrices ``[batch, rows, columns]``."""
    return stack([tensor.view(matrix_shape(tensor.shape)) for tensor in tensors])


@contextmanager
def weight_matrices(parameters: Sequence[Tensor]) -> Iterator[Tensor]:
    """Gives parameters of one shape as matrices in the working dtype, and writes back what became of them."""
    weights = working(parameters)
    matrices = [weight.view(matrix_shape(weight.shape)) for weight in weights]
    stacked = stack(matrices)
    yield stacked
    unstack(stacked, matrices)
    write_back(parameters, weights)


def _is_projected(parameter: Tensor, group: dict[str, Any]) -> bool:
    return group["rank"] is not None and parameter.ndim >= 2
