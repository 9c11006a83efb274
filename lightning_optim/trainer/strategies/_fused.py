"""``strategy="fused"`` and ``"fused_ddp"``: every optimizer is stepped by torch's fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim._compat.lightning import MockOptimizer, after_closure
from lightning_optim._compat.torch import SCALES
from lightning_optim.build import rules
from lightning_optim.errors import IncompatibleTrainer
from lightning_optim.layerwise import Layerwise
from lightning_optim.stepping import FusedStep, parts_of
from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer.strategies._movable import Movable
from lightning_optim.trainer.strategies._one_device import OneDevice

if TYPE_CHECKING:
    _Base = Strategy
    _Precision = MixedPrecision
else:
    _Base = _Precision = object

_CHECKPOINT_KEY = MixedPrecision.__qualname__


class UnscalesFused(_Precision):
    """Mixin: all of :class:`FusedMixedPrecision` but Lightning's base class."""

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        if self.scaler is None or not getattr(optimizer, SCALES, False):
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        closure_result = closure()
        # A training_step that returned None ran no backward; the closure of manual optimization returns nothing.
        skipped = closure_result is None and model.automatic_optimization
        if not skipped:
            self.scaler.unscale_(optimizer)
        after_closure(self, model, optimizer)
        if skipped:
            return closure_result
        step_output = self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        return step_output

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        # Bypasses MixedPrecision, which refuses to clip for fused optimizers.
        packages.of(self, Precision).clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)

    def state_dict(self) -> dict[str, Any]:
        # Lightning would store it under the name of this class.
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the scaler as ``MixedPrecision`` does."""
        if self.scaler is not None:
            checkpoint[_CHECKPOINT_KEY] = self.scaler.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the scaler of this class or of ``MixedPrecision``."""
        if self.scaler is not None and _CHECKPOINT_KEY in checkpoint:
            self.scaler.load_state_dict(checkpoint[_CHECKPOINT_KEY])


class FusedMixedPrecision(UnscalesFused, MixedPrecision):
    """Mixed precision that unscales the gradients of a fused optimizer before they are clipped.

    Lightning leaves the unscaling to the fused kernel, so hooks and clipping would see scaled gradients; it refuses to
    clip, even if nothing is scaled (``"bf16-mixed"``). Here the order is the same as for every other optimizer:
    unscale, ``on_before_optimizer_step``, clip, step. The kernel receives the overflow flag and skips the step itself,
    without a synchronization of host and device. The strategies ``fused`` and ``fused_ddp`` replace Lightning's
    ``MixedPrecision`` by it; checkpoints are the same.

    Args:
        precision: ``"16-mixed"`` or ``"bf16-mixed"``.
        device: Type of the device, for autocast and the scaler.
        scaler: Scales the loss; ``None`` makes one for ``"16-mixed"``.
    """


class StepsFused(Movable, _Base):
    """Mixin for strategies that step every optimizer of the module by torch's fused kernel."""

    strategy_name: str
    _steps: tuple[FusedStep, ...] = ()
    _asked: Mapping[Optimizer, str] = MappingProxyType({})

    @property
    def precision_plugin(self) -> Precision:
        """The Trainer's plugin, or the one that replaces its ``MixedPrecision``."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if type(plugin) in packages.kin(MixedPrecision):
            exchanged: Any = plugin
            plugin = packages.of(self, FusedMixedPrecision)(exchanged.precision, exchanged.device, exchanged.scaler)
        elif isinstance(plugin, packages.kin(MixedPrecision)) and not isinstance(plugin, UnscalesFused):
            raise IncompatibleTrainer(
                f"strategy={self.strategy_name!r} with plugins={type(plugin).__name__}(...), a MixedPrecision, "
                "which refuses to clip for a fused optimizer. Derive it from lightning_optim.FusedMixedPrecision, or "
                f"use precision={plugin.precision!r} without it.",
                code="LO709",
            )
        packages.set_inherited(StepsFused, self, "precision_plugin", plugin)

    def setup_optimizers(self, trainer: Trainer) -> None:
        self._detach()
        super().setup_optimizers(trainer)
        module = trainer.lightning_module
        mocks = packages.kin(MockOptimizer)
        optimizers = [optimizer for optimizer in self.optimizers if not isinstance(optimizer, mocks)]
        parts = {optimizer: parts_of(optimizer) for optimizer in optimizers}
        for optimizer in optimizers:
            for part in parts[optimizer]:
                rules.check_fused(self._facts(module, part, Layerwise.of(optimizer) is not None))
        self._steps = tuple(FusedStep(part) for optimizer in optimizers for part in parts[optimizer])
        made = sorted({type(step.optimizer).__name__ for step in self._steps if step.built_plain})
        if made:
            rank_zero_info(f"strategy={self.strategy_name!r}: torch's fused kernels step {' and '.join(made)}.")

    def note_identifier(self, optimizer: Optimizer, identifier: str) -> None:
        """Records the identifier that an optimizer was built by, for error texts."""
        self._asked = {**self._asked, optimizer: identifier}

    def teardown(self) -> None:
        self._detach()
        super().teardown()

    def _detach(self) -> None:
        for step in self._steps:
            step.detach()
        self._steps, self._asked = (), {}

    def _facts(self, module: LightningModule, optimizer: Optimizer, in_backward: bool) -> rules.Fusing:
        names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        embeddings = [m for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse]
        stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        return rules.Fusing(
            strategy=self.strategy_name,
            optimizer=optimizer,
            asked=self._asked.get(optimizer),
            names=names,
            scales_loss=getattr(self.precision_plugin, "scaler", None) is not None,
            sparse=next((names[m.weight] for m in embeddings if m.weight in stepped), ""),
            in_backward=in_backward,
        )


class FusedStrategy(StepsFused, OneDevice, SingleDeviceStrategy):
    """Steps every optimizer by torch's fused kernel, on one device, with loss scaling and clipping together.

    ``torch.optim``'s Adam, AdamW, SGD and Adagrad are made fused where torch has a kernel for the device, whether the
    module built them itself or by name; one that is already fused stays so. When fit ends they are as they were built.
    :class:`~lightning_optim.FusedDDPStrategy` is for several devices.

    Args:
        device: Where to train; ``None`` means the Trainer's ``accelerator`` and ``devices``.
        accelerator: As in ``SingleDeviceStrategy``; the Trainer sets it.
        checkpoint_io: As in ``SingleDeviceStrategy``.
        precision_plugin: As in ``SingleDeviceStrategy``; the Trainer sets it.

    Raises:
        IncompatibleTrainer: When the Trainer is made, if it has several devices or nodes, an XLA device, or a precision
            plugin that cannot clip before a fused step; when fit starts, if an optimizer has no fused kernel for the
            device, or a wrong one.
    """

    strategy_name = "fused"


class FusedDDPStrategy(StepsFused, DDPStrategy):
    """Steps every optimizer by torch's fused kernel, in several processes with a copy of the model each.

    As ``DDPStrategy``, whose arguments it takes, with the optimizers and the loss scaling of
    :class:`~lightning_optim.FusedStrategy`. A gradient that overflows in one process skips the step in all.

    Raises:
        IncompatibleTrainer: As in :class:`~lightning_optim.FusedStrategy`.
    """

    strategy_name = layerwise_name = "fused_ddp"
