"""SOAP: Adam in the slowly changing eigenbasis of Shampoo's preconditioner.

SOAP: Improving and Stabilizing Shampoo using Adam, https://arxiv.org/abs/2409.11321.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_optim.errors import InvalidOption
from lightning_optim.optimizers._adamw import adamw_update
from lightning_optim.optimizers._base import (
    OwnOptimizer,
    compute_dtype,
    gradients,
    hyperparameters,
    to_compute_dtype,
    write_back,
)
from lightning_optim.optimizers._matrices import as_matrices
from lightning_optim.optimizers._projection import matrix_shape

# For each side of a matrix, what its state calls the average of outer products, and its eigenvectors.
_SIDES = (("gram_left", "left"), ("gram_right", "right"))


class SOAP(OwnOptimizer):
    """SOAP: AdamW in the eigenbases of the averages of ``G @ G.T`` and ``G.T @ G``.

    The eigenbases are refreshed every ``precondition_frequency`` steps, by one power iteration and a QR decomposition.
    In between, AdamW's second moment is that of the rotated gradients. A parameter with more than two dimensions (a
    convolution) counts as the matrix ``[out, rest]``; with ``stack_dims``, leading dimensions index matrices: experts
    ``[E, m, n]`` are ``E`` matrices with ``stack_dims=1``. A side longer than ``max_precondition_dim`` keeps its axes.
    Vectors, and matrices both of whose sides are longer, are stepped by AdamW.

    As in the authors' code, the first step of a matrix only sets its bases, and does not move it. It differs from that
    code on purpose: epsilon is added to the bias-corrected denominator, as in ``torch.optim.AdamW``; arithmetic and
    states of bfloat16 and float16 parameters are float32; a convolution is one matrix.

    Args:
        params: Parameters or param groups, real, dense and not sharded.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        shampoo_beta: Decay rate of the averages of outer products; ``None`` is ``betas[1]``.
        precondition_frequency: Steps between two refreshes of the eigenbases.
        max_precondition_dim: Longest side with an eigenbasis.
        stack_dims: How many leading dimensions of the group's parameters index matrices.

    Raises:
        InvalidOption: If a frequency, a dimension or a decay rate is out of range.
        InvalidParamGroups: If a parameter is complex or sharded, or its gradient sparse.
    """

    unsharded: ClassVar[str] = "its preconditioners take whole matrices"

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        shampoo_beta: float | None = None,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 10000,
        stack_dims: int = 0,
    ) -> None:
        super().__init__(params, hyperparameters(locals()))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for name, least in (("precondition_frequency", 1), ("max_precondition_dim", 1), ("stack_dims", 0)):
            if not (isinstance(group[name], Integral) and int(group[name]) >= least):
                raise InvalidOption(f"{name}={group[name]!r} of SOAP is not a whole number >= {least}", code="LO204")
        if group["shampoo_beta"] is not None and not 0 <= group["shampoo_beta"] < 1:
            raise InvalidOption(
                f"shampoo_beta={group['shampoo_beta']!r} of SOAP is out of range: 0 <= value < 1", code="LO204"
            )

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        shapes = state_shapes(tuple(parameter.shape), group["max_precondition_dim"], group["stack_dims"])
        dtype, device = compute_dtype(parameter), parameter.device
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        plain = [parameter for parameter in parameters if not _bases(self.state[parameter])]
        values = to_compute_dtype(plain)
        adamw_update(
            values,
            gradients(plain),
            *([self.state[parameter][name] for parameter in plain] for name in ("exp_avg", "exp_avg_sq")),
            step=step,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        write_back(plain, values)
        for parameter in parameters:
            if not _bases(self.state[parameter]):
                continue
            values = to_compute_dtype([parameter])
            for matrix in _matrices(values, gradients([parameter]), self.state[parameter], group["stack_dims"]):
                _step(matrix, step, group)
            write_back([parameter], values)


class _Side(NamedTuple):
    """One side of a matrix, in views."""

    #: The average of outer products.
    gram: Tensor
    #: Its eigenvectors, as columns.
    basis: Tensor


class _Matrix(NamedTuple):
    """One matrix of a parameter, in views: what is changed together."""

    weight: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    left: _Side | None
    right: _Side | None

    def rotated(self, matrix: Tensor) -> Tensor:
        """Returns a matrix in the eigenbases."""
        matrix = matrix if self.left is None else self.left.basis.mT @ matrix
        return matrix if self.right is None else matrix @ self.right.basis

    def back(self, matrix: Tensor) -> Tensor:
        """Returns what :meth:`rotated` has taken from."""
        matrix = matrix if self.left is None else self.left.basis @ matrix
        return matrix if self.right is None else matrix @ self.right.basis.mT


def state_shapes(shape: tuple[int, ...], longest: int, stack_dims: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the state's tensors by name, for a parameter of this shape.

    ``longest`` is the longest side with an eigenbasis.
    """
    sides = matrix_shape(shape, stack_dims) if len(shape) >= 2 + stack_dims else (math.inf, math.inf)
    squares = {
        name: (*shape[:stack_dims], int(side), int(side))
        for names, side in zip(_SIDES, sides, strict=True)
        for name in names
        if side <= longest
    }
    return {"exp_avg": shape, "exp_avg_sq": shape, **squares}


