"""Signum (Bernstein et al., 2018, https://arxiv.org/abs/1802.04434)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class Signum(Optimizer):
    """Steps by the sign of the averaged gradient: every element by the learning rate.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        momentum: Decay rate of the average.
        weight_decay: Decoupled weight decay.
    """

    def __init__(self, params: Any, lr: float = 1e-4, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    average = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(average.sign(), alpha=group["lr"])
        return loss
