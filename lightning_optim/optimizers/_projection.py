"""Gradients in a low-rank subspace: its bases, into it and back.

GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, https://arxiv.org/abs/2403.03507. The randomized
bases follow Halko, Martinsson, Tropp, Finding Structure with Randomness, https://arxiv.org/abs/0909.4061, algorithms
4.4 and 5.1.

Products and decompositions run matrix by matrix: batched ones may round differently, and stepping in buckets must equal
stepping at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

ProjectionType = Literal["std", "reverse_std", "right", "left", "full"]
ProjectionMethod = Literal["svd", "randomized"]

# Oversampling and power iterations: enough for benchmarks/optimizers.py to find no difference in training.
_OVERSAMPLING, _POWER_ITERATIONS = 8, 2


def matrix_shape(shape: Sequence[int], stack_dims: int = 0) -> tuple[int, int]:
    """Returns the shape of a parameter's matrices, which its first ``stack_dims`` dimensions index.

    All dimensions after the next one are flattened: a convolution is ``[out, rest]``.
    """
    rows, *rest = shape[stack_dims:]
    return rows, math.prod(rest)


def sides(rows: int, columns: int, proj_type: ProjectionType) -> tuple[bool, bool]:
    """Returns whether a matrix is projected from the left and from the right.

    ``std`` projects the shorter side, ``reverse_std`` the longer one; of a square matrix, the right and left side.
    """
    if proj_type == "full":
        return True, True
    right = proj_type == "right" or (proj_type != "left" and (rows >= columns) == (proj_type == "std"))
    return not right, right


def low_rank_shape(shape: Sequence[int], rank: int, proj_type: ProjectionType) -> tuple[int, int]:
    """Returns the shape of one matrix's gradient in the subspace."""
    rows, columns = matrix_shape(shape)
    left, right = sides(rows, columns, proj_type)
    rank = min(rank, rows, columns)
    return rank if left else rows, rank if right else columns


def base_shapes(shape: Sequence[int], rank: int, proj_type: ProjectionType) -> dict[str, tuple[int, int]]:
    """Returns the shapes of the bases by their state keys, ``"left"`` and ``"right"``."""
    rows, columns = matrix_shape(shape)
    rank = min(rank, rows, columns)
    names = zip(("left", "right"), sides(rows, columns, proj_type), (rows, columns), strict=True)
    return {name: (side, rank) for name, projects, side in names if projects}


def find_bases(gradient: Tensor, rank: int, method: ProjectionMethod) -> dict[str, Tensor]:
    """Returns orthonormal bases of the leading singular subspaces of a matrix.

    Args:
        gradient: ``[rows, columns]``, float32 or float64, finite.
        rank: Number of directions.
        method: ``"svd"`` is exact; ``"randomized"`` is a range finder whose cost grows with the rank, not with the
            shorter side.

    Returns:
        ``"left"``: ``[rows, rank]``; ``"right"``: ``[columns, rank]``.

    Raises:
        torch.linalg.LinAlgError: If the decomposition does not converge.
    """
    rows, columns = gradient.shape
    width = rank + _OVERSAMPLING
    if method == "svd" or width >= min(rows, columns):
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        return {"left": left[:, :rank], "right": right[:rank].mT}
    found = gradient @ gaussian(0, columns, width, gradient)
    for _ in range(_POWER_ITERATIONS):
        # Orthonormalized in between, or all directions would collapse onto the first.
        found = gradient @ torch.linalg.qr(gradient.mT @ torch.linalg.qr(found)[0])[0]
    basis = torch.linalg.qr(found)[0]
    left, _, right = torch.linalg.svd(basis.mT @ gradient, full_matrices=False)
    return {"left": basis @ left[:, :rank], "right": right[:rank].mT}


def any_bases(shapes: Mapping[str, tuple[int, int]], like: Tensor) -> dict[str, Tensor]:
    """Returns random orthonormal bases of these shapes, for a gradient that determines none."""
    return {name: torch.linalg.qr(gaussian(0, side, rank, like))[0] for name, (side, rank) in shapes.items()}


def gaussian(seed: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """Returns a ``[rows, columns]`` matrix of standard normal numbers in ``like``'s dtype, on its device.

    A seed gives the same numbers on every device and in every dtype, so that a state stays valid when it is loaded on
    another device or in another dtype. The global generators are not touched.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu").to(like)


def project(gradients: Sequence[Tensor], left: Sequence[Tensor] | None, right: Sequence[Tensor] | None) -> Tensor:
    """Returns ``leftᵀ @ gradient @ right`` for each matrix, stacked; ``None`` leaves a side out."""
    if left is None:
        assert right is not None, "a projected matrix has a basis"
        return products(gradients, right)
    low = products([basis.mT for basis in left], gradients)
    return low if right is None else products(low.unbind(), right)


def products(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Returns the pairwise products of two lists of equally shaped matrices, stacked."""
    stacked = one[0].new_empty(len(one), one[0].shape[0], other[0].shape[1])
    for product, first, second in zip(stacked.unbind(), one, other, strict=True):
        torch.mm(first, second, out=product)
    return stacked
