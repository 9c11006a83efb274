"""Reports once, when fit starts, what was resolved for each optimizer of the module."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_optim.build import ResolvedOptimizer
from lightning_optim.trainer import _report as report
from lightning_optim.trainer.callbacks._attached import Attached


class ReportCallback(Attached):
    """Collects optimizers while they are configured; reports and logs what trains, then removes itself.

    It does so after ``on_fit_start``: only then a checkpoint, which may hold other hyperparameters, is restored.
    """

    def __init__(self) -> None:
        self._optimizers: list[tuple[ResolvedOptimizer, str, str]] = []

    @classmethod
    def add(cls, trainer: Trainer, resolved: ResolvedOptimizer, identifier: str, schedule: str) -> None:
        """Adds an optimizer, with the requested identifier and a description of its schedule, to the report."""
        cls._of(trainer)._optimizers.append((resolved, identifier, schedule))

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        for optimizer in self._optimizers:
            rank_zero_info(report.describe(*optimizer))
        reports = [report.hyperparameters(*optimizer) for optimizer in self._optimizers]
        if len(reports) == 1:
            named = {"optimizer": reports[0]}
        else:
            named = {f"optimizer_{index}": values for index, values in enumerate(reports)}
        for logger in trainer.loggers:
            logger.log_hyperparams(named)
        self._detach(trainer)
