"""What GaLore and APOLLO share: which parameters are projected, when, and what happens if that fails."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_optim._compat import kernels
from lightning_optim.errors import InvalidOption, listing
from lightning_optim.optimizers._adamw import adamw_update
from lightning_optim.optimizers._base import OwnOptimizer, compute_dtype, gradients, to_compute_dtype, write_back
from lightning_optim.optimizers._projection import (
    ProjectionMethod,
    ProjectionType,
    any_bases,
    base_shapes,
    find_bases,
    low_rank_shape,
    matrix_shape,
    project,
)
from lightning_optim.optimizers._stacks import batches, stack, stacked

#: The dtype of moments and bases; ``"parameter"`` means the parameter's dtype.
StateDtype = Literal["float32", "parameter"]
#: Names of AdamW's moments in the state.
MOMENTS = ("exp_avg", "exp_avg_sq")


class LowRankOptimizer(OwnOptimizer):
    """Base of optimizers that project the gradients of groups whose ``rank`` is not ``None``.

    In such a group, parameters with two or more dimensions are projected; one with more than two (a convolution) counts
    as the matrix ``[out, rest]``. With ``stack_dims``, the leading dimensions index matrices, each with its own basis
    and moments: experts ``[E, m, n]`` are ``E`` matrices ``[m, n]`` with ``stack_dims=1``. Parameters with too few
    dimensions are stepped like those of groups without a rank.

    A parameter with a non-finite gradient is not stepped: its weights, state and projection stay as they are, the state
    counts the skip (``"skipped"``) and a warning is issued. If a decomposition fails, the last projection stays
    (counted in ``"kept"``). If a gradient is zero when a new subspace is due, the next nonzero gradient decides it
    (``"found"`` is false until then; a list for a stack).
    """

    def _initial_moments(self, parameter: Tensor, shape: tuple[int, ...], group: dict[str, Any]) -> dict[str, Any]:
        """Returns the initial state of an update computed in ``shape``."""
        raise NotImplementedError

    def _step_plainly(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        """Steps parameters that are not projected."""
        raise NotImplementedError

    def _step_projected(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        """Steps projected parameters of one shape; a stack of matrices comes alone."""
        raise NotImplementedError

    #: Allowed values of the string arguments.
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "proj_type": get_args(ProjectionType),
        "projection": get_args(ProjectionMethod),
        "state_dtype": get_args(StateDtype),
    }

    def subspace(self, parameter: Tensor) -> object:
        """Returns what a parameter's gradient is projected by, another object after each search; ``None`` if nothing.

        It is a basis, or the seed of a random one.
        """
        state = self.state.get(parameter, {})
        return next((state[name] for name in ("left", "right", "seed") if name in state), None)

    @torch.no_grad()
    def captured(self, parameter: Tensor, group: dict[str, Any]) -> Tensor | None:
        """Returns the squared norm of what is left of a parameter's gradient in its subspace, 0-dim.

        ``None`` if it is not projected, or by a random matrix, which keeps the norm on average whatever the gradient.
        """
        state, stack_dims = self.state.get(parameter, {}), group["stack_dims"]
        if parameter.grad is None or not ("left" in state or "right" in state):
            return None
        left, right = (
            as_matrices(to_compute_dtype([state[name]]), stack_dims) if name in state else None
            for name in ("left", "right")
        )
        return project(as_matrices(gradients([parameter]), stack_dims), left, right).square().sum()

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for name, allowed in self.choices.items():
            if group[name] not in allowed:
                raise InvalidOption(
                    f"{name}={group[name]!r} of {type(self).__name__} is unknown; use one of {listing(allowed)}"
                )
        for name, least in (("rank", 1), ("update_proj_gap", 1), ("stack_dims", 0)):
            value = group[name]
            if not (isinstance(value, Integral) and int(value) >= least) and not (name == "rank" and value is None):
                raise InvalidOption(f"{name}={value!r} of {type(self).__name__} is not a whole number >= {least}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # Missing in older checkpoints.
            group.setdefault("state_dtype", "float32")
            group.setdefault("stack_dims", 0)

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        if not _is_projected(parameter, group):
            return {"skipped": 0, **self._initial_moments(parameter, tuple(parameter.shape), group)}
        counts, matrix = parameter.shape[: group["stack_dims"]], parameter.shape[group["stack_dims"] :]
        shape = *counts, *low_rank_shape(matrix, group["rank"], group["proj_type"])
        found = [False] * math.prod(counts) if counts else False
        return {"skipped": 0, "kept": 0, "found": found, **self._initial_moments(parameter, shape, group)}

    def _steppable(self, parameters: list[Tensor]) -> list[Tensor]:
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = kernels.foreach_norm(found)
        device = norms[0].device
        # One synchronization with the device for all of them.
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
            self._warn_rarely(f"{len(skipped)} parameters with non-finite gradients were not stepped", count)
        return [parameter for parameter in parameters if finite[parameter]]

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        projected: list[Tensor] = []
        others: list[Tensor] = []
        for parameter in parameters:
            (projected if _is_projected(parameter, group) else others).append(parameter)
        self._step_plainly(others, step, group)
        if group["stack_dims"]:
            for parameter in projected:
                self._step_projected([parameter], step, group)
            return

        def shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
            bases = base_shapes(shape, group["rank"], group["proj_type"])
            return matrix_shape(shape), low_rank_shape(shape, group["rank"], group["proj_type"]), *bases.values()

        for batch in batches(projected, shapes):
            self._step_projected(batch, step, group)

    def _bases(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: int, group: dict[str, Any]
    ) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """Returns the left and right bases for parameters of one shape; finds new ones from ``gradients`` when due.

        ``gradients`` are matrices, as many per parameter as its stack has.
        """
        shapes = base_shapes(parameters[0].shape[group["stack_dims"] :], group["rank"], group["proj_type"])
        due = (step - 1) % group["update_proj_gap"] == 0
        each = len(gradients) // len(parameters)
        for index, parameter in enumerate(parameters):
            self._search(parameter, gradients[index * each : (index + 1) * each], shapes, group, due=due)
        states = [self.state[parameter] for parameter in parameters]
        left, right = (
            as_matrices(to_compute_dtype(state[name] for state in states), group["stack_dims"])
            if name in shapes
            else None
            for name in ("left", "right")
        )
        return left, right

    def _search(
        self,
        parameter: Tensor,
        gradients: Sequence[Tensor],
        shapes: Mapping[str, tuple[int, int]],
        group: dict[str, Any],
        *,
        due: bool,
    ) -> None:
        """Finds bases of these shapes for a parameter's matrices: for all if ``due``, else for those without one."""
        state = self.state[parameter]
        counts = parameter.shape[: group["stack_dims"]]
        found = list(state["found"]) if counts else [state.get("found", False)]
        complete = shapes.keys() <= state.keys()
        bases = {name: dict[int, Tensor]() for name in shapes}
        for index, gradient in enumerate(gradients):
            if not due and complete and found[index]:
                continue
            found[index] = bool(gradient.any())  # if zero, the next step tries again
            chosen = _decomposed(gradient, shapes, group["projection"]) if found[index] else {}
            if found[index] and not chosen:
                state["kept"] = state.get("kept", 0) + 1
                self._warn_rarely("the decomposition of a gradient failed; its last projection stays", state["kept"])
            if not chosen and not complete:
                chosen = any_bases(shapes, gradient)
            for name, basis in chosen.items():
                bases[name][index] = basis
        state["found"] = found if counts else found[0]
        for name, by_index in bases.items():
            if by_index:
                shape = (*counts, *shapes[name])
                kept = name in state and state[name].shape == shape
                # A new tensor: references to the old state must keep their values.
                state[name] = (
                    state[name].clone()
                    if kept
                    else torch.zeros(shape, dtype=state_dtype(parameter, group), device=parameter.device)
                )
                matrices = as_matrices([state[name]], len(counts))
                for index, basis in by_index.items():
                    matrices[index].copy_(basis)

    def _warn_rarely(self, what: str, count: int) -> None:
        if math.log2(count).is_integer():
            warnings.warn(
                f"{type(self).__name__}: {what} (count: {count}; the next warning comes when it has doubled)",
                RuntimeWarning,
                stacklevel=2,
            )


