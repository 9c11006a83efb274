"""What is used of Lightning that it does not promise, under either of its names. All of it is in Lightning 2.6.

Only ``trainer/`` takes anything from here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.core.optimizer import _configure_optimizers, _MockOptimizer
from lightning.pytorch.overrides.distributed import _register_ddp_comm_hook, _sync_module_states
from lightning.pytorch.plugins import Precision, XLAPrecision
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

__all__ = [
    "MockOptimizer",
    "ReducesXLA",
    "StartsNoneAlone",
    "WrappingCheckpointIO",
    "WrapsForAnyDevice",
    "after_closure",
    "before_batch_transfer",
    "chosen_strategy",
    "data_parallel_takes_the_rest",
    "finder_sets_rate",
    "has_data",
    "is_accumulating",
    "is_start_method_popen",
    "loaded_checkpoint",
    "logged_results",
    "logged_step",
    "note_hyperparameters",
    "restore_data",
    "restricted_classmethod",
    "running_trainer",
    "saves_shards",
    "set_root_device",
    "subcommand_parser",
    "sync_module_states",
    "take_apart",
]

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    _DDP = DDPStrategy
    _XLA = XLAStrategy
else:
    # Mixins, for the classes of both packages.
    _DDP = _XLA = object

# Lightning's kind of class method, which refuses to be called on an instance.
restricted_classmethod = _restricted_classmethod
# What stands for an optimizer where there is none. It cannot be stepped by a kernel.
MockOptimizer = _MockOptimizer
# The base class of what reads and writes files by another of its kind. The XLA strategies accept no other.
WrappingCheckpointIO = _WrappingCheckpointIO
# Broadcasts parameters and buffers of rank 0; otherwise the copies of layerwise_ddp begin differently.
sync_module_states = _sync_module_states

# Whatever a Trainer asks of a module, it asks from here.
_CALLERS = ("lightning.pytorch.trainer.call", "pytorch_lightning.trainer.call")


# --- Trainer and loops -----------------------------------------------------------------------------------------------


def loaded_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Returns the checkpoint that a fit resumes from while its optimizers are made; empty if there is none.

    Callbacks that are attached then would otherwise not know that, and what, the fit resumes.
    """
    loaded: dict[str, Any] = trainer._checkpoint_connector._loaded_checkpoint
    return loaded


def running_trainer() -> Trainer | None:
    """Returns the Trainer whose fit called, over whatever package's code, the code that runs now.

    An optimizer knows its parameters and no module. Only a warning depends on this.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") in _CALLERS:
            trainer: Trainer | None = frame.f_locals.get("trainer")
            if trainer is not None:
                return trainer
        frame = frame.f_back
    return None


def is_accumulating(trainer: Trainer) -> bool:
    """Whether no optimizer step follows the batch that runs; otherwise accumulated gradients are stepped too early."""
    return trainer.fit_loop._should_accumulate()


def logged_step(trainer: Trainer) -> int:
    """Returns the step number under which ``self.log`` logs the batch that runs; else the curves would not line up."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def logged_results(loop: Any) -> Any:
    """Returns what a loop has logged, with how; a plateau schedule cannot tell whose its metric is without."""
    return loop._results


def has_data(loop: Any) -> bool:
    """Whether a loop has a dataloader: where validation has, a plateau schedule waits for its metric."""
    return bool(loop._data_source.is_defined())


def restore_data(trainer: Trainer) -> None:
    """Gives dataloaders that go on where they were their states from the checkpoint, if they were made before it.

    They are when the length of the training is asked for, and Lightning forgets to do it then: a run that goes on in
    the middle of an epoch would begin that epoch's data anew.
    """
    loop = trainer.fit_loop
    if loop.restarting and loop._combined_loader_states_to_load and loop._combined_loader is not None:
        loop._load_combined_loader_states()
        # The iterator is of the state before.
        iter(loop._data_fetcher)  # type: ignore[arg-type]


