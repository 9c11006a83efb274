"""Adafactor's second moment, stored as the means of its rows and columns.

Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, https://arxiv.org/abs/1804.04235.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.stepping import Layout, Sum, Together

#: Names of its tensors.
TENSORS = _ROW, _COLUMN, _FULL = "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"


def moment_shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the second moment's tensors by name, for a parameter of this shape.

    With two or more dimensions it is factored over the last two: ``exp_avg_sq_row`` lacks the last dimension,
    ``exp_avg_sq_col`` the second to last. Otherwise it is ``exp_avg_sq`` of the parameter's shape.
    """
    if len(shape) < 2:
        return {_FULL: shape}
    return {_ROW: shape[:-1], _COLUMN: shape[:-2] + shape[-1:]}


def elements(name: str, shape: tuple[int, ...], options: Any = None) -> int:
    """Returns the number of elements of the tensor ``name``, 0 if a parameter of this shape does not have it."""
    # Empty parameters are never stepped and have no state, even where the mean of their rows would have elements.
    return math.prod(moment_shapes(shape).get(name, (0,))) if math.prod(shape) else 0


def moment_dims(name: str, ndim: int) -> tuple[int, ...]:
    """Returns which dimensions of a parameter the tensor ``name`` has."""
    every = tuple(range(ndim))
    return {_ROW: every[:-1], _COLUMN: every[:-2] + every[-1:]}.get(name, every)


def factored_update(
    gradients: Tensor,
    moments: Mapping[str, Tensor],
    layout: Layout,
    *,
    step: int,
    eps: float,
    clip_threshold: float,
    decay_rate: float,
    scale: float | Tensor = 1.0,
) -> Together[Tensor]:
    """Divides gradients by the root of their second moment and clips the root mean square of the result.

    Args:
        gradients: A stack of gradients, ``[B, *shape]``, float32 or float64.
        moments: Stacks of the second moment's tensors, ``[B, *moment_shape]`` with the names and shapes of
            :func:`moment_shapes`; changed in place.
        layout: How what one gradient is a part of is spread.
        step: Number of this step; the first is 1 and ignores the content of ``moments``.
        eps: Added to the squared gradients.
        clip_threshold: Largest root mean square of an update before it is scaled.
        decay_rate: The moment keeps ``1 - step**decay_rate`` of its old value.
        scale: Factor on the updates; a number, or a tensor of the shape that :func:`rms` returns.

    Returns:
        The updates, a new tensor of the gradients' shape and dtype.
    """
    update = yield from over_root(gradients, gradients.square(), moments, layout, weight=step**decay_rate, eps=eps)
    size = yield from rms(update, layout)
    return update.mul_(scale / (size / clip_threshold).clamp_(min=1.0))


def over_root(
    values: Tensor,
    squares: Tensor,
    moments: Mapping[str, Tensor],
    layout: Layout,
    *,
    weight: float,
    eps: float,
    names: tuple[str, str, str] = TENSORS,
) -> Together[Tensor]:
    """Advances a second moment by squares, and divides values by its root.

    Args:
        values: A stack ``[B, *shape]``.
        squares: What the moment averages, of the same shape; overwritten with the result.
        moments: Stacks of the moment's tensors; changed in place.
        layout: How what one value is a part of is spread.
        weight: Weight of ``squares`` in the moment.
        eps: Added to the squares.
        names: What the moment's tensors are called, in the order of :data:`TENSORS`.

    Returns:
        The quotients, in the memory of ``squares``.
    """
    row_name, column_name, full_name = names
    if full_name in moments:
        full = moments[full_name].lerp_(squares.add_(eps), weight)
        return torch.rsqrt(full, out=squares).mul_(values)
    rows, columns = layout.shape[-2:]
    own_row, own_column = Sum(squares.sum(-1), layout, (-1,)), Sum(squares.sum(-2), layout, (-2,))

    def advanced(row: Tensor) -> Tensor:
        # The mean of squares plus epsilon: epsilon is added to few numbers, not to all.
        return moments[row_name].lerp_(row.div_(columns).add_(eps), weight)

    def total_of(row: Tensor) -> Sum:
        return Sum(row.sum(-1, keepdim=True), layout, (-2,))

    if own_row.is_whole:
        # One message for both.
        row = advanced(own_row.part)
        column, total = yield [own_column, total_of(row)]
    else:
        row, column = yield [own_row, own_column]
        row = advanced(row)
        (total,) = yield [total_of(row)]
    column = moments[column_name].lerp_(column.div_(rows).add_(eps), weight)
    row_factor = (row / total.div_(rows)).rsqrt_().unsqueeze(-1)
    quotients: Tensor = torch.mul(values, row_factor, out=squares)
    return quotients.mul_(column.rsqrt().unsqueeze(-2))


def rms(stack: Tensor, layout: Layout) -> Together[Tensor]:
    """Returns the root mean squares of a nonempty stack ``[B, *shape]``: ``[B, 1, ...]`` with as many dimensions.

    ``layout`` says how what one of the stack is a part of is spread.
    """
    # In two stages: a single sum over a large matrix loses precision (6e-4 of the norm at 4096 x 4096 in float32).
    rows = torch.linalg.vector_norm(stack if stack.ndim > 1 else stack.unsqueeze(1), dim=-1)
    rows = rows.view(len(stack), math.prod(stack.shape[1:-1]))
    norms: Tensor
    (norms,) = yield [Sum(torch.linalg.vector_norm(rows, dim=1), layout, is_norm=True)]
    return (norms / math.sqrt(math.prod(layout.shape))).view(-1, *(1,) * (stack.ndim - 1))
