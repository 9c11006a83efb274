"""What the strategies for one device share: they train on the Trainer's device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_optim._compat.lightning import set_root_device
from lightning_optim.errors import IncompatibleTrainer

if TYPE_CHECKING:
    _Base = SingleDeviceStrategy
else:
    _Base = object


class SingleProcess(_Base):
    """Mixin: one device in one process, and an error if the Trainer has more."""

    _parallel_devices: list[torch.device] | None = None

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The device in a list; the Trainer sets it from its accelerator and its ``devices``."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        self._check(devices)
        self._refuse_several(len(devices), "devices")
        self._parallel_devices = devices
        set_root_device(self, self._opened(devices[0]))

    def _check(self, devices: Sequence[torch.device]) -> None:
        """Refuses devices of a type that is not for this strategy."""

    def _opened(self, device: torch.device) -> torch.device:
        return torch.device(device)

    @property
    def for_several(self) -> str:
        """The strategy for several devices."""
        return f"{self.strategy_name}_ddp"

    @property
    def num_nodes(self) -> int:
        """1; the Trainer sets this attribute."""
        return 1

    @num_nodes.setter
    def num_nodes(self, number: int) -> None:
        # Each node would train its own model.
        self._refuse_several(number, "num_nodes")

    def _refuse_several(self, number: int, flag: str) -> None:
        if number > 1:
            raise IncompatibleTrainer(
                f"strategy={self.strategy_name!r} steps on one device, and the Trainer has {number} "
                f"{flag.removeprefix('num_')}. Use Trainer(strategy={self.for_several!r}), or {flag}=1.",
                code="LO710",
            )


class OneDevice(SingleProcess):
    """Mixin for subclasses of ``SingleDeviceStrategy`` that are registered by name.

    Lightning builds such a strategy without a device, and would train on the CPU with any accelerator. But it sets
    ``parallel_devices`` if a strategy has it, which is how the device gets here.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(device or "cpu", accelerator, checkpoint_io, precision_plugin)
        self._parallel_devices = None if device is None else [self.root_device]

    def _check(self, devices: Sequence[torch.device]) -> None:
        if torch.device(devices[0]).type == "xla":
            raise IncompatibleTrainer(
                f"strategy={self.strategy_name!r} does not train on XLA devices. Use "
                f"Trainer(strategy={'xla_syncfree' if len(devices) > 1 else 'single_xla_syncfree'!r}).",
                code="LO711",
            )