def take_apart(configured: Any) -> tuple[list[Optimizer], list[Any], str | None]:
    """Returns the optimizers, schedules and monitor that ``configure_optimizers`` returned in any of its forms."""
    return _configure_optimizers(configured)


def finder_sets_rate(finder: LearningRateFinder) -> bool:
    """Whether a finder changes the module's learning rate, which the optimizer then has to take."""
    return finder._update_attr


# --- module ----------------------------------------------------------------------------------------------------------


def note_hyperparameters(module: LightningModule) -> None:
    """Has loggers told of a module's hyperparameters as they are now; they would be told those first saved."""
    noted: Any = module
    noted._hparams_initial = copy.deepcopy(noted._hparams)


def before_batch_transfer(module: LightningModule, batch: Any) -> Any:
    """Calls the hook of that name, of the module or the datamodule: BatchNorm would be recalibrated with other data."""
    return module._on_before_batch_transfer(batch, dataloader_idx=0)


# --- strategies ------------------------------------------------------------------------------------------------------


def chosen_strategy(flags: Mapping[str, Any]) -> Strategy:
    """Returns the strategy that a Trainer would choose by these flags, for OptimCLI to choose a layerwise one."""
    strategy: Strategy = _AcceleratorConnector(**flags).strategy
    return strategy


def saves_shards(strategy: ModelParallelStrategy) -> bool:
    """Whether a strategy writes distributed checkpoints, folders; otherwise they would be written in place."""
    return bool(strategy._save_distributed_checkpoint)


def is_start_method_popen(strategy: DDPStrategy) -> bool:
    """Whether the processes of a strategy are started anew, as outside of notebooks."""
    return strategy._start_method == "popen"


def set_root_device(strategy: SingleDeviceStrategy, device: torch.device) -> None:
    """Sets the device of a strategy that was registered by name: it is made before the device is known."""
    strategy._root_device = device


def data_parallel_takes_the_rest(strategy: ModelParallelStrategy) -> None:
    """Makes ``data_parallel_size="auto"`` all processes that tensor parallelism leaves, not the number of nodes."""
    if strategy._data_parallel_size == "auto":
        assert isinstance(strategy._tensor_parallel_size, int)
        strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes // strategy._tensor_parallel_size


class WrapsForAnyDevice(_DDP):
    """Mixin for DDP that does for any device what ``DDPStrategy`` does for CUDA: streams and communication hooks."""

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        return DistributedDataParallel(module=model, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs)

    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        _register_ddp_comm_hook(
            model=self.model,
            ddp_comm_state=self._ddp_comm_state,
            ddp_comm_hook=self._ddp_comm_hook,
            ddp_comm_wrapper=self._ddp_comm_wrapper,
        )


class StartsNoneAlone(_XLA):
    """Mixin for a strategy of several processes that starts none for a single device, which ``XLAStrategy`` refuses."""

    def _configure_launcher(self) -> None:
        if self.num_processes > 1:
            super()._configure_launcher()


# --- precision -------------------------------------------------------------------------------------------------------


def after_closure(precision: Precision, model: LightningModule, optimizer: Optimizer) -> None:
    """Runs ``on_before_optimizer_step`` and the Trainer's clipping, for a plugin that unscales before them."""
    precision._after_closure(model, optimizer)


class ReducesXLA(XLAPrecision):
    """``XLAPrecision`` whose gradients are reduced by a method of its own, for those that are reduced already."""

    def _xla_wrap_closure(self, optimizer: Any, closure: Callable[[], Any]) -> Any:
        return self.closure_and_reduction(optimizer, closure)

    def closure_and_reduction(self, optimizer: Any, closure: Callable[[], Any]) -> Any:
        """Runs the closure, then averages the gradients over all processes; returns what the closure returns."""
        return super()._xla_wrap_closure(optimizer, closure)


# --- command line ----------------------------------------------------------------------------------------------------


def subcommand_parser(cli: LightningCLI, subcommand: str | None) -> LightningArgumentParser:
    """Returns the parser of a subcommand, or the whole one: it knows the defaults of what rivals ``--optim``."""
    return cli._parser(subcommand)
