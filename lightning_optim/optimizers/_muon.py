"""Muon and NorMuon: momentum whose every matrix is orthogonalized.

Muon: An optimizer for hidden layers in neural networks, https://kellerjordan.github.io/posts/muon/, as in
``torch.optim.Muon``; Muon is Scalable for LLM Training, https://arxiv.org/abs/2502.16982; NorMuon,
https://arxiv.org/abs/2510.05491; Cautious Weight Decay, https://arxiv.org/abs/2510.12402.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_optim._compat import kernels
from lightning_optim.errors import InvalidOption, InvalidParamGroups, listing
from lightning_optim.optimizers._base import (
    OwnOptimizer,
    compute_dtype,
    gradients,
    hyperparameters,
    to_compute_dtype,
    write_back,
)
from lightning_optim.optimizers._factored import rms
from lightning_optim.optimizers._low_rank import as_matrices
from lightning_optim.optimizers._matrices import named, refuse_vectors
from lightning_optim.optimizers._newton_schulz import iteration_dtype, orthogonalize, stack_size

#: The rule for the length of an update.
LrScale = Literal["original", "match_rms_adamw"]
#: What is made equal in an orthogonalized update.
Normalization = Literal["none", "neuron"]
#: The dtypes to orthogonalize in.
IterationDtype = Literal["bfloat16", "float32", "float64"]

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "lr_scale": get_args(LrScale),
    "normalize": get_args(Normalization),
    "ns_dtype": get_args(IterationDtype),
}
# Beside a root mean square of rows, as the authors of NorMuon have it.
_NEURON_EPS = 1e-10


class _Matrix(NamedTuple):
    """One matrix of a parameter, in views: what is changed together."""

    weight: Tensor
    gradient: Tensor
    momentum: Tensor
    #: The second moment of each row.
    rows: Tensor | None


class Muon(OwnOptimizer):
    """Momentum whose every matrix is orthogonalized: all its singular values become about 1.

    It steps matrices only, the hidden ones of a model: give biases, norms, embeddings and the output layer to another
    optimizer. A parameter with more than two dimensions (a convolution) counts as the matrix ``[out, rest]``. With
    ``stack_dims``, the leading dimensions index matrices: experts ``[E, m, n]`` are ``E`` matrices ``[m, n]`` with
    ``stack_dims=1``. With ``split``, each matrix is as many equal ones along its rows: query, key and value of a fused
    projection with ``split=3``. Each is orthogonalized, scaled and normalized by itself.

    It differs from ``torch.optim.Muon`` on purpose: on a CPU it iterates in the parameter's precision
    (``ns_dtype="bfloat16"`` is torch's); small matrices of one shape are orthogonalized as a stack; arithmetic and
    states of bfloat16 and float16 parameters are float32; parameters need not have two dimensions. With
    ``ns_dtype="bfloat16"`` and ``batched=False``, float32 matrices get the same bits.

    Args:
        params: Parameters or param groups, real, dense and with two dimensions or more; all arguments below may differ
            between groups.
        lr: Learning rate.
        momentum: Decay rate of the gradients' average.
        nesterov: Whether to orthogonalize the average of the gradient and the momentum, not the momentum itself.
        ns_steps: Newton-Schulz iterations.
        ns_coefficients: Coefficients of the iteration's polynomial.
        eps: Smallest norm to divide by before the iteration.
        weight_decay: Decoupled weight decay.
        cautious: Decay only weights that the update moves towards zero as well.
        lr_scale: Factor on the learning rate of a matrix ``[m, n]``: ``"original"`` is ``sqrt(max(1, m / n))``,
            ``"match_rms_adamw"`` is ``0.2 * sqrt(max(m, n))``, which fits learning rates of AdamW.
        normalize: ``"neuron"`` is NorMuon: each row of the update is divided by the root of its second moment, and the
            matrix scaled to the norm that it had.
        beta2: Decay rate of that second moment.
        split: How many equal matrices a matrix is, along its rows.
        stack_dims: How many leading dimensions of the group's parameters index matrices.
        ns_dtype: Dtype of the iteration; ``None`` is bfloat16 where the device multiplies that fast, else the dtype of
            the arithmetic. float64 parameters stay float64.
        batched: Whether to orthogonalize small matrices of one shape as stacks.

    Raises:
        InvalidParamGroups: If a parameter has too few dimensions, its rows cannot be split, it is complex or sharded,
            or its gradient is sparse.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        weight_decay: float = 0.1,
        cautious: bool = False,
        lr_scale: LrScale = "original",
        normalize: Normalization = "none",
        beta2: float = 0.95,
        split: int = 1,
        stack_dims: int = 0,
        ns_dtype: str | torch.dtype | None = None,
        batched: bool = True,
    ) -> None:
        super().__init__(params, _with_dtype_name(hyperparameters(locals())))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(_with_dtype_name(param_group))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        who = type(self).__name__
        for name in ("momentum", "beta2"):
            if not 0 <= group[name] < 1:
                raise InvalidOption(f"{name}={group[name]!r} of {who} is out of range: 0 <= value < 1")
        for name, allowed in _CHOICES.items():
            if group[name] not in allowed and not (name == "ns_dtype" and group[name] is None):
                raise InvalidOption(f"{name}={group[name]!r} of {who} is unknown; use one of {listing(allowed)}")
        for name, least, most in (("ns_steps", 1, 99), ("split", 1, math.inf), ("stack_dims", 0, math.inf)):
            value = group[name]
            if not (isinstance(value, Integral) and least <= int(value) <= most):
                allowed_range = f">= {least}" if most == math.inf else f"from {least} to {most}"
                raise InvalidOption(f"{name}={value!r} of {who} is not a whole number {allowed_range}")
        coefficients = group["ns_coefficients"]
        if not (
            isinstance(coefficients, (tuple, list))
            and len(coefficients) == 3
            and all(isinstance(value, Real) and math.isfinite(value) for value in coefficients)
        ):
            raise InvalidOption(f"ns_coefficients={coefficients!r} of {who} are not three numbers")
        refuse_vectors(who, group)
        for parameter, name in named(group):
            rows, split = parameter.shape[group["stack_dims"]], group["split"]
            if rows % split:
                raise InvalidParamGroups(
                    f"split={split} does not divide the {rows} rows of {name}. Set a split that does, or split=1 in a "
                    "group of its own."
                )

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        dtype, device = compute_dtype(parameter), parameter.device
        state = {"momentum_buffer": torch.zeros(parameter.shape, dtype=dtype, device=device)}
        if group["normalize"] == "neuron":
            rows = parameter.shape[: group["stack_dims"] + 1]
            state["exp_avg_sq_row"] = torch.zeros(rows, dtype=dtype, device=device)
        return state

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        weights = to_compute_dtype(parameters)
        device, dtype = weights[0].device, weights[0].dtype
        named = group["ns_dtype"]
        iterated = getattr(torch, named) if named else iteration_dtype(dtype, device)
        alike: dict[torch.Size, list[_Matrix]] = {}
        for matrix in self._matrices(parameters, weights, group):
            alike.setdefault(matrix.weight.shape, []).append(matrix)
        for shape, matrices in alike.items():
            size = stack_size(shape, iterated, device) if group["batched"] else 1
            for start in range(0, len(matrices), size):
                _step(matrices[start : start + size], size, iterated, group)
        write_back(parameters, weights)

    def _matrices(
        self, parameters: Sequence[Tensor], weights: Sequence[Tensor], group: dict[str, Any]
    ) -> Iterator[_Matrix]:
        states = [self.state[parameter] for parameter in parameters]
        momenta = [state["momentum_buffer"] for state in states]
        split, stack_dims = group["split"], group["stack_dims"]
        views: list[list[Tensor] | list[None]] = [
            _split(as_matrices(tensors, stack_dims), split) for tensors in (weights, gradients(parameters), momenta)
        ]
        if group["normalize"] == "neuron":
            moments = (state["exp_avg_sq_row"] for state in states)
            rows = [row for each in moments for row in each.view(-1, each.shape[-1]).unbind()]
            views.append(_split(rows, split))
        else:
            views.append([None] * len(views[0]))
        return (_Matrix(*each) for each in zip(*views, strict=True))


