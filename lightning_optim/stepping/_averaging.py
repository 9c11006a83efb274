"""Optimizers that train at one point and are evaluated at an average: lossless switching between the two.

A schedule-free optimizer trains at a point ``y`` and is evaluated at an average ``x``; upstream computes one from the
other in place (``x = lerp(y, z, 1 - 1/beta1)`` and back). That does not round-trip: 100 validations drift a float32
model by 6e-8 and a bfloat16 one by 2e-3, and a checkpoint that holds ``x`` cannot resume exactly. Here ``eval()``
stores ``y`` before it writes ``x`` into the parameters, and ``train()`` restores ``y``.

As upstream's, a state dict contains the optimizer's mode; in evaluation mode it holds ``y``, so that it resumes bit for
bit together with the averaged weights. While a Trainer puts the averaged weights into the model's state dict during
training, too (``saves_averages``), the optimizer's has the form of evaluation mode. One without ``y``, written by
upstream, is read as upstream reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_optim.stepping._uncompiled import StepsUncompiled, uncompiled

_POINT = "y"


class KeepsTrainingPoint(StepsUncompiled):
    """Mixin for an optimizer with schedule-free's ``train()`` and ``eval()``, its ``z`` and its ``train_mode``.

    Attributes:
        saves_averages: True while the model's state dict holds the averaged weights, whatever the mode.
        kept_average: What a parameter's state holds once its average differs from it.
    """

    saves_averages = False
    kept_average = "z"

    @property
    def training(self) -> bool:
        """True while the parameters hold the training point."""
        return any(group["train_mode"] for group in self.param_groups)

    @uncompiled
    @torch.no_grad()
    def eval(self) -> None:
        """Puts the averaged weights into the parameters, if they are not there yet."""
        for parameter, state, _ in self._moved(train_mode=True):
            state[_POINT] = parameter.detach().clone()
        super().eval()  # type: ignore[misc]
        self._drop_empty()

    @uncompiled
    @torch.no_grad()
    def train(self) -> None:
        """Puts the training point into the parameters, if it is not there yet."""
        moved = list(self._moved(train_mode=False))
        super().train()  # type: ignore[misc]
        self._drop_empty()
        for parameter, state, _ in moved:
            if _POINT in state:
                parameter.copy_(state.pop(_POINT))

    @torch.no_grad()
    def averaged_weights(self) -> dict[Tensor, Tensor]:
        """Returns the averaged value of every parameter that is at its training point, without changing parameters."""
        return {
            parameter: self._average(parameter, state, group)
            for parameter, state, group in self._moved(train_mode=True)
        }

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        # Lightning's finders run without the callbacks that switch. A closure computes the gradients itself; without
        # one, as under a GradScaler, existing gradients fit the training point only while it equals the average.
        if closure is not None or not any(self._moved(train_mode=False)):
            self.train()
        loss: float | None = super().step(closure)
        return loss

    def state_dict(self) -> dict[str, Any]:
        state_dict = super().state_dict()
        if not self.saves_averages:
            return state_dict
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            state = state_dict["state"].get(index, {})
            if self.kept_average in state and _POINT not in state:
                # A new dict and a copy: state_dict() shares its tensors with the optimizer, and y is the weight itself.
                state_dict["state"][index] = {**state, _POINT: parameter.detach().clone()}
        for group in state_dict["param_groups"]:
            group["train_mode"] = False
        return state_dict

    def _average(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Returns the averaged value of a parameter that is at its training point."""
        interpolation = float(group["betas"][0] if "betas" in group else group["momentum"])
        return parameter.detach().lerp(state["z"], 1 - 1 / interpolation)

    def _drop_empty(self) -> None:
        """Removes the states that upstream makes by looking: ``torch.distributed.checkpoint`` takes them for whole."""
        for parameter in [parameter for parameter, state in self.state.items() if not state]:
            del self.state[parameter]

    def _moved(self, train_mode: bool) -> Iterator[tuple[Tensor, dict[str, Any], dict[str, Any]]]:
        """Yields (parameter, state, group) in this mode where average and training point differ."""
        for group in self.param_groups:
            if group["train_mode"] == train_mode:
                for parameter in group["params"]:
                    if self.kept_average in self.state.get(parameter, {}):
                        yield parameter, self.state[parameter], group
