"""Says what was resolved when fit starts, once, for all optimizers of the module."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_optim.callbacks.attached import detach


class ReportCallback(Callback):
    """Collects reports while optimizers are configured; says and logs them when fit starts, then removes itself."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._values: list[dict[str, Any]] = []

    @classmethod
    def add(cls, trainer: Trainer, text: str, values: dict[str, Any]) -> None:
        """Adds the report of one optimizer to what is said when the fit that is being set up starts.

        Args:
            trainer: The Trainer.
            text: For the terminal.
            values: For the loggers' hyperparameters.
        """
        attached = [callback for callback in trainer.callbacks if isinstance(callback, cls)]  # type: ignore[attr-defined]
        if not attached:
            attached = [cls()]
            trainer.callbacks.insert(0, attached[0])  # type: ignore[attr-defined]
        attached[0]._texts.append(text)
        attached[0]._values.append(values)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for text in self._texts:
            rank_zero_info(text)
        if len(self._values) == 1:
            named = {"optimizer": self._values[0]}
        else:
            named = {f"optimizer_{index}": values for index, values in enumerate(self._values)}
        for logger in trainer.loggers:
            logger.log_hyperparams(named)
        detach(trainer, self)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        detach(trainer, self)
