"""SCALE: gradient descent on matrices, each output of which gets an update of the same length.

A Minimalist Optimizer Design for LLM Pretraining, https://arxiv.org/abs/2506.16659.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_optim.errors import InvalidOption, listing
from lightning_optim.optimizers._base import (
    OwnOptimizer,
    compute_dtype,
    gradients,
    hyperparameters,
    to_compute_dtype,
    write_back,
)
from lightning_optim.optimizers._matrices import as_matrix, as_stack, refuse_vectors
from lightning_optim.stepping import Sum, Update

#: Where a weight has its outputs.
Outputs = Literal["rows", "columns"]


class Scale(OwnOptimizer):
    """Gradient descent without state, but normalized: what goes into one output changes by ``lr`` on average.

    The paper calls the weights of an output a column; in a weight ``[out, in]`` of torch they are a row. The gradient
    of each is divided by its root mean square, as in the authors' code; the paper divides by the norm, which only
    changes the unit of ``lr``.

    Two groups differ: the output layer, whose gradients vary most, gets ``momentum=0.9``, and an embedding
    ``[vocabulary, features]`` has its outputs in columns. All others keep no state at all. A parameter with more than
    two dimensions (a convolution) counts as the matrix ``[out, rest]``; with ``stack_dims``, leading dimensions index
    matrices. Give vectors to another optimizer; the authors use Adam.

    Args:
        params: Parameters or param groups, real, dense and with two dimensions or more; all arguments below may differ
            between groups.
        lr: Learning rate, the root mean square of an update.
        momentum: Decay rate of the gradients' average, which is what is normalized; 0 keeps none.
        eps: Smallest root mean square to divide by.
        weight_decay: Decoupled weight decay.
        outputs: ``"rows"`` or ``"columns"``.
        stack_dims: How many leading dimensions of the group's parameters index matrices.

    Raises:
        InvalidParamGroups: If a parameter has too few dimensions, is complex, or its gradient is sparse.
    """

    sharded: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        outputs: Outputs = "rows",
        stack_dims: int = 0,
    ) -> None:
        super().__init__(params, hyperparameters(locals()))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not 0 <= group["momentum"] < 1:
            raise InvalidOption(
                f"momentum={group['momentum']!r} of Scale is out of range: 0 <= value < 1", code="LO204"
            )
        if group["outputs"] not in get_args(Outputs):
            allowed = listing(get_args(Outputs))
            raise InvalidOption(f"outputs={group['outputs']!r} of Scale is unknown; use one of {allowed}", code="LO207")
        if not (isinstance(group["stack_dims"], Integral) and int(group["stack_dims"]) >= 0):
            raise InvalidOption(f"stack_dims={group['stack_dims']!r} of Scale is not a whole number >= 0", code="LO204")
        refuse_vectors(type(self).__name__, group)

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        if not group["momentum"]:
            return {}
        return {
            "momentum_buffer": torch.zeros(parameter.shape, dtype=compute_dtype(parameter), device=parameter.device)
        }

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> Update:
        lr, momentum, stack_dims = float(group["lr"]), group["momentum"], group["stack_dims"]
        inputs = -2 if group["outputs"] == "columns" else -1
        values = to_compute_dtype(parameters)
        given = gradients(parameters)
        if momentum:
            averages = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            given = [average.lerp_(each, 1 - momentum) for average, each in zip(averages, given, strict=True)]
        layouts = [as_matrix(self.layout(parameter), stack_dims) for parameter in parameters]
        updates = [as_stack([update], stack_dims) for update in given]
        lengths = yield [
            Sum(torch.linalg.vector_norm(update, dim=inputs, keepdim=True), layout, (inputs,), is_norm=True)
            for update, layout in zip(updates, layouts, strict=True)
        ]
        for value, update, layout, length in zip(values, updates, layouts, lengths, strict=True):
            weight = as_stack([value], stack_dims)
            if group["weight_decay"]:
                weight.mul_(1 - lr * group["weight_decay"])
            size = (length / math.sqrt(layout.shape[inputs])).clamp_(min=group["eps"])
            weight.addcdiv_(update, size, value=-lr)
        write_back(parameters, values)
