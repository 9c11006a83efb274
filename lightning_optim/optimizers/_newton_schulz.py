"""Orthogonalization of matrices by a Newton-Schulz iteration, many matrices of one shape as one stack.

Muon: An optimizer for hidden layers in neural networks, https://kellerjordan.github.io/posts/muon/.

A product of stacks may round differently with the stack's size, and with the place of a matrix in it. Stepping in
buckets must equal stepping at once, so a stack has a size that only the shape of its matrices decides
(:func:`stack_size`), is filled up with zeros, and all that is stacked is aligned. ``benchmarks/muon.py`` shows where
bits change without that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim._compat import kernels

# How many elements a stack has at most, by device; a larger matrix stands alone. On a CPU products of larger matrices
# gain nothing from a stack, and on others they keep the device busy by themselves.
_CPU, _OTHERS = 2**12, 2**21
# Most matrices of a stack: where there are fewer, the rest of it is computed in vain.
_MOST = 16
# Bytes. Kernels choose their path by alignment.
_ALIGNMENT = 64


def stack_size(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> int:
    """Returns how many matrices of this shape are orthogonalized together; 1 means each by itself."""
    short, long = sorted(shape)
    if any(size * dtype.itemsize % _ALIGNMENT for size in (short * long, short * short)):
        return 1
    return min(_MOST, max(1, (_CPU if device.type == "cpu" else _OTHERS) // (short * long)))


def iteration_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype to iterate in, for matrices of this dtype: bfloat16 where the device multiplies it fast.

    ``dtype`` is a compute dtype; float64 stays float64.
    """
    return torch.bfloat16 if dtype is torch.float32 and _likes_bfloat16(device) else dtype


def orthogonalize(
    matrices: Sequence[Tensor],
    *,
    size: int,
    dtype: torch.dtype,
    steps: int,
    coefficients: Sequence[float],
    eps: float,
) -> Tensor:
    """Returns matrices with the same singular vectors, and singular values near 1.

    Args:
        matrices: At most ``size`` matrices of one shape.
        size: What :func:`stack_size` says for them, or 1.
        dtype: What to iterate in.
        steps: Number of iterations.
        coefficients: Those of the odd polynomial of degree five that an iteration applies to the singular values.
        eps: Smallest norm to divide by.

    Returns:
        ``[size, rows, columns]`` in ``dtype``, not contiguous if they have more rows than columns. What is left of
        ``size`` is zero.
    """
    if size == 1:
        (matrix,) = matrices
        return _iterate(matrix, dtype, steps, coefficients, eps).unsqueeze(0)
    stack = matrices[0].new_zeros(size, *matrices[0].shape, dtype=dtype)
    kernels.foreach_copy_(list(stack[: len(matrices)].unbind()), list(matrices))
    return _iterate(stack, dtype, steps, coefficients, eps)


def _iterate(given: Tensor, dtype: torch.dtype, steps: int, coefficients: Sequence[float], eps: float) -> Tensor:
    a, b, c = coefficients
    # The shorter side first: products of the smaller kind, [rows, rows].
    turned = given.shape[-2] > given.shape[-1]
    rounded = given.to(dtype)
    found = rounded.mT if turned else rounded
    add_product = torch.addmm if given.ndim == 2 else torch.baddbmm
    norm = found.norm() if given.ndim == 2 else torch.linalg.vector_norm(found, dim=(-2, -1), keepdim=True)
    # No singular value above 1, so that the iteration does not diverge. Not in place: it may be the state.
    found = found / norm.clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.mT
        found = add_product(found, add_product(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if turned else found


def _likes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        # Before Ampere, NVIDIA's matrix units do not know it.
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type in ("xpu", "npu", "xla")
