"""Drives optimizers stepped during backward: which backward steps, how it clips, how the loss was scaled."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_optim._compat.lightning import is_accumulating, loaded_checkpoint
from lightning_optim._compat.torch import set_buffer_donation
from lightning_optim.build import rules
from lightning_optim.errors import IncompatibleTrainer
from lightning_optim.layerwise import Clipping, Layerwise, OuterScaler
from lightning_optim.stepping import own_clips
from lightning_optim.table import LayerwiseOptions
from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer.callbacks._attached import Attached
from lightning_optim.trainer.callbacks._gradient_readers import GradientReaders

_KEY = "layerwise_gradient_norms"


class LayerwiseCallback(Attached):
    """Steps layerwise optimizers in the backward of the last micro-batch, while fit runs.

    The mixin, :class:`~lightning_optim.OptimCallback` and the layerwise strategies attach it automatically. It honours
    the Trainer's ``accumulate_grad_batches``, ``gradient_clip_val`` and ``precision``. When fit ends, even by an
    exception, the optimizers step normally again.
    """

    def __init__(self) -> None:
        self._options: dict[Layerwise, LayerwiseOptions] = {}
        self._facts: dict[Layerwise, rules.Stepping] = {}
        self._readers: GradientReaders | None = None
        self._scaler: GradScaler | None = None
        self._may_step = True
        # A compiled graph that may overwrite its buffers in backward cannot be retained for a second one.
        self._donates: bool | None = None
        self._norms: list[Tensor | None] = []

    @classmethod
    def attach(
        cls, trainer: Trainer, optimizer: Optimizer, options: LayerwiseOptions, name: str | None = None
    ) -> Layerwise:
        """Lets the fit that is being set up step ``optimizer`` during backward.

        Args:
            trainer: The Trainer, whose strategy may have its own options.
            optimizer: The optimizer; it is made layerwise if it is not.
            options: The optimizer's options.
            name: What the user typed to get it, for error texts; ``None`` if it was the strategy.

        Returns:
            The engine that steps it.

        Raises:
            IncompatibleTrainer: If it cannot be stepped during backward here, or the options contradict the strategy's.
        """
        callback = cls._of(trainer)
        if not callback._options:
            callback._restore(loaded_checkpoint(trainer))
        layerwise = Layerwise.of(optimizer)
        if layerwise in callback._options:
            return layerwise
        try:
            merged = _merge(options, getattr(trainer.strategy, "layerwise_options", LayerwiseOptions()))
            strategy = _strategy_name(trainer.strategy)
            facts = _facts(trainer, optimizer, merged, name or f"strategy={strategy!r}", strategy)
            rules.check_layerwise(facts)
        except IncompatibleTrainer:
            if layerwise is not None:
                layerwise.detach()
            raise
        if layerwise is None:
            layerwise = Layerwise(optimizer)
        # All of the module's, including those that are frozen now.
        layerwise.names.update({p: parameter_name for parameter_name, p in trainer.lightning_module.named_parameters()})
        layerwise.bucket_mb = merged.bucket_mb
        layerwise.wants_norm = bool(merged.log_grad_norm)
        layerwise.norm_budget_mb = merged.norm_budget_mb
        layerwise.skips_whole_steps = merged.overflow == "skip_step"
        if callback._norms:
            layerwise.gradient_norm = callback._norms.pop(0)
        callback._options[layerwise] = merged
        callback._facts[layerwise] = facts
        return layerwise

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        measures = any(_measures(trainer, layerwise, options) for layerwise, options in self._options.items())
        if measures or any(layerwise.replicas or layerwise.skips_whole_steps for layerwise in self._options):
            self._donates = set_buffer_donation(False)
        for layerwise, options in self._options.items():
            if options.norm_budget_mb is not None and not layerwise.fits_budget():
                rank_zero_warn(
                    f"norm_budget_mb={options.norm_budget_mb:g} is not used: all gradients take "
                    f"{layerwise.gradient_bytes / 2**20:.3g} MiB, so a backward that only measures comes before every "
                    "step. Raise it, or leave norm_budget_mb out."
                )
        precision = trainer.precision_plugin
        self._readers = self._watch(trainer)
        own_clipping = precision.clip_gradients
        precision.clip_gradients = partial(self._clip_alive, trainer, own_clipping)  # type: ignore[method-assign]
        self._scaler = getattr(precision, "scaler", None)
        if self._scaler is None:
            return
        precision.scaler = OuterScaler(self._scaler)  # type: ignore[attr-defined]
        for layerwise in self._driven(trainer):
            layerwise.scaler = self._scaler
        # With a scaler Lightning calls the closure before optimizer.step, and the module's own may not step at all.
        self._may_step = not packages.is_overridden("optimizer_step", pl_module)
        if not self._may_step:
            rank_zero_warn(
                f"{type(pl_module).__name__} overrides optimizer_step: with loss scaling it is not known beforehand "
                "whether it steps, so gradients are stepped after backward and all kept until then."
            )
        elif self._skips_buckets(trainer):
            rank_zero_warn(
                "With loss scaling, a gradient that overflows skips only its own bucket, and the others are stepped; "
                "PyTorch skips the whole step. overflow='skip_step' (in optim_args or in the strategy) does the same, "
                "for a second backward in every step; overflow='skip_bucket' keeps this without a warning."
            )

    def _skips_buckets(self, trainer: Trainer) -> bool:
        """Whether an overflow skips only a bucket, without the user having chosen that."""
        if not trainer.lightning_module.automatic_optimization or trainer.accumulate_grad_batches > 1:
            return False
        driven = [(layerwise, self._options[layerwise]) for layerwise in self._driven(trainer)]
        # What measures skips whole steps; clipping by the previous norm rarely does.
        return any(
            options.norm_clipping == "previous" or not _measures(trainer, layerwise, options)
            for layerwise, options in driven
            if options.overflow is None
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._readers is not None:
            self._readers.on_train_batch_start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._readers is not None:
            self._readers.on_train_batch_end()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._readers is not None:
            self._readers.on_before_backward()
        self._prepare(trainer, pl_module, loss)
        if self._readers is not None:
            self._readers.stepped = any(layerwise.is_stepping for layerwise in self._driven(trainer))

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not pl_module.automatic_optimization:
            return
        for layerwise in self._driven(trainer):
            clipping = _clipping(trainer, self._options[layerwise])
            if not self._steps_now(trainer, layerwise) or layerwise.must_wait(clipping, self._scaler):
                continue
            layerwise.prepare(lambda: pl_module.backward(loss, retain_graph=True), clipping, self._scaler)
            layerwise.begin(clipping, self._scaler)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            return
        for layerwise in self._driven(trainer):
            if layerwise.is_stepping:
                layerwise.end()
            else:
                layerwise.accumulated = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        layerwise = Layerwise.of(optimizer)
        options = self._options.get(layerwise) if layerwise else None
        if layerwise is None or options is None:
            return
        if self._readers is not None:
            self._readers.stepped = True
        if layerwise.has_gradients() and (options.log_grad_norm or options.norm_clipping == "previous"):
            layerwise.measure_alive()
        if options.log_grad_norm and layerwise.gradient_norm is not None:
            several = len(trainer.optimizers) > 1
            number = [Layerwise.of(other) for other in trainer.optimizers].index(layerwise)
            pl_module.log(f"grad_norm_{number}" if several else "grad_norm", layerwise.gradient_norm)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if any(layerwise.replicas for layerwise in self._driven(trainer)):
            # A gloo thread may still have to hand the last buffer back to Python. It needs the GIL, which is free while
            # this waits, and aborts the process if the interpreter has exited before it gets it.
            trainer.strategy.barrier("layerwise")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stores the norms that the next step clips by."""
        if any(self._options[layerwise].norm_clipping == "previous" for layerwise in self._driven(trainer)):
            norms = [layerwise.gradient_norm for layerwise in self._driven(trainer)]
            checkpoint[_KEY] = [None if norm is None else norm.cpu() for norm in norms]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restore(checkpoint)
        for layerwise, norm in zip(self._driven(trainer), self._norms, strict=False):
            layerwise.gradient_norm = norm

    def _driven(self, trainer: Trainer) -> Iterator[Layerwise]:
        """Yields the engines of the Trainer's optimizers; some attached earlier may have been replaced."""
        for optimizer in trainer.optimizers:
            layerwise = Layerwise.of(optimizer)
            if layerwise in self._options:
                yield layerwise

    def _steps_now(self, trainer: Trainer, layerwise: Layerwise) -> bool:
        """Whether the backward that starts is followed by a step of this optimizer."""
        if self._scaler is None:
            return layerwise.in_closure
        return self._may_step and not is_accumulating(trainer)

    def _clip_alive(
        self, trainer: Trainer, own_clipping: Callable[..., None], optimizer: Optimizer, *args: Any, **kwargs: Any
    ) -> None:
        """Replaces the precision plugin's clipping, for gradients that were not clipped and stepped in backward."""
        layerwise = Layerwise.of(optimizer)
        clipping = _clipping(trainer, self._options[layerwise]) if layerwise in self._options else None
        if layerwise is None or (clipping is None and layerwise.has_gradients()):
            own_clipping(optimizer, *args, **kwargs)
        elif clipping is not None and layerwise.has_gradients():
            layerwise.clip_alive(clipping)
        elif not trainer.lightning_module.automatic_optimization:
            raise IncompatibleTrainer(
                "self.clip_gradients() finds no gradients: they were stepped during backward. Clip them there, with "
                "Layerwise.of(optimizer).stepping(clipping=Clipping('value', 0.5)) or Clipping('per_parameter', 1.0), "
                "or run that backward outside of stepping().",
                code="LO618",
            )

    def _watch(self, trainer: Trainer) -> GradientReaders | None:
        watched = {
            parameter: (layerwise.names.get(parameter, ""), partial(rules.gradient_is_gone, self._facts[layerwise]))
            for layerwise in self._driven(trainer)
            if self._options[layerwise].gradient_readers != "ignore"
            for group in layerwise.optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        }
        return GradientReaders(trainer, watched) if watched else None

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        self._norms = list(checkpoint.get(_KEY, ()))

    def _detach(self, trainer: Trainer) -> None:
        if self._readers is not None:
            self._readers.stop()
        for layerwise in self._options:
            layerwise.detach()
        precision = trainer.precision_plugin
        vars(precision).pop("clip_gradients", None)
        if self._donates is not None:
            set_buffer_donation(self._donates)
            self._donates = None
        if self._scaler is not None:
            precision.scaler = self._scaler  # type: ignore[attr-defined]
        super()._detach(trainer)


