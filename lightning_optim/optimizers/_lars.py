"""LARS: momentum whose every layer has a rate of its own, for large batches.

Large Batch Training of Convolutional Networks, https://arxiv.org/abs/1708.03888.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lightning_optim._compat import kernels
from lightning_optim.errors import InvalidOption
from lightning_optim.optimizers._base import (
    OwnOptimizer,
    gradients,
    hyperparameters,
    to_compute_dtype,
    write_back,
    zeros_for,
)
from lightning_optim.optimizers._trust_ratio import Adapt, adapted, check_adapt, norms, ratios, scale
from lightning_optim.stepping import Update


class Lars(OwnOptimizer):
    """LARS: gradient and decay of a layer are scaled to the norm of its weights, before the momentum.

    A layer is a parameter. Those with fewer than two dimensions, biases and norms, are stepped as SGD with momentum
    steps them, at ``lr``; the paper adapts these, too (``adapt="all"``).

    The learning rate multiplies what the momentum gives, as in ``torch.optim.SGD`` and in all known recipes for
    PyTorch. In the paper it is within the momentum, which differs while the learning rate changes.

    Args:
        params: Parameters or param groups, real and dense.
        lr: Learning rate.
        momentum: Decay rate of the sum of scaled gradients; 0 keeps none.
        weight_decay: Part of the weights added to the gradient.
        trust_coeff: A layer moves by this fraction of its norm, times ``lr``.
        nesterov: Whether to look one step ahead.
        adapt: ``"matrices"`` adapts parameters with two dimensions or more, ``"all"`` every one, ``"none"`` none.

    Raises:
        InvalidParamGroups: If a parameter is complex or its gradient sparse.
        InvalidOption: If ``adapt`` is unknown, or ``nesterov`` is set without momentum.
    """

    sharded: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coeff: float = 1e-3,
        nesterov: bool = False,
        adapt: Adapt = "matrices",
    ) -> None:
        super().__init__(params, hyperparameters(locals()))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_adapt(type(self).__name__, group)
        if not 0 <= group["momentum"] < 1:
            raise InvalidOption(f"momentum={group['momentum']!r} of Lars is out of range: 0 <= value < 1", code="LO204")
        if not group["trust_coeff"] > 0:
            raise InvalidOption(
                f"trust_coeff={group['trust_coeff']!r} of Lars is out of range: 0 < value", code="LO204"
            )
        if group["nesterov"] and not group["momentum"]:
            raise InvalidOption("nesterov=True needs momentum: set momentum=0.9, or leave nesterov out", code="LO208")

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"momentum_buffer": zeros_for(parameter)} if group["momentum"] else {}

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> Update:
        momentum, decay = group["momentum"], group["weight_decay"]
        values, given = to_compute_dtype(parameters), gradients(parameters)
        updates = kernels.foreach_add(given, values, alpha=decay)
        if chosen := adapted(parameters, group["adapt"]):
            layouts = [self.layout(parameters[index]) for index in chosen]
            lengths, steps = yield from norms(layouts, *([each[i] for i in chosen] for each in (values, given)))
            steps = steps.add(lengths, alpha=decay)
            scale([updates[index] for index in chosen], ratios(lengths * group["trust_coeff"], steps))
        if momentum:
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            kernels.foreach_mul_(buffers, momentum)
            kernels.foreach_add_(buffers, updates)
            updates = kernels.foreach_add(updates, buffers, alpha=momentum) if group["nesterov"] else tuple(buffers)
        kernels.foreach_add_(values, updates, alpha=-float(group["lr"]))
        write_back(parameters, values)
