"""Where the pipeline meets Lightning: shared by the mixin, the callback and the CLI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_optim import factory, report
from lightning_optim.callbacks.schedule_free import ScheduleFreeCallback
from lightning_optim.config import OptimConfig
from lightning_optim.options import parse
from lightning_optim.param_groups import Target
from lightning_optim.registry import REGISTRY
from lightning_optim.rules import TrainerFacts
from lightning_optim.schedules import PlateauOptions, build_schedule, get_schedule, resolve_warmup

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler


def configure(module: LightningModule, config: OptimConfig) -> OptimizerLRScheduler:
    """Does the work of ``configure_optimizers``: builds optimizer and schedule, reports them, attaches what they need.

    Raises:
        Everything :func:`lightning_optim.build_optimizer` and :func:`lightning_optim.build_schedule` raise.
    """
    trainer = module._trainer
    optimizer = build(module, module, config)
    if config.lr_scheduler is None:
        return optimizer
    # An optimizer that warms up by itself got warmup_steps already.
    warmup = config.warmup_steps if REGISTRY[config.optim].warmup == "schedule" else 0
    total = _total_steps(trainer) if _needs_total(config) else None
    scheduler = build_schedule(optimizer, config.lr_scheduler, total, warmup, config.lr_scheduler_args)
    options = parse(get_schedule(config.lr_scheduler).options, config.lr_scheduler_args, config.lr_scheduler)
    if isinstance(options, PlateauOptions):
        # Without a validation there is no new value of the metric.
        every = (trainer.check_val_every_n_epoch if trainer else None) or 1
        plateau = {"scheduler": scheduler, "monitor": options.monitor, "interval": "epoch", "frequency": every}
        return {"optimizer": optimizer, "lr_scheduler": plateau}  # type: ignore[return-value]
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def build(module: LightningModule, target: Target, config: OptimConfig) -> Optimizer:
    """Builds one optimizer for (a part of) ``module``; reports it and attaches the callbacks it needs to the Trainer."""
    trainer = module._trainer
    spec = REGISTRY[config.optim]
    warmup = 0
    if spec.warmup == "optimizer" and config.warmup_steps:
        warmup = resolve_warmup(config.warmup_steps, _total_steps(trainer) if config.warmup_steps < 1 else None)
    facts = _facts(trainer) if trainer is not None else None
    resolved = factory.resolve(target, config, warmup_steps=warmup, trainer=facts)
    if trainer is not None:
        if spec.averages_weights:
            ScheduleFreeCallback.attach(trainer)
        _report(trainer, resolved, config, warmup)
    return resolved.optimizer


def _facts(trainer: Trainer) -> TrainerFacts:
    return TrainerFacts(
        precision=str(trainer.precision),
        scales_loss=getattr(trainer.precision_plugin, "scaler", None) is not None,
        clips=bool(trainer.gradient_clip_val),
        callbacks=frozenset(base.__name__ for callback in trainer.callbacks for base in type(callback).__mro__),  # type: ignore[attr-defined]
    )


def _needs_total(config: OptimConfig) -> bool:
    assert config.lr_scheduler is not None
    return get_schedule(config.lr_scheduler).needs_total or 0 < config.warmup_steps < 1


def _total_steps(trainer: Trainer | None) -> int | None:
    """Returns the optimizer steps of the whole training, or ``None`` if there is no Trainer or no end."""
    if trainer is None:
        return None
    steps = trainer.estimated_stepping_batches
    return None if steps == float("inf") else int(steps)


def _report(trainer: Trainer, resolved: factory.ResolvedOptimizer, config: OptimConfig, warmup: int) -> None:
    schedule = config.lr_scheduler or "none"
    if config.warmup_steps:
        schedule += f", warmup_steps={warmup or config.warmup_steps}"
    rank_zero_info(report.describe(resolved, config.optim, schedule))
    values: dict[str, Any] = {"optimizer": report.hyperparameters(resolved, config.optim, schedule)}
    for logger in trainer.loggers:
        logger.log_hyperparams(values)
