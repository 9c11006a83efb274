"""Classes of pytorch_optimizer that switch losslessly between training point and averaged weights."""

from __future__ import annotations

from typing import Any

import pytorch_optimizer
from torch import Tensor

from lightning_optim.stepping import KeepsTrainingPoint


class ScheduleFreeAdamW(KeepsTrainingPoint, pytorch_optimizer.ScheduleFreeAdamW):
    """``pytorch_optimizer.ScheduleFreeAdamW`` with exact mode switches."""


class ScheduleFreeRAdam(KeepsTrainingPoint, pytorch_optimizer.ScheduleFreeRAdam):
    """``pytorch_optimizer.ScheduleFreeRAdam`` with exact mode switches."""


class ScheduleFreeSGD(KeepsTrainingPoint, pytorch_optimizer.ScheduleFreeSGD):
    """``pytorch_optimizer.ScheduleFreeSGD`` with exact mode switches."""


class _Averages(pytorch_optimizer.SPlus):
    """``pytorch_optimizer.SPlus`` whose switches leave the training point to :class:`KeepsTrainingPoint`."""

    def eval(self) -> None:
        for group in self.param_groups:
            if group["train_mode"]:
                group["train_mode"] = False
                for parameter in group["params"]:
                    if "ema" in self.state.get(parameter, {}):
                        parameter.copy_(averaged(self.state[parameter], group))

    def train(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = True


class SPlus(KeepsTrainingPoint, _Averages):
    """``pytorch_optimizer.SPlus`` with exact mode switches, also for parameters that have had no gradient."""

    kept_average = "ema"

    def _average(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return averaged(state, group)


def averaged(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Returns SPlus's average of a parameter, its bias corrected."""
    average: Tensor = state["ema"] * (1.0 / (1.0 - group["ema_rate"] ** group["step"]))
    return average