def _merge(of_optimizer: LayerwiseOptions, of_strategy: LayerwiseOptions) -> LayerwiseOptions:
    """Returns the options of optimizer and strategy combined."""
    merged = {}
    for field in dataclasses.fields(LayerwiseOptions):
        one, other = getattr(of_optimizer, field.name), getattr(of_strategy, field.name)
        if None not in (one, other) and one != other:
            raise IncompatibleTrainer(
                f"{field.name} is given twice: optim_args has {field.name}={one!r} and the strategy "
                f"{field.name}={other!r}. Keep one of them.",
                code="LO206",
            )
        merged[field.name] = other if one is None else one
    return LayerwiseOptions(**merged)


def _clipping(trainer: Trainer, options: LayerwiseOptions) -> Clipping | None:
    """Returns how the Trainer's flags and the options clip."""
    limit = trainer.gradient_clip_val
    if not limit or limit <= 0:
        return None
    if trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
        return Clipping("value", limit)
    how = options.norm_clipping or "exact"
    return Clipping("norm" if how == "exact" else how, limit)


def _measures(trainer: Trainer, layerwise: Layerwise, options: LayerwiseOptions) -> bool:
    """Whether a backward that only measures comes before the one that steps, at least once, because of clipping."""
    clippings = [_clipping(trainer, options), *(clipping for clipping, _ in own_clips(layerwise.optimizer))]
    return any(clipping is not None and clipping.kind in ("norm", "previous") for clipping in clippings)


