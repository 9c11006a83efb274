"""Callbacks that are attached to a Trainer for one run."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import Self


class Attached(Callback):
    """Base of callbacks that stay for one run: removes itself from the Trainer when the run ends or fails."""

    @classmethod
    def _of(cls, trainer: Trainer) -> Self:
        """Returns the Trainer's callback of this class, adding one if it has none."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        found = next((callback for callback in callbacks if isinstance(callback, cls)), None)
        return found or cls()._put_first(trainer)

    def _put_first(self, trainer: Trainer) -> Self:
        """Adds the callback before the user's, so that those find its work done."""
        trainer.callbacks.insert(0, self)  # type: ignore[attr-defined]
        return self

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # The user's callbacks, which come later, may save: the checkpoint needs what this one adds. Lightning goes
        # through this very list.
        trainer.callbacks.append(_AtLast(self))  # type: ignore[attr-defined]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach(trainer)

    def _detach(self, trainer: Trainer) -> None:
        """Removes the callback; safe while Lightning runs its callbacks' hooks."""
        # A new list: Lightning is iterating over the old one.
        trainer.callbacks = [other for other in trainer.callbacks if other is not self]  # type: ignore[attr-defined]


class _AtLast(Callback):
    """Stands at the end of the callbacks that are told of an exception, and detaches one of the first."""

    def __init__(self, attached: Attached) -> None:
        self._attached = attached

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._attached._detach(trainer)
        trainer.callbacks = [other for other in trainer.callbacks if other is not self]  # type: ignore[attr-defined]
