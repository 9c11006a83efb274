"""``accelerator="pjrt"``: any device that torch_xla's runtime is told to use, TPU or not."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from lightning.pytorch.accelerators import XLAAccelerator
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_optim._compat.torch_xla import tpu_count
from lightning_optim.errors import IncompatibleTrainer, MissingDependency
from lightning_optim.table import XLA, availability

# Whether the user has set PJRT_DEVICE; None if that cannot be known: when torch_xla is imported, it writes the device
# it takes into that variable. Lightning imports torch_xla for every Trainer, even for one on the CPU.
_chosen: bool | None = None if "torch_xla" in sys.modules else "PJRT_DEVICE" in os.environ


class PJRTAccelerator(XLAAccelerator):
    """The devices of torch_xla's runtime (PJRT), chosen by the environment variable ``PJRT_DEVICE``.

    Lightning's own ``accelerator="tpu"`` counts TPUs, and is not available without one. This one takes the device in
    ``PJRT_DEVICE``, such as ``TPU``, ``CPU`` or the name of a plugin. It needs one of the strategies
    ``single_xla_syncfree`` and ``xla_syncfree``, or Lightning's ``SingleDeviceXLAStrategy(device)`` or, on several
    devices, ``xla``. Any other strategy, or none, is an error when the Trainer is made, a ``ValueError`` if it is
    Lightning's.

    If torch_xla was imported before lightning_optim and ``PJRT_DEVICE`` is ``CPU``, it cannot be known who set it:
    that is a warning.

    Raises:
        MissingDependency: If torch_xla is not installed, or not for this torch.
        IncompatibleTrainer: If torch_xla finds no accelerator and would take the CPU, and ``PJRT_DEVICE`` was not set
            when lightning_optim was imported. It may be set later if nothing has imported torch_xla yet.
    """

    def __init__(self) -> None:
        require_torch_xla("Trainer(accelerator='pjrt')")
        _refuse_cpu_by_default()
        super().__init__()

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> int | list[int]:
        """Checks ``Trainer(devices=...)``: one device, all of them, or one by its number in a list.

        Raises:
            IncompatibleTrainer: If it is something else.
        """
        count = PJRTAccelerator.auto_device_count()
        parsed: Any = _numbers(devices)
        if isinstance(parsed, int) and parsed in (1, count):
            return parsed
        if isinstance(parsed, list) and len(parsed) == 1 and 0 <= parsed[0] < count:
            return parsed
        several = f", {count}" if count > 1 else ""
        raise IncompatibleTrainer(
            f"Trainer(devices={devices!r}) with accelerator='pjrt': PJRT_DEVICE={_kind()} has {count} to train on. Use "
            f"devices='auto', 1{several} or one number in a list, as [0].",
            code="LO714",
        )

    @staticmethod
    def get_parallel_devices(devices: int | list[int]) -> list[torch.device]:
        """Returns the devices by number, without opening them: that must wait for a launcher's processes."""
        numbers = range(devices) if isinstance(devices, int) else devices
        return [torch.device("xla", number) for number in numbers]

    @staticmethod
    def auto_device_count() -> int:  # type: ignore[override]
        """Returns how many devices there are to train on, without opening them; for ``CPU`` always one.

        torch_xla can split the host into several devices, but has no collectives between them.
        """
        from torch_xla.experimental import plugins

        if _kind() == "TPU":
            return tpu_count()
        return int(plugins.default().physical_chip_count()) if plugins.using_dynamic_plugins() else 1

    @staticmethod
    def is_available() -> bool:  # type: ignore[override]
        """Whether torch_xla is installed and has a device."""
        return bool(availability.check(XLA)) and PJRTAccelerator.auto_device_count() > 0

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Returns the bytes of memory used and available; empty if the runtime does not count them."""
        import torch_xla.core.xla_model as xm

        try:
            return dict(xm.get_memory_info(device))
        except RuntimeError:  # PJRT on CPU
            return {}

    @staticmethod
    def name() -> str:
        return "pjrt"


def require_torch_xla(what: str) -> None:
    """Raises :class:`MissingDependency`, with the command to type, if torch_xla cannot be used for ``what``."""
    available = availability.check(XLA)
    if not available:
        raise MissingDependency(f"{what} cannot run here: " + "; ".join(available.reasons), code="LO107")


def _kind() -> str | None:
    from torch_xla import runtime

    return runtime.device_type()  # type: ignore[no-any-return]


def _refuse_cpu_by_default() -> None:
    """Refuses the CPU that torch_xla chooses, when it is imported, if it finds no other device."""
    global _chosen
    if "torch_xla" not in sys.modules:
        _chosen = "PJRT_DEVICE" in os.environ
    kind = _kind()
    if not kind or (kind == "CPU" and _chosen is False):
        os.environ.pop("PJRT_DEVICE", None)
        # torch_xla writes it only once: the next value is the user's.
        _chosen = True
        raise IncompatibleTrainer(
            "Trainer(accelerator='pjrt'), and PJRT_DEVICE was not set when lightning_optim was imported: torch_xla "
            "finds no TPU and would train on the CPU. Set PJRT_DEVICE to the device that is meant, or PJRT_DEVICE=CPU, "
            "before that.",
            code="LO715",
        )
    if kind == "CPU" and _chosen is None:
        rank_zero_warn(
            "Trainer(accelerator='pjrt') trains on the CPU: PJRT_DEVICE=CPU was set by you or by torch_xla, which was "
            "imported before lightning_optim. Import lightning_optim first to have this checked."
        )


def _numbers(devices: int | str | list[int]) -> int | list[int] | None:
    if not isinstance(devices, str):
        return devices
    try:
        return [int(number) for number in devices.split(",") if number] if "," in devices else int(devices)
    except ValueError:
        return None
