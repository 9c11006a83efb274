"""Adafactor, with the semantics of ``transformers.optimization.Adafactor``.

Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, https://arxiv.org/abs/1804.04235.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_optim.errors import InvalidOption
from lightning_optim.optimizers._base import OwnOptimizer, compute_dtype, hyperparameters
from lightning_optim.optimizers._factored import factored_update, moment_dims, moment_shapes, rms
from lightning_optim.optimizers._stacks import batches, stacked, stacked_weights
from lightning_optim.stepping import Layout, Together, Update, side_by_side


def default_lr(relative_step: bool) -> float:
    """Returns the default learning rate; with ``relative_step`` it is a factor."""
    return 1.0 if relative_step else 1e-3


class Adafactor(OwnOptimizer):
    """Adafactor: a second moment of ``m + n`` instead of ``m * n`` numbers per matrix, no first moment by default.

    The second moment of a parameter with two or more dimensions is factored over the last two, and is float32 for
    parameters of two bytes per element.

    Args:
        params: Parameters or param groups.
        lr: Learning rate; with ``relative_step`` a factor on the rate that the step number gives. ``None`` means 1e-3,
            with ``relative_step`` 1.
        eps: Added to squared gradients; lower bound of the root mean square that ``scale_parameter`` multiplies by.
        clip_threshold: Largest root mean square of an update before the learning rate.
        decay_rate: The second moment keeps ``1 - step**decay_rate`` of its old value.
        beta1: Decay rate of an average of updates, stored at the parameter's size; ``None`` for no average.
        weight_decay: Decoupled weight decay.
        scale_parameter: Whether the learning rate is multiplied by the root mean square of the parameter.
        relative_step: Whether the learning rate is multiplied by ``min(1e-2, 1 / sqrt(step))``.
        warmup_init: Whether ``1e-6 * step`` replaces the 1e-2 in that minimum.

    Raises:
        InvalidOption: If a group has ``warmup_init`` without ``relative_step``.
    """

    sharded: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = False,
        relative_step: bool = False,
        warmup_init: bool = False,
    ) -> None:
        lr = default_lr(relative_step) if lr is None else lr
        super().__init__(params, hyperparameters(locals()))

    def used_rate(self, group: dict[str, Any]) -> float:
        # Without scale_parameter's factor, which each parameter has of its own.
        steps = (self.state[parameter].get("step", 0) for parameter in group["params"] if parameter in self.state)
        return self._rate(max([1, *steps]), group)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["warmup_init"] and not group["relative_step"]:
            raise InvalidOption(
                "warmup_init=True warms up the rate of relative_step: add relative_step=True", code="LO208"
            )

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return self._initial_moments(parameter, tuple(parameter.shape), group)

    def _initial_moments(self, parameter: Tensor, shape: tuple[int, ...], group: dict[str, Any]) -> dict[str, Any]:
        """Returns zeros for the moments of gradients of ``shape``."""
        dtype, device = compute_dtype(parameter), parameter.device
        return {name: torch.zeros(size, dtype=dtype, device=device) for name, size in _kept(shape, group).items()}

    def _dims(self, name: str, parameter: Tensor, value: Tensor) -> Sequence[int | None]:
        return moment_dims(name, parameter.ndim)

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> Update:
        def stepped(batch: list[Tensor], layout: Layout) -> Update:
            with stacked_weights(batch) as (values, gradients):
                rate = yield from self._rates(values, layout, step, group)
                update = yield from self._moved(batch, gradients, layout, rate, step, group)
                if group["weight_decay"]:
                    values.mul_(1 - rate * group["weight_decay"])
                values.sub_(update)

        yield from side_by_side(stepped(*batch) for batch in batches(parameters, _shapes, self.layout))

    def _rate(self, step: int, group: dict[str, Any]) -> float:
        """Returns the learning rate, without the factor of ``scale_parameter``."""
        lr = float(group["lr"])
        if group["relative_step"]:
            lr *= min(1e-6 * step if group["warmup_init"] else 1e-2, 1 / math.sqrt(step))
        return lr

    def _rates(
        self, parameters: Tensor | None, layout: Layout, step: int, group: dict[str, Any]
    ) -> Together[float | Tensor]:
        """Returns the learning rate for each of a stack of parameters ``[B, *shape]``, or one for all.

        Only ``scale_parameter`` needs the parameters. ``layout`` is that of one.
        """
        lr = self._rate(step, group)
        if parameters is None or not group["scale_parameter"]:
            return lr
        size = yield from rms(parameters, layout)
        return size.clamp_(min=group["eps"][1]).mul_(lr)

    def _moved(
        self,
        parameters: list[Tensor],
        gradients: Tensor,
        layout: Layout,
        rate: float | Tensor,
        step: int,
        group: dict[str, Any],
        stack_dims: int = 0,
    ) -> Together[Tensor]:
        """Returns what to subtract for a stack of gradients ``[B, *shape]`` and advances the moments.

        The first ``stack_dims`` dimensions of the moments in a state are part of the stack. ``layout`` is that of one
        gradient. ``rate`` is a number, or ``[B, 1, ...]`` with as many dimensions as the gradients; an average of
        updates includes it.
        """
        states, beta1 = [self.state[parameter] for parameter in parameters], group["beta1"]
        with stacked(states, _kept(tuple(gradients.shape[1:]), group), stack_dims) as moments:
            update = yield from factored_update(
                gradients,
                moments,
                layout,
                step=step,
                eps=group["eps"][0],
                clip_threshold=group["clip_threshold"],
                decay_rate=group["decay_rate"],
                scale=rate,
            )
            return update if beta1 is None else moments["exp_avg"].lerp_(update, 1 - beta1)


def _kept(shape: tuple[int, ...], group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the moments of gradients of ``shape``, by name."""
    first = {} if group["beta1"] is None else {"exp_avg": shape}
    return {**moment_shapes(shape), **first}


def _shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return shape, *moment_shapes(shape).values()