def steps_in_backward(trainer: Trainer) -> bool:
    """Whether the Trainer's strategy makes every optimizer layerwise."""
    return _strategy_name(trainer.strategy) in rules.STEPPING_STRATEGIES


def _strategy_name(strategy: Strategy) -> str:
    """Returns the rules' name for a strategy, or the path of an unknown class."""
    own = getattr(strategy, "layerwise_name", None)
    if own is not None:
        return str(own)
    families = (
        # Subclasses before their bases.
        (SingleDeviceXLAStrategy, "single_xla"),
        (XLAStrategy, "xla"),
        (SingleDeviceStrategy, "single_device"),
        (DDPStrategy, "ddp"),
        (FSDPStrategy, "fsdp"),
        (DeepSpeedStrategy, "deepspeed"),
        (ModelParallelStrategy, "ModelParallelStrategy"),
    )
    unknown = f"{type(strategy).__module__}.{type(strategy).__qualname__}"
    return next((name for family, name in families if isinstance(strategy, packages.kin(family))), unknown)


def _facts(
    trainer: Trainer, optimizer: Optimizer, options: LayerwiseOptions, name: str, strategy: str
) -> rules.Stepping:
    module = trainer.lightning_module
    clipping = _clipping(trainer, options)
    return rules.Stepping(
        name=name,
        strategy=strategy,
        automatic=module.automatic_optimization,
        clips_norm=clipping is not None and clipping.kind != "value",
        parts_clip=frozenset(clipping.kind for clipping, _ in own_clips(optimizer)),
        norm_clipping=options.norm_clipping,
        norm_budget_mb=options.norm_budget_mb,
        own_clipping=packages.is_overridden("configure_gradient_clipping", module),
        retains_graph=takes(module, "retain_graph"),
        overflow=options.overflow,
        scales=getattr(trainer.precision_plugin, "scaler", None) is not None,
        sparse=_sparse_parameter(module),
    )


def takes(module: LightningModule, argument: str) -> bool:
    """Whether the module's ``backward`` can be called with an argument of ``Tensor.backward``."""
    parameters = inspect.signature(module.backward).parameters.values()
    return any(p.kind is p.VAR_KEYWORD or p.name == argument for p in parameters)


def _sparse_parameter(module: nn.Module) -> str:
    for name, child in module.named_modules():
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag)) and child.sparse:
            return f"{name}.weight"
    return ""
