"""Schedule-free optimizers that switch losslessly between training point and averaged weights."""

from __future__ import annotations

import schedulefree

from lightning_optim.stepping import KeepsTrainingPoint


class RAdamScheduleFree(KeepsTrainingPoint, schedulefree.RAdamScheduleFree):
    """``schedulefree.RAdamScheduleFree`` with exact mode switches."""


class AdamWScheduleFree(KeepsTrainingPoint, schedulefree.AdamWScheduleFree):
    """``schedulefree.AdamWScheduleFree`` with exact mode switches."""


class SGDScheduleFree(KeepsTrainingPoint, schedulefree.SGDScheduleFree):
    """``schedulefree.SGDScheduleFree`` with exact mode switches."""
