"""Keeps what ``accumulate_grad_batches`` has accumulated in checkpoints, which Lightning forgets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim._compat.lightning import is_accumulating, loaded_checkpoint
from lightning_optim.errors import IncompatibleTrainer
from lightning_optim.layerwise import Layerwise
from lightning_optim.stepping import Layout, is_sharded
from lightning_optim.trainer.callbacks._attached import Attached

_KEY = "accumulated_gradients"
_REMEDY = (
    "Resume from a file that was written after an optimizer step (ModelCheckpoint(every_n_train_steps=...) writes "
    "such), or start anew from its weights: LitModel.load_from_checkpoint(path)."
)


class AccumulatedCallback(Attached):
    """Saves accumulated gradients in a checkpoint between micro-batches, and puts them back when it is resumed.

    Lightning goes on within the accumulation, and steps what is left of it alone. Of several processes with copies of
    the model the mean is saved: each goes on from it, and so do their averages. A checkpoint that was written in the
    middle of a step, because training was interrupted there, is refused, as is one whose gradients are not known.
    """

    def __init__(self) -> None:
        self._held = 0  # micro-batches whose gradients wait for a step
        self._computing = False  # whether gradients may be those of half a micro-batch
        self._stepping = False  # whether a step may be half done
        self._exception: BaseException | None = None
        self._read: dict[str, Any] | None = None  # what a checkpoint says, until it is put back

    @classmethod
    def attach(cls, trainer: Trainer) -> None:
        """Lets the fit that is being set up keep what it accumulates."""
        if trainer.lightning_module.automatic_optimization:
            callback = cls._of(trainer)
            # Most strategies read the checkpoint before the optimizers are made; others call on_load_checkpoint later.
            callback._take(trainer, loaded_checkpoint(trainer))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._take(trainer, checkpoint)

    def _take(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        found = checkpoint.get(_KEY)
        if found is None:
            return
        if found["torn"]:
            raise IncompatibleTrainer(
                "the checkpoint was written when training was interrupted within an optimizer step: some of its "
                "parameters were stepped and others not. Resume from an earlier file, or start anew from its weights: "
                "LitModel.load_from_checkpoint(path).",
                code="LO811",
            )
        held, of, now = found["micro_batches"], found["accumulate_grad_batches"], trainer.accumulate_grad_batches
        what = f"the checkpoint was written after {held} of accumulate_grad_batches={of} micro-batches"
        if found["gradients"] is None:
            raise IncompatibleTrainer(
                f"{what}, and their gradients are not in it: {found['why']}. {_REMEDY}", code="LO811"
            )
        if of != now:
            raise IncompatibleTrainer(
                f"{what}, whose gradients are divided by {of}, and this Trainer has accumulate_grad_batches={now}. Use "
                f"Trainer(accumulate_grad_batches={of}). {_REMEDY}",
                code="LO811",
            )
        self._read, self._held = found, held

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        found, self._read = self._read, None
        if found is not None:
            _put_back(trainer, found["gradients"])
        elif not self._held and batch_idx % trainer.accumulate_grad_batches:
            rank_zero_warn(
                f"the checkpoint begins within an accumulation, after batch {batch_idx} of an epoch with "
                f"accumulate_grad_batches={trainer.accumulate_grad_batches}, and holds no gradients: the first step is "
                "made of fewer micro-batches."
            )
            # Only what comes next is counted, and the warning is for the first batch.
            self._held = batch_idx % trainer.accumulate_grad_batches

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._computing = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._stepping = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._computing = self._stepping = False
        self._held = self._held + 1 if is_accumulating(trainer) else 0

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._exception = exception
        super().on_exception(trainer, pl_module, exception)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stores the gradients if some wait for a step, and says if a step is half done."""
        torn = self._exception is not None and self._stepping
        torn |= any(layerwise.is_stepping or layerwise.torn for layerwise in _engines(trainer))
        if torn:
            rank_zero_warn(
                "the checkpoint is written within an optimizer step, in which training was interrupted: it cannot be "
                "resumed from, since some parameters may be stepped and others not. Earlier files can."
            )
        if not torn and not self._held:
            return
        why = self._unknown(trainer)
        checkpoint[_KEY] = {
            "micro_batches": self._held,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradients": None if torn or why else _gradients(trainer),
            "why": why,
            "torn": torn,
        }

    def _unknown(self, trainer: Trainer) -> str:
        """Returns why the gradients cannot be told now; empty if they can."""
        if self._computing:
            return "the backward of the next one had begun"
        if getattr(trainer.strategy, "layerwise_name", "") == "layerwise_fsdp2":
            return "layerwise_fsdp2 leaves them to FSDP2, whole in each process"
        # Of these all processes are told.
        all_know = self._exception is None or isinstance(self._exception, (SIGTERMException, KeyboardInterrupt))
        return "" if all_know or trainer.world_size == 1 else "one of several processes failed, and saved it alone"


def _engines(trainer: Trainer) -> Iterator[Layerwise]:
    return filter(None, map(Layerwise.of, trainer.optimizers))


def _gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Returns the gradients by the parameters' names, of several processes their mean."""
    module, copies = trainer.lightning_module, trainer.world_size > 1
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    found = torch.tensor([float(parameter.grad is not None) for _, parameter in named], device=module.device)
    if copies:
        # Not every process need have used a parameter.
        found = trainer.strategy.reduce(found, reduce_op="mean")
    gradients = {}
    for (name, parameter), has in zip(named, found.tolist(), strict=True):
        if not has:
            continue
        gradient: Any = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if is_sharded(gradient):
            gradient = gradient.full_tensor()
        elif copies:
            gradient = trainer.strategy.reduce(gradient.to_dense().clone(), reduce_op="mean")
        gradients[name] = gradient.detach().to("cpu", copy=True)
    return gradients


def _put_back(trainer: Trainer, gradients: dict[str, Tensor]) -> None:
    for name, parameter in trainer.lightning_module.named_parameters():
        if name in gradients:
            layout = Layout.of(parameter)
            parameter.grad = layout.wrap(layout.share(gradients[name].to(parameter.device)))
    for layerwise in _engines(trainer):
        layerwise.accumulated = True
