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

from lightning_optim.stepping import Layout, Sum, Together

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


def find_bases(
    gradient: Tensor, rank: int, method: ProjectionMethod, layout: Layout | None = None
) -> Together[dict[str, Tensor]]:
    """Returns orthonormal bases of the leading singular subspaces of a matrix.

    No process has a whole matrix: what is sent is as wide as a basis.

    Args:
        gradient: ``[rows, columns]``, float32 or float64, finite; of a sharded one this process's part.
        rank: Number of directions.
        method: ``"svd"`` is exact; ``"randomized"`` is a range finder whose cost grows with the rank, not with the
            shorter side. Only that one takes a part.
        layout: How the matrix is spread; ``None`` if it is whole.

    Returns:
        ``"left"``: ``[rows, rank]``; ``"right"``: ``[columns, rank]``; of a sharded matrix, the rows of this process.

    Raises:
        torch.linalg.LinAlgError: If the decomposition does not converge.
    """
    layout = Layout(tuple(gradient.shape)) if layout is None else layout
    rows, columns = layout.shape
    width = min(rank + _OVERSAMPLING, rows, columns)
    if method == "svd" or (width == min(rows, columns) and not layout.splitting()):
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        bases = {"left": left[:, :rank], "right": right[:rank].mT}
        return bases if method == "svd" else (yield from _signed(bases, layout))
    found = yield from _product(gradient, layout.entries(gaussian(0, columns, width, gradient), 1), layout, 1)
    for _ in range(_POWER_ITERATIONS):
        # Orthonormalized in between, or all directions would collapse onto the first.
        basis, _ = yield from _orthonormal(found, layout, 0)
        found, _ = yield from _orthonormal((yield from _product(gradient.mT, basis, layout, 0)), layout, 1)
        found = yield from _product(gradient, found, layout, 1)
    basis, _ = yield from _orthonormal(found, layout, 0)
    seen = yield from _product(gradient.mT, basis, layout, 0)
    if layout.splitting((1,)):
        other, triangle = yield from _orthonormal(seen, layout, 1)
        left, _, right = torch.linalg.svd(triangle.mT, full_matrices=False)
        bases = {"left": basis @ left[:, :rank], "right": other @ right[:rank].mT}
    else:
        left, _, right = torch.linalg.svd(seen.mT, full_matrices=False)
        bases = {"left": basis @ left[:, :rank], "right": right[:rank].mT}
    return (yield from _signed(bases, layout))


def _product(one: Tensor, other: Tensor, layout: Layout, over: int) -> Together[Tensor]:
    """Returns the product of matrices whose common dimension is the dimension ``over`` of a layout."""
    product: Tensor
    (product,) = yield [Sum(one @ other, layout, (over,))]
    return product


def _orthonormal(matrix: Tensor, layout: Layout, dim: int) -> Together[tuple[Tensor, Tensor]]:
    """Returns the QR decomposition of a matrix whose rows are spread as a dimension of a layout is.

    Each process decomposes its rows, and all decompose the triangles (TSQR, https://arxiv.org/abs/0808.2664).
    """
    basis, triangle = torch.linalg.qr(matrix)
    if not layout.splitting((dim,)):
        return basis, triangle
    own, processes = layout.place(dim)
    width = matrix.shape[1]
    triangles = matrix.new_zeros(processes, width, width)
    triangles[own, : len(triangle)] = triangle
    (triangles,) = yield [Sum(triangles, layout, (dim,))]
    parts, triangle = torch.linalg.qr(triangles.view(-1, width))
    return basis @ parts[own * width :][: basis.shape[1]], triangle


def _signed(bases: dict[str, Tensor], layout: Layout) -> Together[dict[str, Tensor]]:
    """Returns bases whose vectors have signs that the matrix decides, not the way they were found."""
    right = bases["right"]
    direction = layout.entries(gaussian(1, layout.shape[1], 1, right), 1)
    (along,) = yield [Sum((right * direction).sum(0), layout, (1,))]
    signs = torch.where(along < 0, -1.0, 1.0).to(right.dtype)
    return {name: basis * signs for name, basis in bases.items()}


def any_bases(shapes: Mapping[str, tuple[int, int]], like: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Returns random orthonormal bases of these shapes, this process's rows, for a gradient that determines none."""
    rows = {"left": 0, "right": 1}
    return {
        name: layout.entries(torch.linalg.qr(gaussian(0, side, rank, like))[0], rows[name])
        for name, (side, rank) in shapes.items()
    }


def gaussian(seed: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """Returns a ``[rows, columns]`` matrix of standard normal numbers in ``like``'s dtype, on its device.

    A seed gives the same numbers on every device and in every dtype, so that a state stays valid when it is loaded on
    another device or in another dtype. The global generators are not touched.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu").to(like)


def project(
    gradients: Sequence[Tensor], left: Sequence[Tensor] | None, right: Sequence[Tensor] | None, layout: Layout
) -> Together[Tensor]:
    """Returns ``leftᵀ @ gradient @ right`` for each matrix, stacked; ``None`` leaves a side out.

    ``layout`` is that of one matrix.
    """
    if left is None:
        assert right is not None, "a projected matrix has a basis"
        low, over = products(gradients, right), [1]
    else:
        low, over = products([basis.mT for basis in left], gradients), [0]
        if right is not None:
            low, over = products(low.unbind(), right), [0, 1]
    whole: Tensor
    (whole,) = yield [Sum(low, layout, over)]
    return whole


def products(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Returns the pairwise products of two lists of equally shaped matrices, stacked."""
    stacked = one[0].new_empty(len(one), one[0].shape[0], other[0].shape[1])
    for product, first, second in zip(stacked.unbind(), one, other, strict=True):
        torch.mm(first, second, out=product)
    return stacked
