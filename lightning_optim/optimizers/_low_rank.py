"""What GaLore and APOLLO share: which parameters are projected, when, and what happens if that fails."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_optim._compat import kernels
from lightning_optim.errors import InvalidOption, InvalidParamGroups, listing
from lightning_optim.optimizers._adamw import adamw_update
from lightning_optim.optimizers._base import OwnOptimizer, compute_dtype, gradients, to_compute_dtype, write_back
from lightning_optim.optimizers._matrices import as_matrices, as_matrix, low_rank, refuse_split_inside
from lightning_optim.optimizers._projection import (
    ProjectionMethod,
    ProjectionType,
    any_bases,
    base_shapes,
    find_bases,
    low_rank_shape,
    matrix_shape,
    project,
    sides,
)
from lightning_optim.optimizers._stacks import batches, stacked
from lightning_optim.stepping import Layout, Sum, Together, Update, add_up, alone, is_sharded, local, side_by_side

#: The dtype of moments and bases; ``"parameter"`` means the parameter's dtype.
StateDtype = Literal["float32", "parameter"]
#: Why moments in 8 bits take whole parameters.
BLOCKS_WOULD_MOVE = "blocks that share a scale would begin elsewhere with each number of processes"
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

    def _step_plainly(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> Update | None:
        """Steps parameters that are not projected."""
        raise NotImplementedError

    def _step_projected(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> Update:
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

        Of a sharded parameter it is this process's part: those of all shards add up. ``None`` if it is not projected,
        or by a random matrix, which keeps the norm on average whatever the gradient.
        """
        state = self.state.get(parameter, {})
        if parameter.grad is None or not ("left" in state or "right" in state):
            return None
        with self.as_parts([parameter]) as (part,):
            return alone(self._captured(part, group["stack_dims"]))

    def _captured(self, parameter: Tensor, stack_dims: int) -> Together[Tensor]:
        state, layout = self.state[parameter], as_matrix(self.layout(parameter), stack_dims)
        left, right = (
            as_matrices(to_compute_dtype([state[name]]), stack_dims) if name in state else None
            for name in ("left", "right")
        )
        low = yield from project(as_matrices(gradients([parameter]), stack_dims), left, right, layout)
        subspace = low_rank(layout, left is not None, right is not None, low.shape[1:])
        squares: Tensor
        (squares,) = yield [Sum(low.square().sum(), subspace)]
        return squares / self.layout(parameter).parts()

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for name, allowed in self.choices.items():
            if group[name] not in allowed:
                raise InvalidOption(
                    f"{name}={group[name]!r} of {type(self).__name__} is unknown; use one of {listing(allowed)}",
                    code="LO207",
                )
        for name, least in (("rank", 1), ("update_proj_gap", 1), ("stack_dims", 0)):
            value = group[name]
            if not (isinstance(value, Integral) and int(value) >= least) and not (name == "rank" and value is None):
                raise InvalidOption(
                    f"{name}={value!r} of {type(self).__name__} is not a whole number >= {least}", code="LO204"
                )
        if group["rank"] is not None:
            self._check_shards(group)

    def _check_shards(self, group: dict[str, Any]) -> None:
        who, sharded = type(self).__name__, [p for p in group["params"] if is_sharded(p) and _is_projected(p, group)]
        if not sharded:
            return
        for name in ("proj", "projection"):
            if group.get(name) == "svd":
                remedy = "randomized" if name == "projection" else "random"
                raise InvalidOption(
                    f"{name}='svd' of {who} takes a whole gradient, and parameters are sharded (DTensor): use "
                    f"{name}='{remedy}'",
                    code="LO216",
                )
        if group["proj_type"] == "full":
            # Beside the diagonal it is rounding, whose signs AdamW steps by.
            raise InvalidOption(
                f"proj_type='full' of {who} rounds differently on each number of processes, and parameters are sharded "
                "(DTensor): use proj_type='std'",
                code="LO216",
            )
        if group["stack_dims"]:
            raise InvalidParamGroups(
                f"{who} cannot step stacks of matrices (stack_dims={group['stack_dims']}) that are sharded (DTensor). "
                "Use optim='adamw_torch' for them, or a strategy that does not shard.",
                code="LO322",
            )
        for parameter in sharded:
            refuse_split_inside(who, parameter)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # Missing in older checkpoints.
            group.setdefault("state_dtype", "float32")
            group.setdefault("stack_dims", 0)

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        if not _is_projected(parameter, group):
            return {"skipped": 0, **self._initial_moments(parameter, tuple(parameter.shape), group)}
        counts = parameter.shape[: group["stack_dims"]]
        shape = *counts, *self._low_rank(parameter, group).local_shape
        found = [False] * math.prod(counts) if counts else False
        return {"skipped": 0, "kept": 0, "found": found, **self._initial_moments(parameter, shape, group)}

    def _low_rank(self, parameter: Tensor, group: dict[str, Any]) -> Layout:
        """Returns how the gradient of one of a parameter's matrices is spread in the subspace."""
        layout, proj_type = as_matrix(self.layout(parameter), group["stack_dims"]), group["proj_type"]
        shape = low_rank_shape(layout.shape, group["rank"], proj_type)
        rows, columns = layout.shape
        return low_rank(layout, *sides(rows, columns, proj_type), shape)

    def _dims(self, name: str, parameter: Tensor, value: Tensor) -> Sequence[int | None]:
        group = next(group for group in self.param_groups if any(p is self.origin(parameter) for p in group["params"]))
        if not _is_projected(parameter, group):
            return self._moment_dims(name, range(parameter.ndim))
        first = group["stack_dims"]
        matrix: tuple[int | None, int | None] = first, first + 1 if parameter.ndim == first + 2 else None
        if name in ("left", "right"):
            return *range(first), matrix[name == "right"], None
        rows, columns = as_matrix(self.layout(parameter), first).shape
        left, right = sides(rows, columns, group["proj_type"])
        return self._moment_dims(name, (*range(first), None if left else matrix[0], None if right else matrix[1]))

    def _moment_dims(self, name: str, dims: Sequence[int | None]) -> Sequence[int | None]:
        """Returns which dimensions of a parameter a state tensor follows, of gradients that follow ``dims``."""
        return dims

    def _steppable(self, parameters: list[Tensor]) -> list[Tensor]:
        found = [local(parameter.grad) for parameter in parameters]
        layouts = list(map(Layout.of, parameters))
        # Summed over the processes, for which another one's part is not finite, either. One synchronization for all.
        norms = add_up(list(map(Sum, kernels.foreach_norm(found), layouts)))
        device = norms[0].device
        if bool(torch.stack([norm if norm.device == device else norm.to(device) for norm in norms]).isfinite().all()):
            return parameters
        # A norm may overflow where the gradient is finite.
        wrong = add_up([Sum((~each.isfinite()).sum(), layout) for each, layout in zip(found, layouts, strict=True)])
        skipped = [parameter for parameter, count in zip(parameters, wrong, strict=True) if count]
        for parameter in skipped:
            state = self.state[parameter]
            state["skipped"] = state.get("skipped", 0) + 1
        if skipped:
            count = max(self.state[parameter]["skipped"] for parameter in skipped)
            self._warn_rarely(f"{len(skipped)} parameters with non-finite gradients were not stepped", count)
        # By identity: a tensor compares its elements.
        kept = {id(parameter) for parameter in parameters} - {id(parameter) for parameter in skipped}
        return [parameter for parameter in parameters if id(parameter) in kept]

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> Update:
        projected: list[Tensor] = []
        others: list[Tensor] = []
        for parameter in parameters:
            (projected if _is_projected(parameter, group) else others).append(parameter)

        def shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
            bases = base_shapes(shape, group["rank"], group["proj_type"])
            return matrix_shape(shape), low_rank_shape(shape, group["rank"], group["proj_type"]), *bases.values()

        if group["stack_dims"]:
            found = [[parameter] for parameter in projected]
        else:
            found = [batch for batch, _ in batches(projected, shapes, self.layout)]
        yield from side_by_side(
            update
            for update in (
                self._step_plainly(others, step, group),
                *(self._step_projected(batch, step, group) for batch in found),
            )
            if update is not None
        )

    def _bases(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: int, group: dict[str, Any]
    ) -> Together[tuple[list[Tensor] | None, list[Tensor] | None]]:
        """Returns the left and right bases for parameters of one shape; finds new ones from ``gradients`` when due.

        ``gradients`` are matrices, as many per parameter as its stack has.
        """
        layout = as_matrix(self.layout(parameters[0]), group["stack_dims"])
        shapes = base_shapes(layout.shape, group["rank"], group["proj_type"])
        due = (step - 1) % group["update_proj_gap"] == 0
        each = len(gradients) // len(parameters)
        for index, parameter in enumerate(parameters):
            found = gradients[index * each : (index + 1) * each]
            yield from self._search(parameter, found, layout, shapes, group, due=due)
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
        layout: Layout,
        shapes: Mapping[str, tuple[int, int]],
        group: dict[str, Any],
        *,
        due: bool,
    ) -> Update:
        """Finds bases of these shapes for a parameter's matrices: for all if ``due``, else for those without one."""
        state = self.state[parameter]
        counts = parameter.shape[: group["stack_dims"]]
        found = list(state["found"]) if counts else [state.get("found", False)]
        complete = shapes.keys() <= state.keys()
        bases = {name: dict[int, Tensor]() for name in shapes}
        for index, gradient in enumerate(gradients):
            if not due and complete and found[index]:
                continue
            (nonzero,) = yield [Sum(gradient.count_nonzero(), layout)]
            found[index] = bool(nonzero)  # if zero, the next step tries again
            chosen: Mapping[str, Tensor] = {}
            if found[index]:
                chosen = yield from _decomposed(gradient, layout, shapes, group["projection"])
            if found[index] and not chosen:
                state["kept"] = state.get("kept", 0) + 1
                self._warn_rarely("the decomposition of a gradient failed; its last projection stays", state["kept"])
            if not chosen and not complete:
                chosen = any_bases(shapes, gradient, layout)
            for name, basis in chosen.items():
                bases[name][index] = basis
        state["found"] = found if counts else found[0]
        for name, by_index in bases.items():
            if by_index:
                rows = len(next(iter(by_index.values())))
                shape = (*counts, rows, shapes[name][1])
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
                "round to 0 in float16. Use state_dtype='float32', or bfloat16 parameters (precision='bf16-true')",
                code="LO215",
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


def _decomposed(
    gradient: Tensor, layout: Layout, shapes: Mapping[str, tuple[int, int]], method: ProjectionMethod
) -> Together[Mapping[str, Tensor]]:
    """Returns bases of these shapes for a matrix; an empty mapping if the decomposition fails."""
    (_, rank), *_ = shapes.values()
    try:
        bases = yield from find_bases(gradient, rank, method, layout)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return {}
    wrong = yield [Sum((~bases[name].isfinite()).sum(), layout) for name in shapes]
    return {} if any(map(bool, wrong)) else {name: bases[name] for name in shapes}


def _is_projected(parameter: Tensor, group: dict[str, Any]) -> bool:
    return group["rank"] is not None and parameter.ndim >= 2 + group["stack_dims"]
