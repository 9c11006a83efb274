"""Schedule-free optimizers that switch losslessly between training point and averaged weights."""

from __future__ import annotations

from typing import Any

import schedulefree
from torch import Tensor

from lightning_optim.errors import InvalidOption
from lightning_optim.stepping import KeepsTrainingPoint


class RAdamScheduleFree(KeepsTrainingPoint, schedulefree.RAdamScheduleFree):
    """``schedulefree.RAdamScheduleFree`` with exact mode switches.

    Upstream divides 0 by 0 in its first steps, and catches that for floats only.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group.

        Raises:
            InvalidOption: If its learning rate is a tensor, with which the parameters would become NaN.
        """
        super().add_param_group(param_group)
        if isinstance(self.param_groups[-1]["lr"], Tensor):
            raise InvalidOption(
                "RAdamScheduleFree takes no tensor as lr: it would make parameters NaN. Give a float.", code="LO203"
            )


class AdamWScheduleFree(KeepsTrainingPoint, schedulefree.AdamWScheduleFree):
    """``schedulefree.AdamWScheduleFree`` with exact mode switches."""


class SGDScheduleFree(KeepsTrainingPoint, schedulefree.SGDScheduleFree):
    """``schedulefree.SGDScheduleFree`` with exact mode switches."""
