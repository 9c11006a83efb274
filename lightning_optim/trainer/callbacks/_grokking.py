"""Tells GrokAdamW after each validation how far the model overfits."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_optim._compat.lightning import logged_results
from lightning_optim.errors import IncompatibleTrainer, listing
from lightning_optim.optimizers import GrokAdamW


class GrokkingSignal(Callback):
    """Writes training and evaluation loss into the groups of every GrokAdamW, after each validation of a fit.

    Until the first validation the losses are unknown and the signal is 0. They are equal on all processes, the mean of
    what each of them logged, and in the optimizer's checkpoints. A checkpoint that is written between a batch and the
    validation that follows it resumes with the losses of the validation before, because Lightning does not repeat it:
    save after validation, with ``ModelCheckpoint(save_on_train_epoch_end=False)``.

    Args:
        train_loss: Name of the training loss as ``self.log`` got it, or with its ending ``_epoch``. Logged per step, as
            ``self.log`` does by default in ``training_step``, it is that of the last batch before the validation.
            Logged with ``on_step=False, on_epoch=True`` it is the mean of the last epoch that had ended, unknown in
            the first one, and the first validation after a resume keeps what the checkpoint had.
        eval_loss: Name of the validation loss, with its ending ``/dataloader_idx_0`` where there are several loaders.

    Raises:
        IncompatibleTrainer: At the start of fit, if there is no GrokAdamW or no validation; at the end of the first
            validation, if a loss is not logged.
    """

    def __init__(self, train_loss: str = "train_loss", eval_loss: str = "val_loss") -> None:
        self.train_loss = train_loss
        self.eval_loss = eval_loss

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _grokking(trainer):
            present = listing(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise IncompatibleTrainer(
                f"GrokkingSignal tells GrokAdamW the losses, but the module trains with {present or 'no optimizer'}. "
                "Set optim='grokadamw', or leave the callback out.",
                code="LO528",
            )
        if not trainer.enable_validation:
            raise IncompatibleTrainer(
                f"GrokkingSignal reads {self.eval_loss!r} after each validation, but there is none. Give fit a "
                "validation dataloader, the module a validation_step and the Trainer limit_val_batches > 0, or leave "
                "the callback out.",
                code="LO528",
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        losses = self._losses(trainer)
        for optimizer in _grokking(trainer):
            for group in optimizer.param_groups:
                group.update(losses)

    def _losses(self, trainer: Trainer) -> dict[str, float]:
        """Returns the losses by their names in the groups, without one that is not there yet."""
        names = {"train_loss": self.train_loss, "eval_loss": self.eval_loss}
        logged = trainer.callback_metrics
        sums_and_counts = torch.tensor(
            [[float(logged[name]), 1.0] if name in logged else [0.0, 0.0] for name in names.values()],
            device=trainer.strategy.root_device,
        )
        # One reduction, whatever this process logged: processes that do not log must not keep the others waiting.
        reduced: list[list[float]] = trainer.strategy.reduce(sums_and_counts, reduce_op="sum").tolist()
        losses = {key: total / count for key, (total, count) in zip(names, reduced, strict=True) if count}
        expected = _appears_later(trainer)
        missing = [name for key, name in names.items() if key not in losses and name not in expected]
        if missing:
            raise IncompatibleTrainer(
                f"GrokkingSignal(train_loss={self.train_loss!r}, eval_loss={self.eval_loss!r}): {listing(missing)} "
                f"was not logged; there are {listing(sorted(logged)) or 'no metrics'}. Call self.log in training_step "
                "and validation_step, or name what is there.",
                code="LO528",
            )
        return losses


def _grokking(trainer: Trainer) -> list[GrokAdamW]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, GrokAdamW)]


def _appears_later(trainer: Trainer) -> set[str]:
    """Returns the names of what training logs per epoch; the first appears when the epoch ends, after validation."""
    metas = [result.meta for result in logged_results(trainer.fit_loop.epoch_loop).values()]
    return {name for meta in metas if meta.on_epoch for name in (meta.name, meta.forked_name(on_step=False))}
