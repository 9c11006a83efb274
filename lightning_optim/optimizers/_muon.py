"""Muon and NorMuon: momentum whose every matrix is orthogonalized.

Muon: An optimizer for hidden layers in neural networks, https://kellerjordan.github.io/posts/muon/, as in
``torch.optim.Muon``; Muon is Scalable for LLM Training, https://arxiv.org/abs/2502.16982; NorMuon,
https://arxiv.org/abs/2510.05491; Cautious Weight Decay, https://arxiv.org/abs/2510.12402.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, get_args

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
from lightning_optim.optimizers._matrices import as_matrices, named, refuse_vectors
from lightning_optim.optimizers._newton_schulz import iteration_dtype, orthogonalize, stack_size
from lightning_optim.optimizers._projection import matrix_shape
from lightning_optim.stepping import Deal, Layout, Sum, Together, Update, as_group, side_by_side

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
        InvalidParamGroups: If a parameter has too few dimensions, its rows cannot be split, it is complex,
            or its gradient is sparse.
    """

    sharded: ClassVar[bool] = True

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
        super().add_param_group(_with_dtype_name(as_group(param_group)))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        who = type(self).__name__
        for name in ("momentum", "beta2"):
            if not 0 <= group[name] < 1:
                raise InvalidOption(f"{name}={group[name]!r} of {who} is out of range: 0 <= value < 1", code="LO204")
        for name, allowed in _CHOICES.items():
            if group[name] not in allowed and not (name == "ns_dtype" and group[name] is None):
                raise InvalidOption(
                    f"{name}={group[name]!r} of {who} is unknown; use one of {listing(allowed)}", code="LO207"
                )
        for name, least, most in (("ns_steps", 1, 99), ("split", 1, math.inf), ("stack_dims", 0, math.inf)):
            value = group[name]
            if not (isinstance(value, Integral) and least <= int(value) <= most):
                allowed_range = f">= {least}" if most == math.inf else f"from {least} to {most}"
                raise InvalidOption(f"{name}={value!r} of {who} is not a whole number {allowed_range}", code="LO204")
        coefficients = group["ns_coefficients"]
        if not (
            isinstance(coefficients, (tuple, list))
            and len(coefficients) == 3
            and all(isinstance(value, Real) and math.isfinite(value) for value in coefficients)
        ):
            raise InvalidOption(f"ns_coefficients={coefficients!r} of {who} are not three numbers", code="LO203")
        refuse_vectors(who, group)
        for parameter, name in named(group):
            rows, split = parameter.shape[group["stack_dims"]], group["split"]
            if rows % split:
                raise InvalidParamGroups(
                    f"split={split} does not divide the {rows} rows of {name}. Set a split that does, or split=1 in a "
                    "group of its own.",
                    code="LO321",
                )

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        dtype, device = compute_dtype(parameter), parameter.device
        state = {"momentum_buffer": torch.zeros(parameter.shape, dtype=dtype, device=device)}
        if group["normalize"] == "neuron":
            rows = parameter.shape[: group["stack_dims"] + 1]
            state["exp_avg_sq_row"] = torch.zeros(rows, dtype=dtype, device=device)
        return state

    def _dims(self, name: str, parameter: Tensor, value: Tensor) -> Sequence[int | None]:
        return range(value.ndim)

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> Update:
        weights, given = to_compute_dtype(parameters), gradients(parameters)
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        kernels.foreach_lerp_(momenta, given, 1 - group["momentum"])
        sought = kernels.foreach_lerp(given, momenta, group["momentum"]) if group["nesterov"] else momenta
        layouts = [self.layout(parameter) for parameter in parameters]
        costs = [_cost(layout.shape, group) for layout in layouts]
        (updates,) = yield [Deal(list(sought), layouts, partial(_orthogonalized, group=group), costs)]
        if group["normalize"] == "neuron":
            rows = [self.state[parameter]["exp_avg_sq_row"] for parameter in parameters]
            updates = yield from side_by_side(
                _normalized(*each, group) for each in zip(updates, rows, layouts, strict=True)
            )
        lr = float(group["lr"])
        _decay(weights, updates, lr * group["weight_decay"], cautious=group["cautious"])
        alike: dict[tuple[int, int], list[int]] = {}
        for index, layout in enumerate(layouts):
            alike.setdefault(_piece(layout.shape, group), []).append(index)
        for shape, members in alike.items():
            rate = lr * scale(shape, group["lr_scale"])
            kernels.foreach_add_([weights[i] for i in members], [updates[i] for i in members], alpha=-rate)
        write_back(parameters, weights)


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