def _bases(state: Mapping[str, Any]) -> bool:
    """Whether a parameter with this state has eigenbases."""
    return any(basis in state for _, basis in _SIDES)


def _matrices(
    weights: Sequence[Tensor], given: Sequence[Tensor], state: Mapping[str, Tensor], stack_dims: int
) -> Iterator[_Matrix]:
    """Yields the matrices of one parameter."""
    kept = ([state[name]] for name in ("exp_avg", "exp_avg_sq"))
    views = [as_matrices(tensors, stack_dims) for tensors in (weights, given, *kept)]
    sides = [
        [_Side(*each) for each in zip(*(as_matrices([state[name]], stack_dims) for name in names), strict=True)]
        if names[0] in state
        else [None] * len(views[0])
        for names in _SIDES
    ]
    return (_Matrix(*each) for each in zip(*views, *sides, strict=True))


def _step(matrix: _Matrix, step: int, group: Mapping[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    gradient, lr = matrix.gradient, float(group["lr"])
    if step > 1:
        matrix.exp_avg.lerp_(gradient, 1 - beta1)
        matrix.exp_avg_sq.lerp_(matrix.rotated(gradient).square_(), 1 - beta2)
        # The first step was none.
        root = matrix.exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2 ** (step - 1))).add_(group["eps"])
        update = matrix.back(matrix.rotated(matrix.exp_avg).div_(root))
        if group["weight_decay"]:
            matrix.weight.mul_(1 - lr * group["weight_decay"])
        matrix.weight.add_(update, alpha=-lr / (1 - beta1 ** (step - 1)))
    weight = 1 - (beta2 if group["shampoo_beta"] is None else group["shampoo_beta"])
    for dim, side in enumerate((matrix.left, matrix.right)):
        if side is None:
            continue
        side.gram.lerp_(gradient @ gradient.mT if dim == 0 else gradient.mT @ gradient, weight)
        if step == 1:
            # The largest eigenvalues first.
            side.basis.copy_(torch.linalg.eigh(side.gram).eigenvectors.flip(1))
        elif (step - 1) % group["precondition_frequency"] == 0:
            _refresh(side, matrix.exp_avg_sq, dim)


def _refresh(side: _Side, exp_avg_sq: Tensor, dim: int) -> None:
    """Brings a basis closer to the eigenvectors of its average, by one power iteration; the second moment follows."""
    powered = side.gram @ side.basis
    order = (side.basis * powered).sum(0).argsort(descending=True, stable=True)
    exp_avg_sq.copy_(exp_avg_sq.index_select(dim, order))
    side.basis.copy_(torch.linalg.qr(powered.index_select(1, order)).Q)
