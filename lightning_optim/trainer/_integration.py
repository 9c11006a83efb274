"""Where the pipeline meets Lightning: shared by the mixin, the callback and the CLI."""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_optim._compat.lightning import take_apart
from lightning_optim.build import (
    MODULE_SCHEDULE,
    OptimConfig,
    PlateauOptions,
    ResolvedOptimizer,
    TrainerFacts,
    built_by,
    resolve,
    schedule_of,
    schedule_text,
)
from lightning_optim.groups import Target
from lightning_optim.layerwise import Layerwise
from lightning_optim.stepping import averaging_parts, own_clips
from lightning_optim.table import LayerwiseOptions, parse
from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer._expected import Expected, OwnHook
from lightning_optim.trainer._length import Length
from lightning_optim.trainer.callbacks._accumulated import AccumulatedCallback
from lightning_optim.trainer.callbacks._finders import AfterFinders, Built, forgetful_finder, has_finder
from lightning_optim.trainer.callbacks._graph import GraphCallback
from lightning_optim.trainer.callbacks._layerwise import LayerwiseCallback, steps_in_backward, takes
from lightning_optim.trainer.callbacks._manual_schedule import ManualSchedule
from lightning_optim.trainer.callbacks._own_clips import OwnClips
from lightning_optim.trainer.callbacks._plateau import PlateauCallback, lightning_config
from lightning_optim.trainer.callbacks._report import ReportCallback
from lightning_optim.trainer.callbacks._resume import ResumeCallback
from lightning_optim.trainer.callbacks._schedule_free import ScheduleFreeCallback
from lightning_optim.trainer.callbacks._standstill import Standstill
from lightning_optim.trainer.callbacks._thawed import KeepsPolicy
from lightning_optim.trainer.strategies import StepsFused, read_whole_files, write_whole_folders

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler


def configure(module: LightningModule, config: OptimConfig, own: OwnHook | None = None) -> OptimizerLRScheduler:
    """Does the work of ``configure_optimizers``: builds optimizer and schedule, reports them, attaches what they need.

    Args:
        module: The module.
        config: What to build.
        own: The module's own ``configure_optimizers``, which this replaces. It is called to find out what the module's
            loop expects; what it builds is not stepped.

    Raises:
        IncompatibleTrainer: If the module's loop expects something else. For other errors see
            :func:`lightning_optim.build_optimizer` and :func:`lightning_optim.build_schedule`.
    """
    trainer = trainer_of(module)
    expected = Expected.ask(module, own)
    expected.check(config)
    name = config.lr_scheduler
    length = Length.of(trainer, config)
    asked = config.replace(lr=expected.lr(config))
    resolved = _resolve(trainer, module, asked, length, expected.only())
    if trainer is not None:
        KeepsPolicy.attach(trainer, module, resolved)
    for sentence in expected.losses(module, asked, resolved.lr):
        rank_zero_warn(sentence)
    # Before the schedule sets the learning rates of its first step.
    said = expected.schedule if name == MODULE_SCHEDULE.name else schedule_text(resolved)
    _announce(trainer, resolved, asked, said, length)
    if name == MODULE_SCHEDULE.name:
        return expected.follow(module, resolved.optimizer)
    configured = _scheduled(module, resolved, config, length)
    handed: Any = configured
    scheduler = handed["lr_scheduler"]["scheduler"] if isinstance(handed, dict) else None
    expected.replace_attributes(module, resolved.optimizer, scheduler)
    return configured


def _scheduled(
    module: LightningModule, resolved: ResolvedOptimizer, config: OptimConfig, length: Length
) -> OptimizerLRScheduler:
    """Returns the optimizer with its named schedule, as Lightning takes them."""
    trainer, optimizer = trainer_of(module), resolved.optimizer
    scheduler = schedule_of(resolved, length.total)
    if trainer is not None:
        ResumeCallback(optimizer, scheduler, config.overrides).attach(trainer)
        AfterFinders.attach(trainer, Built(resolved, config, scheduler))
    if scheduler is None:
        return optimizer
    monitor: str | None = None
    handed: Any = {"scheduler": scheduler, "interval": "step"}
    if isinstance(scheduler, ReduceLROnPlateau):
        monitor = parse(PlateauOptions, config.lr_scheduler_args, scheduler.name).monitor
        # In manual optimization Lightning neither steps the schedule nor needs the metric.
        automatic = module.automatic_optimization
        handed = lightning_config(scheduler, monitor) if automatic else {"scheduler": scheduler}
        if automatic and trainer is not None:
            PlateauCallback.attach(trainer, scheduler, monitor)
    if trainer is not None and not module.automatic_optimization:
        ManualSchedule.attach(trainer, scheduler.name, optimizer, scheduler, monitor)
    return {"optimizer": optimizer, "lr_scheduler": handed}


