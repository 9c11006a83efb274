"""Makes sure that the requested optimizer is the one that trains."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lightning_optim._compat.lightning import loaded_checkpoint
from lightning_optim.build import MODULE_SCHEDULE, OptimConfig
from lightning_optim.errors import IncompatibleTrainer
from lightning_optim.trainer.callbacks._attached import Attached
from lightning_optim.trainer.callbacks._resume import averaging_began


class MustBuildOptim(Attached):
    """Refuses, when fit starts, a module whose ``configure_optimizers`` ignored its request.

    The request is its ``optim``, and its ``lr_scheduler`` if no schedule is returned at all.
    """

    def __init__(self, config: OptimConfig) -> None:
        self._config = config
        self.built = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach(trainer)
        if self._config.optim != OptimConfig.optim and not self.built:
            raise IncompatibleTrainer(
                f"optim={self._config.optim!r} was given to {type(pl_module).__name__}, but its configure_optimizers "
                "was replaced (by its own code or by --optimizer) and ignores it. Build the optimizer there with "
                "self.build_optimizer(), or leave optim out.",
                code="LO415",
            )

        name = self._config.lr_scheduler
        if averaging_began(trainer, loaded_checkpoint(trainer)):
            # Its callback has taken the schedule away, to put its own in the place.
            return
        if name not in (None, MODULE_SCHEDULE.name) and not trainer.lr_scheduler_configs:
            raise IncompatibleTrainer(
                f"lr_scheduler={name!r} was given to {type(pl_module).__name__}, but its configure_optimizers returns "
                "no schedule: self.build_optimizer() makes none. Return build_schedule(optimizer, "
                f"{name!r}, ...) together with the optimizer, or leave lr_scheduler out.",
                code="LO415",
            )
