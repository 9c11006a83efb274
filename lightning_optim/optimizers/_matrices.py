"""Parameters as matrices: which ones are refused, and how the matrices and their low-rank images are spread."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_optim.errors import InvalidParamGroups
from lightning_optim.optimizers._projection import matrix_shape
from lightning_optim.optimizers._stacks import stack
from lightning_optim.stepping import MEMBERS, Layout


def named(group: Mapping[str, Any]) -> Iterator[tuple[Tensor, str]]:
    """Yields the parameters of a group, each with what to call it in an error."""
    members = group.get(MEMBERS, ())
    for index, parameter in enumerate(group["params"]):
        shape = tuple(parameter.shape)
        known = index < len(members)
        yield parameter, f"{members[index]!r} of shape {shape}" if known else f"a parameter of shape {shape}"


def refuse_vectors(who: str, group: Mapping[str, Any]) -> None:
    """Raises :class:`InvalidParamGroups` for the first parameter that is no matrix, and no stack of them."""
    stack_dims = group["stack_dims"]
    for parameter, name in named(group):
        if parameter.ndim < 2 + stack_dims:
            stacks = f" with stack_dims={stack_dims}" if stack_dims else ""
            raise InvalidParamGroups(
                f"{who} steps matrices and cannot step {name}{stacks}: it takes {2 + stack_dims} dimensions or more. "
                "Give it to another optimizer, such as torch.optim.AdamW.",
                code="LO322",
            )
        refuse_split_inside(who, parameter, stack_dims)


def refuse_split_inside(who: str, parameter: Tensor, stack_dims: int = 0) -> None:
    """Raises :class:`InvalidParamGroups` for a parameter with flattened dimensions that processes split."""
    flattened = range(stack_dims + 1, parameter.ndim)
    if len(flattened) > 1 and Layout.of(parameter).splitting(flattened):
        raise InvalidParamGroups(
            f"{who} flattens the last {len(flattened)} dimensions of a parameter of shape {tuple(parameter.shape)}, "
            "and they are sharded. Shard its first dimension (fully_shard does unless told otherwise), or use "
            "optim='adamw_torch'.",
            code="LO322",
        )


def as_matrix(layout: Layout, stack_dims: int = 0) -> Layout:
    """Returns how each of a parameter's matrices is spread, see :func:`as_matrices`."""
    flattened = len(layout.shape) > stack_dims + 2
    return layout.followed((stack_dims, None if flattened else stack_dims + 1), matrix_shape(layout.shape, stack_dims))


def low_rank(layout: Layout, left: bool, right: bool, shape: Sequence[int]) -> Layout:
    """Returns how a matrix is spread in its subspace of this shape, projected from the left, the right or both."""
    return layout.followed((None if left else 0, None if right else 1), shape)


def as_matrices(tensors: Iterable[Tensor], stack_dims: int = 0) -> list[Tensor]:
    """Returns views of contiguous tensors as matrices, which the first ``stack_dims`` dimensions index."""
    if not stack_dims:
        return [tensor if tensor.ndim == 2 else tensor.view(matrix_shape(tensor.shape)) for tensor in tensors]
    return [matrix for tensor in tensors for matrix in as_stack([tensor], stack_dims).unbind()]


def as_stack(tensors: Sequence[Tensor], stack_dims: int = 0) -> Tensor:
    """Returns the matrices of contiguous tensors of one shape as one tensor; a view if there is only one."""
    if len(tensors) == 1:
        (tensor,) = tensors
        return tensor.view(math.prod(tensor.shape[:stack_dims]), *matrix_shape(tensor.shape, stack_dims))
    return stack(as_matrices(tensors, stack_dims))