def attend(module: LightningModule, own: OwnHook) -> Any:
    """Reports what the module's own ``configure_optimizers`` builds, and attaches what it needs."""
    trainer = trainer_of(module)
    with built_by(partial(build, module)):
        configured = own()
    if trainer is None or configured is None:
        return configured
    # Some may have been built before, for instance in the module's __init__.
    for optimizer in take_apart(configured)[0]:
        if averaging_parts(optimizer):
            ScheduleFreeCallback.attach(trainer)
        layerwise = Layerwise.of(optimizer)
        if layerwise is not None:
            options = LayerwiseOptions(bucket_mb=layerwise.bucket_mb)
            LayerwiseCallback.attach(trainer, optimizer, options, f"the module's layerwise {type(optimizer).__name__}")
    AccumulatedCallback.attach(trainer)
    return configured


def trainer_of(module: LightningModule) -> Trainer | None:
    """Returns the Trainer that the module is attached to, if any; Fabric's stand-in does not count."""
    try:
        trainer = module.trainer
    except RuntimeError:
        return None
    return trainer if isinstance(trainer, packages.kin(Trainer)) else None


def build(module: LightningModule, target: Target, config: OptimConfig) -> Optimizer:
    """Builds one optimizer for (a part of) ``module``, without a schedule; reports it and attaches what it needs."""
    trainer = trainer_of(module)
    length = Length.of(trainer, config)
    resolved = _resolve(trainer, target, config, length)
    _announce(trainer, resolved, config, "none", length)
    if trainer is not None:
        AfterFinders.attach(trainer, Built(resolved, config))
    return resolved.optimizer


def _resolve(
    trainer: Trainer | None, target: Target, config: OptimConfig, length: Length, only: Set[Tensor] | None = None
) -> ResolvedOptimizer:
    facts = _facts(trainer) if trainer is not None else None
    resolved = resolve(target, config, total_steps=length.total, trainer=facts, only=only)
    if trainer is None:
        return resolved
    optimizer, spec, asked = resolved.optimizer, resolved.spec, f"optim={config.optim!r}"
    if isinstance(trainer.strategy, StepsFused):
        for part in resolved.each:
            trainer.strategy.note_identifier(
                part.optimizer, config.optim if part is resolved else part.request.config.optim
            )
    if isinstance(trainer.strategy, packages.kin(ModelParallelStrategy)):
        read_whole_files(trainer.strategy)
        write_whole_folders(trainer.strategy)
    if any(part.lr for part in resolved.each):
        Standstill.watch(trainer, optimizer, asked)
    if own_clips(optimizer):
        OwnClips.attach(trainer)
    if any(part.spec.averages_weights for part in resolved.each):
        ScheduleFreeCallback.attach(trainer)
    if spec.needs_graph:
        GraphCallback.attach(trainer)
    if spec.layerwise or steps_in_backward(trainer):
        options = LayerwiseOptions(**resolved.options.select("layerwise"))
        LayerwiseCallback.attach(trainer, optimizer, options, asked if spec.layerwise else None)
    # Last, to be the first that is told of a backward.
    AccumulatedCallback.attach(trainer)
    return resolved


def _facts(trainer: Trainer) -> TrainerFacts:
    rivals = packages.kin(WeightAveraging, StochasticWeightAveraging)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    averaging = (callback for callback in callbacks if isinstance(callback, rivals))
    changing = (c for c in callbacks if isinstance(c, packages.kin(GradientAccumulationScheduler)))
    return TrainerFacts(
        forgetful=forgetful_finder(trainer),
        averaging=next((type(callback).__name__ for callback in averaging), ""),
        scales=getattr(trainer.precision_plugin, "scaler", None) is not None,
        accumulates=max([trainer.accumulate_grad_batches, *(n for c in changing for n in c.scheduling.values())]),
        processes=trainer.world_size,
        makes_graphs=takes(trainer.lightning_module, "create_graph"),
        steps_in_backward=steps_in_backward(trainer),
        logs=not (trainer.barebones and trainer.lightning_module.automatic_optimization),
    )


def _announce(
    trainer: Trainer | None, resolved: ResolvedOptimizer, config: OptimConfig, schedule: str, length: Length
) -> None:
    """Arranges for the report of what was resolved when fit starts."""
    if trainer is None:
        return
    if length.warning and not has_finder(trainer):
        rank_zero_warn(length.warning)
    details = {"warmup_steps": length.warmup, "total_steps": length.total}
    schedule += "".join(f", {name}={value}" for name, value in details.items() if value)
    substitution = resolved.substitution(config.optim)
    if substitution:
        rank_zero_warn(substitution)
    ReportCallback.add(trainer, resolved, config.optim, schedule)