def _piece(shape: Sequence[int], group: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the shape of what is orthogonalized by itself."""
    rows, columns = matrix_shape(shape, group["stack_dims"])
    return rows // group["split"], columns


def _cost(shape: Sequence[int], group: Mapping[str, Any]) -> float:
    """Returns what orthogonalizing a parameter of this shape costs, in multiplications of a half iteration."""
    short, long = sorted(_piece(shape, group))
    return float(math.prod(shape) / max(1, short * long) * short * short * long)


def _orthogonalized(tensors: Sequence[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
    """Returns what is sought for parameters with every matrix orthogonalized; small ones of one shape at once."""
    results = [torch.empty_like(tensor) for tensor in tensors]
    if not tensors:
        return results
    device, dtype, named = tensors[0].device, tensors[0].dtype, group["ns_dtype"]
    iterated = getattr(torch, named) if named else iteration_dtype(dtype, device)
    alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
    pieces = (_split(as_matrices(each, group["stack_dims"]), group["split"]) for each in (tensors, results))
    for given, result in zip(*pieces, strict=True):
        alike.setdefault(given.shape, []).append((given, result))
    for shape, pairs in alike.items():
        size = stack_size(shape, iterated, device) if group["batched"] else 1
        for start in range(0, len(pairs), size):
            some = pairs[start : start + size]
            found = orthogonalize(
                [given for given, _ in some],
                size=size,
                dtype=iterated,
                steps=group["ns_steps"],
                coefficients=group["ns_coefficients"],
                eps=group["eps"],
            )
            kernels.foreach_copy_([result for _, result in some], list(found[: len(some)].unbind()))
    return results


def _normalized(update: Tensor, moments: Tensor, layout: Layout, group: Mapping[str, Any]) -> Together[Tensor]:
    """Advances the second moments of a parameter's rows and divides by their roots; each matrix keeps its norm."""
    indexed = group["stack_dims"] + 1  # the dimensions that index rows
    rows, columns = _piece(layout.shape, group)
    flattened = tuple(range(indexed, len(layout.shape)))
    flat = update.view(moments.numel(), math.prod(update.shape[indexed:]))
    (squares,) = yield [Sum(flat.square().sum(-1), layout, flattened)]
    moments.lerp_((squares / columns).view_as(moments), 1 - group["beta2"])
    factors = moments.flatten().sqrt().add_(_NEURON_EPS).reciprocal_()
    owners = _owners(layout, indexed, rows, update.device)
    sums = torch.stack([squares, squares * factors.square()])
    if layout.splitting(range(indexed)):
        pieces = math.prod(layout.shape[:indexed]) // rows
        belongs = (owners.unsqueeze(1) == torch.arange(pieces, device=owners.device)).to(sums.dtype)
        (sums,) = yield [Sum(sums @ belongs, layout, range(indexed))]
    else:
        sums = sums.view(2, -1, rows).sum(-1)
    before, after = (sums / (rows * columns)).sqrt()
    factors *= (before / after.add_(_NEURON_EPS))[owners]
    return (flat * factors.unsqueeze(-1)).view_as(update)


def _owners(layout: Layout, indexed: int, rows: int, device: torch.device) -> Tensor:
    """Returns which of a parameter's matrices each row belongs to, of the rows that this process has.

    The first ``indexed`` dimensions index rows, and a matrix has ``rows``.
    """
    shape = layout.shape[:indexed]
    numbered = torch.arange(math.prod(shape), device=device).view(shape)
    return layout.followed(range(indexed), shape).share(numbered).flatten() // rows


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