class NorMuon(Muon):
    """:class:`Muon` with ``normalize="neuron"``: each neuron's updates have the same length over time.

    Its states do not fit those of plain Muon, so they have a format of their own. Arguments and errors are Muon's.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        weight_decay: float = 0.1,
        cautious: bool = False,
        lr_scale: LrScale = "original",
        beta2: float = 0.95,
        split: int = 1,
        stack_dims: int = 0,
        ns_dtype: str | torch.dtype | None = None,
        batched: bool = True,
    ) -> None:
        super().__init__(params, normalize="neuron", **hyperparameters(locals()))


def _step(matrices: Sequence[_Matrix], size: int, dtype: torch.dtype, group: Mapping[str, Any]) -> None:
    """Steps at most ``size`` matrices of one shape, which are orthogonalized together in ``dtype``."""
    weights, given, momenta, rows = (list(views) for views in zip(*matrices, strict=True))
    kernels.foreach_lerp_(momenta, given, 1 - group["momentum"])
    update = orthogonalize(
        kernels.foreach_lerp(given, momenta, group["momentum"]) if group["nesterov"] else momenta,
        size=size,
        dtype=dtype,
        steps=group["ns_steps"],
        coefficients=group["ns_coefficients"],
        eps=group["eps"],
    ).to(weights[0].dtype)
    if group["normalize"] == "neuron":
        update = _normalized(update, rows, group["beta2"])
    updates = list(update[: len(weights)].unbind())
    lr = float(group["lr"])
    _decay(weights, updates, lr * group["weight_decay"], cautious=group["cautious"])
    kernels.foreach_add_(weights, updates, alpha=-lr * scale(weights[0].shape, group["lr_scale"]))


def _normalized(update: Tensor, rows: Sequence[Tensor], beta2: float) -> Tensor:
    """Advances the second moments of the rows of a stack, which may be shorter, and divides by their roots."""
    update = update.contiguous()
    moments = update.new_zeros(update.shape[:2])
    known = list(moments[: len(rows)].unbind())
    kernels.foreach_copy_(known, list(rows))
    moments.lerp_(update.square().mean(-1), 1 - beta2)
    kernels.foreach_copy_(list(rows), known)
    normalized = update / moments.sqrt().add_(_NEURON_EPS).unsqueeze(-1)
    return normalized.mul_(rms(update) / rms(normalized).add_(_NEURON_EPS))


def _decay(weights: list[Tensor], updates: Sequence[Tensor], rate: float, *, cautious: bool) -> None:
    if not cautious:
        kernels.foreach_mul_(weights, 1 - rate)
        return
    for weight, update in zip(weights, updates, strict=True):
        # The update is subtracted: where the signs agree it moves the weight towards zero.
        agree = (weight * update).ge_(0)
        weight.addcmul_(weight, agree, value=-rate)


def scale(shape: Sequence[int], rule: LrScale) -> float:
    """Returns the factor on the learning rate of a matrix of this shape."""
    rows, columns = shape
    return 0.2 * math.sqrt(max(rows, columns)) if rule == "match_rms_adamw" else math.sqrt(max(1.0, rows / columns))


def _split(tensors: list[Tensor], count: int) -> list[Tensor]:
    return tensors if count == 1 else [piece for tensor in tensors for piece in tensor.chunk(count)]


def _with_dtype_name(group: dict[str, Any]) -> dict[str, Any]:
    """Returns the group with a plain string for a dtype, for state dicts."""
    value = group.get("ns_dtype")
    return group if value is None else {**group, "ns_dtype": str(value).removeprefix("torch.")}
