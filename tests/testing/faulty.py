"""Momentum, and classes that break one promise of it each; dotted paths name them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Momentum(Optimizer):
    """Keeps every promise."""

    def __init__(self, params: Any, lr: float = 0.05, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(0.9).add_(gradient)
        parameter.sub_(state["momentum"] * self.rate(group))

    def rate(self, group: dict[str, Any]) -> Any:
        return group["lr"]


class Forgets(Momentum):
    """After more steps than other promises look at."""

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["steps"] = state.get("steps", 0) + 1
        if state["steps"] < 16:
            super().update(parameter, gradient, state, group)
        else:
            parameter.copy_(parameter.roll(1, 0) * 2)


class KeepsItsFirstRate(Momentum):
    def rate(self, group: dict[str, Any]) -> Any:
        return group.setdefault("first_lr", group["lr"])


class TakesTheFirstGroupsRate(Momentum):
    def rate(self, group: dict[str, Any]) -> Any:
        return self.param_groups[0]["lr"]


class DecaysWithoutGradients(Momentum):
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if closure is None and all(parameter.grad is None for parameter in parameters):
            for parameter in parameters:
                parameter.data.mul_(0.9)
        return super().step(closure)


class AsksForRows(Momentum):
    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["rows"] = gradient.shape[0]
        super().update(parameter, gradient, state, group)


class NeedsSingularValues(Momentum):
    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if gradient.ndim == 2 and len(gradient) == 64:
            torch.linalg.svdvals(gradient)  # not for bfloat16
        super().update(parameter, gradient, state, group)


class CountsWhatIsSkipped(Momentum):
    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            group["rounds"] = group.get("rounds", 0) + 1


class AveragesArrivals(Momentum):
    """Divides a gradient by the number of times it arrived since the last step."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self.arrived: dict[Tensor, int] = vars(self).get("arrived", {})
        for parameter in self.param_groups[-1]["params"]:
            parameter.register_post_accumulate_grad_hook(self._count)

    def _count(self, parameter: Tensor) -> None:
        self.arrived[parameter] = self.arrived.get(parameter, 0) + 1

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        arrived = vars(self).get("arrived", {}).pop(parameter, 1)
        super().update(parameter, gradient / arrived, state, group)


class CountsItsLoads(Momentum):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["loads"] = group.get("loads", 0) + 1


class KeepsFractions(Momentum):
    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["half"] = Fraction(1, 2)
        super().update(parameter, gradient, state, group)


class CannotBeCopied(Momentum):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError("there is one of each")


class CannotBePickled(Momentum):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = type(self)(copy.deepcopy(self.param_groups, memo))
        copied.state = copy.deepcopy(self.state, memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("it holds a file")


class DividesByTheGradient(Momentum):
    """As ``torch.distributed.checkpoint`` steps with zeros to have a state."""

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if gradient.numel() and not gradient.any():
            raise ZeroDivisionError("a gradient is zero")
        super().update(parameter, gradient, state, group)


class ClipsAll(Momentum):
    """Clips the norm of all gradients, large ones only: larger than a probe of small parameters has them."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        for gradient in gradients if norm > 60 else ():
            gradient.mul_(60 / norm)
        super().step()
        return loss


class KeepsTheLoss(Momentum):
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        super().step(closure)


class TakesLists(Momentum):
    def __init__(self, params: list[Any], lr: float = 0.05, weight_decay: float = 0.0) -> None:
        if not isinstance(params, list):
            raise TypeError(f"params is a {type(params).__name__} and not a list")
        super().__init__(params, lr, weight_decay)


class RoundsStacks(Momentum):
    """A stack of gradients is rounded otherwise than each by itself."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.several = [sum(p.grad is not None for group in self.param_groups for p in group["params"]) > 1]
        return super().step(closure)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        rounded = gradient * (1 + 1.2e-7) if self.several[0] else gradient
        super().update(parameter, rounded, state, group)
