"""Callbacks that are attached to a Trainer for one run."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer


def detach(trainer: Trainer, callback: Callback) -> None:
    """Removes ``callback`` from the Trainer; safe while Lightning runs its callbacks' hooks."""
    # A new list: Lightning is iterating over the old one.
    others = [other for other in trainer.callbacks if other is not callback]  # type: ignore[attr-defined]
    trainer.callbacks = others  # type: ignore[attr-defined]
