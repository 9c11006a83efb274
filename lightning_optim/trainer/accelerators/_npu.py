"""``accelerator="npu"``: Huawei's Ascend, through the device that torch_npu adds to torch."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy

from lightning_optim.errors import IncompatibleTrainer, MissingDependency
from lightning_optim.table import NPU, availability


class NPUAccelerator(Accelerator):
    """Trains on Huawei's Ascend NPUs, with ``Trainer(accelerator="npu", strategy="npu")``.

    Lightning does not know this device. If it chose the strategy, it would silently train on the CPU: that is refused.
    torch_npu is not imported here; torch loads it when torch is imported.

    Raises:
        MissingDependency: If there is no NPU, or torch cannot use it; the text says what to install.
        IncompatibleTrainer: For ``devices`` that do not exist; when training starts, if strategy or precision are not
            for this device.
    """

    def __init__(self) -> None:
        if not self.is_available():
            raise MissingDependency(f"Trainer(accelerator='npu') cannot run here: {_why_not()}.", code="LO107")

    def setup_device(self, device: torch.device) -> None:
        if device.type != "npu":
            raise IncompatibleTrainer(
                f"Trainer(accelerator='npu') with a strategy that would train on {device.type!r}: Lightning's own "
                "strategies do not know this device. Use Trainer(accelerator='npu', strategy='npu'), or "
                "strategy='npu_ddp' for several.",
                code="LO712",
            )
        torch.get_device_module("npu").set_device(device)

    def setup(self, trainer: Trainer) -> None:
        strategy = type(trainer.strategy)
        if issubclass(strategy, DDPStrategy) and all(
            getattr(strategy, name) is getattr(DDPStrategy, name) for name in ("configure_ddp", "_setup_model")
        ):
            flag = getattr(strategy, "strategy_name", "ddp")
            raise IncompatibleTrainer(
                f"Trainer(accelerator='npu', strategy={flag!r}): Lightning's DDPStrategy wraps the model on a CUDA "
                "stream. Use strategy='npu_ddp', or 'layerwise_ddp'.",
                code="LO712",
            )
        precision = trainer.precision_plugin
        if isinstance(precision, MixedPrecision) and precision.device != "npu":
            raise IncompatibleTrainer(
                f"precision={precision.precision!r} would cast on {precision.device!r} and leave the NPU in float32. "
                "Use Trainer(accelerator='npu', strategy='npu') or strategy='npu_ddp', or give "
                f"plugins=[MixedPrecision({precision.precision!r}, 'npu')].",
                code="LO713",
            )

    def teardown(self) -> None:
        torch.get_device_module("npu").empty_cache()

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Returns what ``torch.npu.memory_stats`` counts, for ``DeviceStatsMonitor``."""
        stats: dict[str, Any] = torch.get_device_module("npu").memory_stats(device)
        return stats

    @staticmethod
    def parse_devices(devices: int | str | list[int] | tuple[int, ...]) -> list[int]:
        """Returns the indices that ``Trainer(devices=...)`` asks for: a number of NPUs, ``-1``, ``"0,1"`` or a list.

        Raises:
            IncompatibleTrainer: If one does not exist, or is named twice.
        """
        count = NPUAccelerator.auto_device_count()
        try:
            if isinstance(devices, str):
                numbers = [int(part) for part in devices.split(",") if part.strip()]
                indices = numbers if "," in devices else _first(numbers[0], count)
            else:
                indices = _first(devices, count) if isinstance(devices, int) else [int(index) for index in devices]
        except (ValueError, TypeError, IndexError):
            indices = []
        if not indices or len(set(indices)) < len(indices) or not set(indices) <= set(range(count)):
            raise IncompatibleTrainer(
                f"devices={devices!r} with accelerator='npu': this machine has {count}. Use a number from 1 to "
                f"{count}, -1 for all, or different indices such as [0].",
                code="LO714",
            )
        return indices

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("npu", index) for index in devices]

    @staticmethod
    def auto_device_count() -> int:
        return int(torch.get_device_module("npu").device_count())

    @staticmethod
    def is_available() -> bool:
        """Whether torch knows the device and finds one."""
        module = getattr(torch, "npu", None)
        return module is not None and bool(module.is_available())

    @staticmethod
    def name() -> str:
        return "npu"


def _first(number: int, count: int) -> list[int]:
    return list(range(count if number == -1 else number))


def _why_not() -> str:
    found = availability.check(NPU)
    if not found:
        return "; ".join(found.reasons)
    if not hasattr(torch, "npu"):
        return "torch-npu is installed, but not loaded: unset TORCH_DEVICE_BACKEND_AUTOLOAD, or import torch_npu first"
    return "torch_npu finds no NPU: see what `npu-smi info` says, and whether ASCEND_RT_VISIBLE_DEVICES hides it"
