"""Keeps schedule-free optimizers in the right mode and the averaged weights in every checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_optim._compat.lightning import before_batch_transfer
from lightning_optim._compat.torch import AnyBatchNorm
from lightning_optim.errors import IncompatibleTrainer, InvalidOption
from lightning_optim.stepping import KeepsTrainingPoint, averaging_parts, forget_gathered, parts_of
from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer.callbacks._attached import Attached


class ScheduleFreeCallback(Attached):
    """Puts the training point into the model for training and the averaged weights for everything else.

    The mixin and :class:`~lightning_optim.OptimCallback` attach it automatically; add it yourself only to recalibrate
    BatchNorm. It switches to the training point at the start of every training batch, and to the averaged weights for
    validation, at the end of training and on an exception. While fit runs, the module's ``state_dict()`` holds the
    averaged weights, and so does every checkpoint, whichever callback saves it and when.

    Args:
        bn_batches: Training batches to pass through the model at the averaged weights, before every validation and at
            the end of training, to compute BatchNorm's running statistics for them. 0 leaves the statistics of the
            training point, which do not fit the averaged weights. Checkpoints saved between two validations hold the
            statistics of the training point.

    Raises:
        InvalidOption: If ``bn_batches`` is negative.
        IncompatibleTrainer: At the start of fit, if ``bn_batches`` is set and cannot work.
    """

    def __init__(self, bn_batches: int = 0) -> None:
        if bn_batches < 0:
            raise InvalidOption(
                f"bn_batches={bn_batches} is negative; 0 switches recalibration off, 50 is usual", code="LO204"
            )
        self.bn_batches = bn_batches
        #: True if it was attached for one fit and removes itself from the Trainer afterwards.
        self.temporary = False
        self._handle: RemovableHandle | None = None

    @classmethod
    def attach(cls, trainer: Trainer) -> None:
        """Adds the callback for the fit that is starting, unless the user brought one."""
        if not any(isinstance(callback, cls) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            cls()._put_first(trainer).temporary = True

    def recalibration_forward(self, pl_module: LightningModule, batch: Any) -> None:
        """Passes one training batch through the model; override it if ``forward`` does not take ``batch[0]``."""
        pl_module(batch[0] if isinstance(batch, (list, tuple)) else batch)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bn_batches and not any(_batch_norms(pl_module)):
            raise IncompatibleTrainer(
                f"ScheduleFreeCallback(bn_batches={self.bn_batches}), but the model has no BatchNorm with running "
                "statistics. Leave bn_batches out.",
                code="LO527",
            )
        averaging = _averaging(trainer)
        optimizers = set(averaging)
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
            if getattr(scheduler, "cycle_momentum", False) and not optimizers.isdisjoint(parts_of(scheduler.optimizer)):
                raise IncompatibleTrainer(
                    f"{type(scheduler).__name__} cycles the momentum of {type(scheduler.optimizer).__name__}, which is "
                    "the weight of its average. Give it cycle_momentum=False.",
                    code="LO526",
                )
        for optimizer in averaging:
            optimizer.saves_averages = True
        hook = _AveragedStateDict(averaging)
        self._handle = pl_module.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bn_batches and any(
            getattr(loader, "persistent_workers", False) for loader in _second_reading(trainer).flattened
        ):
            raise IncompatibleTrainer(
                f"ScheduleFreeCallback(bn_batches={self.bn_batches}) reads the training data a second time, which "
                "DataLoader(persistent_workers=True) cannot do within an epoch. Set persistent_workers=False.",
                code="LO527",
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        averaging = _averaging(trainer)
        switched = [optimizer for optimizer in averaging if not optimizer.training]
        for optimizer in averaging:
            optimizer.train()
        if switched:
            forget_gathered(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._recalibrate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer)
        self._recalibrate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer) -> None:
        for optimizer in _averaging(trainer):
            optimizer.eval()
        forget_gathered(trainer.lightning_module)

    def _detach(self, trainer: Trainer) -> None:
        self._evaluate(trainer)
        for optimizer in _averaging(trainer):
            optimizer.saves_averages = False
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self.temporary:
            super()._detach(trainer)

    def _recalibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recomputes BatchNorm's running statistics, as plain averages over the batches."""
        if not self.bn_batches:
            return
        precision = trainer.precision_plugin
        # A second iterator draws a seed, and dropout draws random numbers: neither may change the training.
        with isolate_rng(), _statistics_of_this_model(pl_module), torch.no_grad(), precision.forward_context():
            for batch, _, _ in itertools.islice(_second_reading(trainer), self.bn_batches):
                # What Lightning does to a batch before training_step sees it.
                batch = before_batch_transfer(pl_module, precision.convert_input(batch))
                self.recalibration_forward(pl_module, trainer.strategy.batch_to_device(batch, dataloader_idx=0))


class _AveragedStateDict:
    """Replaces the training point by the averaged weights in a module's state dict.

    In a copied or pickled module the hook does nothing: the optimizers stay with the original.
    """

    def __init__(self, optimizers: list[KeepsTrainingPoint] | None = None) -> None:
        self._optimizers = optimizers or []

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        averaged = {p: x for optimizer in self._optimizers for p, x in optimizer.averaged_weights().items()}
        if averaged:
            for name, parameter in module.named_parameters(prefix.removesuffix("."), remove_duplicate=False):
                if parameter in averaged and name in state_dict:
                    state_dict[name] = averaged[parameter]

    def __reduce__(self) -> tuple[type[_AveragedStateDict], tuple[()]]:
        return _AveragedStateDict, ()


def _averaging(trainer: Trainer) -> list[KeepsTrainingPoint]:
    return [part for optimizer in trainer.optimizers for part in averaging_parts(optimizer)]


def _second_reading(trainer: Trainer) -> CombinedLoader:
    """Returns the training data, to be read without disturbing the iteration in progress."""
    data: Any = trainer.train_dataloader
    return CombinedLoader(data.iterables if isinstance(data, packages.kin(CombinedLoader)) else data, "max_size_cycle")


def _batch_norms(module: nn.Module) -> Iterator[AnyBatchNorm]:
    return (m for m in module.modules() if isinstance(m, AnyBatchNorm) and m.track_running_stats)


@contextmanager
def _statistics_of_this_model(module: nn.Module) -> Iterator[None]:
    """Resets BatchNorm's statistics and lets forward passes average into them; restores modes afterwards."""
    norms = list(_batch_norms(module))
    momenta = [norm.momentum for norm in norms]
    modes = [(m, m.training) for m in module.modules()]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    module.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for m, training in modes:
            m.training = training
