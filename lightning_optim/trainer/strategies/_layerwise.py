"""``strategy="layerwise"``: every optimizer is stepped during backward, on one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

from lightning_optim.layerwise import Layerwise
from lightning_optim.table import LayerwiseOptions, describe, parse
from lightning_optim.trainer.callbacks._layerwise import LayerwiseCallback
from lightning_optim.trainer.strategies._movable import Movable
from lightning_optim.trainer.strategies._one_device import OneDevice

if TYPE_CHECKING:
    _Base = Strategy
else:
    _Base = object


class StepsInBackward(Movable, _Base):
    """Mixin for strategies that make every optimizer of the module layerwise, however it was built."""

    #: The flag, and the name by which the rules know it.
    layerwise_name: str
    layerwise_options: LayerwiseOptions

    def take_options(self, arguments: Mapping[str, Any]) -> None:
        """Takes the layerwise options among the arguments of ``__init__``.

        Raises:
            InvalidOption: If one is of the wrong type or out of range.
        """
        given = {info.name: arguments[info.name] for info in describe(LayerwiseOptions)}
        given = {name: value for name, value in given.items() if value is not None}
        self.layerwise_options = parse(LayerwiseOptions, given, self.layerwise_name)

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            self.prepare(LayerwiseCallback.attach(trainer, optimizer, LayerwiseOptions()))

    def prepare(self, layerwise: Layerwise) -> None:
        """Tells the engine how the strategy's processes work together."""


class StepsInBackwardAlone(StepsInBackward, OneDevice):
    """Mixin: all of :class:`LayerwiseStrategy` but Lightning's base class."""

    def __init__(
        self,
        bucket_mb: float | None = None,
        norm_clipping: str | None = None,
        log_grad_norm: bool | None = None,
        device: torch.device | str | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        overflow: str | None = None,
        gradient_readers: str | None = None,
        norm_budget_mb: float | None = None,
    ) -> None:
        super().__init__(device, accelerator, checkpoint_io, precision_plugin)
        self.take_options(locals())


class LayerwiseStrategy(StepsInBackwardAlone, SingleDeviceStrategy):
    """Steps every optimizer during backward, on one device: CPU, CUDA or MPS.

    An identifier that ends in ``_layerwise`` does not need it; the module's own optimizer becomes layerwise by it.
    :class:`~lightning_optim.LayerwiseDDPStrategy` is for several devices.

    Args:
        bucket_mb: MiB of live gradients besides the one being computed, 0 for one parameter at a time; ``None``
            takes an eighth of all gradients, at least 256 KiB (or half of them) and at most 32 MiB.
        norm_clipping: How ``gradient_clip_val`` clips by norm: ``"exact"`` (the default) runs a backward that only
            measures before the one that steps, ``"previous"`` uses the norm of the previous step, ``"per_parameter"``
            clips each parameter's gradient by itself.
        log_grad_norm: Whether to log the norm before clipping as ``grad_norm``.
        overflow: With ``precision="16-mixed"``: ``"skip_step"`` runs a backward that only measures and skips the whole
            step if a gradient overflowed, ``"skip_bucket"`` (the default, with a warning) steps the other buckets.
        gradient_readers: ``"warn"`` (the default) warns of hooks that look at gradients already stepped and freed,
            checked in the first two steps; ``"ignore"`` does not.
        norm_budget_mb: MiB of gradients that may stay alive so that ``norm_clipping="exact"`` and
            ``overflow="skip_step"`` need no backward that only measures; ``None`` means 0.
        device: Where to train; ``None`` means where the Trainer's ``accelerator`` and ``devices`` say.
        accelerator: As in ``SingleDeviceStrategy``; the Trainer sets it.
        checkpoint_io: As in ``SingleDeviceStrategy``.
        precision_plugin: As in ``SingleDeviceStrategy``; the Trainer sets it.

    Raises:
        InvalidOption: If an option is of the wrong type or out of range.
        IncompatibleTrainer: When the Trainer is made, if it has several devices or nodes, or an XLA device; when fit
            starts, if the module cannot be trained this way.
    """

    strategy_name = layerwise_name = "layerwise"
