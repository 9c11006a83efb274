"""``strategy="npu"`` and ``"npu_ddp"``: Lightning's strategies for one and for several Ascend NPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from lightning_optim._compat.lightning import WrapsForAnyDevice
from lightning_optim.errors import IncompatibleTrainer
from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer.accelerators._npu import NPUAccelerator
from lightning_optim.trainer.strategies._one_device import OneDevice

if TYPE_CHECKING:
    _Base = Strategy
else:
    _Base = object


class _OnNPU(_Base):
    """Mixin: only NPUs, and mixed precision for them."""

    strategy_name: str

    @property
    def accelerator(self) -> Accelerator | None:
        """The accelerator, which the Trainer sets."""
        return super().accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        if not isinstance(accelerator, NPUAccelerator):
            raise IncompatibleTrainer(
                f"strategy={self.strategy_name!r} trains on NPUs, and the Trainer's accelerator is "
                f"{type(accelerator).__name__}. Use Trainer(accelerator='npu', strategy={self.strategy_name!r}).",
                code="LO712",
            )
        packages.set_inherited(_OnNPU, self, "accelerator", accelerator)

    @property
    def precision_plugin(self) -> Precision:
        """The precision plugin, which the Trainer sets."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision: Precision | None) -> None:
        # For an unknown accelerator Lightning makes one for CUDA, which would cast nothing here and disable its
        # GradScaler.
        if type(precision) is MixedPrecision and precision.device == "cuda":
            precision = MixedPrecision(precision.precision, "npu")  # type: ignore[arg-type]
        packages.set_inherited(_OnNPU, self, "precision_plugin", precision)


class NPUStrategy(_OnNPU, OneDevice, SingleDeviceStrategy):
    """Trains on one Ascend NPU.

    Parameters and batches go to the device. ``precision="16-mixed"`` and ``"bf16-mixed"`` cast on it; the first scales
    the loss with ``torch.amp.GradScaler("npu")``. Your own precision plugin for this device is kept. An identifier that
    ends in ``_layerwise`` steps during backward.

    Args:
        device: Where to train; ``None`` means the Trainer's ``devices``.
        accelerator: As in ``SingleDeviceStrategy``; the Trainer sets it.
        checkpoint_io: As in ``SingleDeviceStrategy``.
        precision_plugin: As in ``SingleDeviceStrategy``; the Trainer sets it.

    Raises:
        IncompatibleTrainer: When the Trainer is made, if its accelerator is not ours, or with several devices or nodes.
    """

    strategy_name = "npu"


class NPUDDPStrategy(_OnNPU, WrapsForAnyDevice, DDPStrategy):
    """Trains on several Ascend NPUs, one process each, with ``DistributedDataParallel``.

    Precision is as in :class:`~lightning_optim.NPUStrategy`. What Lightning's strategy does only for CUDA is done for
    NPUs: wrapping the model, barriers, and communication hooks.

    Args:
        process_group_backend: The backend of ``torch.distributed``; torch_npu provides ``"hccl"``.
        **ddp: As in ``DDPStrategy``.

    Raises:
        IncompatibleTrainer: When the Trainer is made, if its accelerator is not ours.
    """

    strategy_name = layerwise_name = "npu_ddp"

    def __init__(self, process_group_backend: str = "hccl", **ddp: Any) -> None:
        super().__init__(process_group_backend=process_group_backend, **ddp)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.barrier(device_ids=self.determine_ddp_device_ids())
