"""Adam-mini: AdamW with one second moment per block of weights instead of one per weight.

Adam-mini: Use Fewer Learning Rates To Gain More, https://arxiv.org/abs/2406.16793.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_optim._compat import kernels
from lightning_optim.errors import InvalidOption, InvalidParamGroups
from lightning_optim.optimizers._base import (
    OwnOptimizer,
    compute_dtype,
    gradients,
    hyperparameters,
    to_compute_dtype,
    write_back,
    zeros_for,
)
from lightning_optim.optimizers._matrices import named


class AdamMini(OwnOptimizer):
    """AdamW whose second moment is one number per block: half of AdamW's state.

    A block should be what the Hessian treats alike. By default it is a row of a matrix, so an output of a linear layer,
    a token of an embedding and a channel of a convolution, and a vector as a whole. That is the paper's partition of a
    transformer except for queries and keys, where a block is a head: set ``blocks`` to the number of heads there. For
    experts ``[E, m, n]`` it is ``E * m``.

    Args:
        params: Parameters or param groups, real, dense and not sharded.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        blocks: Into how many equal blocks of consecutive elements each parameter is divided; ``None``: as above.

    Raises:
        InvalidOption: If ``blocks`` is not a whole number of at least 1.
        InvalidParamGroups: If ``blocks`` does not divide a parameter, it is complex or sharded, or its gradient sparse.
    """

    unsharded: ClassVar[str] = "it averages squares over blocks of a whole parameter"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        blocks: int | None = None,
    ) -> None:
        super().__init__(params, hyperparameters(locals()))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        blocks = group["blocks"]
        if blocks is None:
            return
        if not (isinstance(blocks, Integral) and int(blocks) >= 1):
            raise InvalidOption(f"blocks={blocks!r} of AdamMini is not a whole number >= 1, or None", code="LO204")
        for parameter, name in named(group):
            if parameter.numel() % int(blocks):
                raise InvalidParamGroups(
                    f"blocks={blocks} does not divide the {parameter.numel()} elements of {name}. Set a number that "
                    "does, such as that of heads, or blocks=None in a group of its own.",
                    code="LO321",
                )

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        count = block_count(parameter.shape, group["blocks"])
        moment = torch.zeros(count, dtype=compute_dtype(parameter), device=parameter.device)
        return {"exp_avg": zeros_for(parameter), "exp_avg_sq_block": moment}

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        exp_avgs, moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq_block"))
        beta1, beta2 = group["betas"]
        lr, values, given = float(group["lr"]), to_compute_dtype(parameters), gradients(parameters)
        kernels.foreach_lerp_(exp_avgs, given, 1 - beta1)
        means = [_mean_of_squares(each, len(moment)) for each, moment in zip(given, moments, strict=True)]
        kernels.foreach_lerp_(moments, means, 1 - beta2)
        roots = kernels.foreach_sqrt(moments)
        kernels.foreach_div_(roots, math.sqrt(1 - beta2**step))
        kernels.foreach_add_(roots, group["eps"])
        if group["weight_decay"]:
            kernels.foreach_mul_(values, 1 - lr * group["weight_decay"])
        rate = lr / (1 - beta1**step)
        for value, average, root in zip(values, exp_avgs, roots, strict=True):
            blocks = value.view(len(root), -1)
            blocks.addcdiv_(average.view_as(blocks), root.unsqueeze(1), value=-rate)
        write_back(parameters, values)


def block_count(shape: Sequence[int], blocks: int | None) -> int:
    """Returns the number of blocks of a parameter."""
    if not math.prod(shape):
        return 0
    return int(blocks) if blocks is not None else shape[0] if len(shape) >= 2 else 1


def _mean_of_squares(gradient: Tensor, blocks: int) -> Tensor:
    rows = gradient.view(blocks, -1)
    means: Tensor = torch.linalg.vector_norm(rows, dim=1).square_().div_(rows.shape[1])
    return means