class LowRankAdamW(LowRankOptimizer):
    """A low-rank optimizer with AdamW's moments; arithmetic is float32 whatever their dtype."""

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["state_dtype"] == "parameter" and any(p.dtype is torch.float16 for p in group["params"]):
            raise InvalidOption(
                f"state_dtype='parameter' of {type(self).__name__} with float16 parameters: squares of small gradients "
                "round to 0 in float16. Use state_dtype='float32', or bfloat16 parameters (precision='bf16-true')"
            )

    def _initial_moments(self, parameter: Tensor, shape: tuple[int, ...], group: dict[str, Any]) -> dict[str, Any]:
        dtype = state_dtype(parameter, group)
        return {name: torch.zeros(shape, dtype=dtype, device=parameter.device) for name in MOMENTS}

    def _step_plainly(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        weights = to_compute_dtype(parameters)
        self._adamw(parameters, weights, gradients(parameters), step, group)
        write_back(parameters, weights)

    def _adamw_of(
        self, parameters: Sequence[Tensor], low: Tensor, step: int, group: dict[str, Any], lr: float = 1.0
    ) -> Tensor:
        """Returns AdamW's update for a stack of gradients in the subspace and advances the moments."""
        update = torch.zeros_like(low)
        # As one tensor: the fused kernel starts and joins its threads once per tensor.
        states = [self.state[parameter] for parameter in parameters]
        with stacked(states, MOMENTS, group["stack_dims"]) as moments:
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
        """Steps ``weights`` in place with the moments of ``parameters``."""
        moments = [[self.state[parameter][name] for parameter in parameters] for name in MOMENTS]
        first, second = map(to_compute_dtype, moments)
        adamw_update(
            weights,
            gradients,
            first,
            second,
            step=step,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        for kept, values in zip(moments, (first, second), strict=True):
            write_back(kept, values)


def state_dtype(parameter: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """Returns the dtype of a parameter's moments and bases."""
    return parameter.dtype if group["state_dtype"] == "parameter" else compute_dtype(parameter)


def as_matrices(tensors: Iterable[Tensor], stack_dims: int = 0) -> list[Tensor]:
    """Returns views of contiguous tensors as matrices, which the first ``stack_dims`` dimensions index."""
    if not stack_dims:
        return [tensor if tensor.ndim == 2 else tensor.view(matrix_shape(tensor.shape)) for tensor in tensors]
    return [matrix for tensor in tensors for matrix in as_stack([tensor], stack_dims).unbind()]


def as_stack(tensors: Sequence[Tensor], stack_dims: int = 0) -> Tensor:
    """Returns the matrices of contiguous tensors of one shape as one tensor; a view if there is only one."""
    if len(tensors) == 1:
        return tensors[0].view(-1, *matrix_shape(tensors[0].shape, stack_dims))
    return stack(as_matrices(tensors, stack_dims))


def _decomposed(
    gradient: Tensor, shapes: Mapping[str, tuple[int, int]], method: ProjectionMethod
) -> Mapping[str, Tensor]:
    """Returns bases of these shapes for a matrix; an empty mapping if the decomposition fails."""
    (_, rank), *_ = shapes.values()
    try:
        bases = find_bases(gradient, rank, method)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return {}
    return {name: bases[name] for name in shapes} if all(bool(bases[name].isfinite().all()) for name in shapes) else {}


def _is_projected(parameter: Tensor, group: dict[str, Any]) -> bool:
    return group["rank"] is not None and parameter.ndim >= 2 + group["stack_dims"]
