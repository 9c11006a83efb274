"""``strategy="single_xla_syncfree"`` and ``"xla_syncfree"``: XLA devices, on one or on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import XLACheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision, XLAPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor

from lightning_optim._compat.lightning import StartsNoneAlone
from lightning_optim.errors import IncompatibleTrainer
from lightning_optim.layerwise import Layerwise, Replicas
from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer.accelerators._pjrt import require_torch_xla
from lightning_optim.trainer.strategies._one_device import SingleProcess
from lightning_optim.trainer.strategies._xla_precision import XLASyncFreePrecision

if TYPE_CHECKING:
    _Base = Strategy
else:
    _Base = object


class XLAReplicas(Replicas):
    """The processes of torch_xla's runtime, each with a device and a copy of the model."""

    @property
    def size(self) -> int:
        from torch_xla import runtime

        return int(runtime.world_size())

    def average(self, flat: Tensor) -> Callable[[], object]:
        import torch_xla.core.xla_model as xm

        # Part of the step's graph, so there is nothing to wait for. Copied, because the gradients are views of it.
        flat.copy_(xm.all_reduce(xm.REDUCE_SUM, flat, scale=1 / self.size))
        return lambda: None

    def exchange(self, order: Sequence[int]) -> list[list[int]]:
        import torch_xla.core.xla_model as xm

        orders: list[list[int]] = xm.mesh_reduce("lightning_optim.order", list(order), list)
        return orders


class _OnXLA(_Base):
    """Mixin of both strategies: requires XLA devices and uses our own precision plugin."""

    strategy_name: str

    @property
    def precision_plugin(self) -> XLAPrecision:
        """Lightning's ``XLAPrecision`` is replaced by ours for the same precision."""
        plugin = super().precision_plugin
        return plugin if isinstance(plugin, XLASyncFreePrecision) else XLASyncFreePrecision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if type(plugin) is XLAPrecision:
            # Removes its environment variables, before torch_xla reads them.
            plugin.teardown()
            plugin = XLASyncFreePrecision(plugin.precision)  # type: ignore[arg-type]
        if plugin is not None and not isinstance(plugin, XLASyncFreePrecision):
            raise IncompatibleTrainer(
                f"strategy={self.strategy_name!r} with the plugin {type(plugin).__name__}, which does not know XLA. "
                "Use plugins=XLASyncFreePrecision('bf16-mixed') or a class derived from it, or Trainer(precision=...).",
                code="LO717",
            )
        packages.set_inherited(_OnXLA, self, "precision_plugin", plugin)

    def setup(self, trainer: Trainer) -> None:
        _refuse_narrow_floats(self.root_device)
        if trainer.training:
            _refuse_late_device(self.root_device)
        super().setup(trainer)

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        if any(type(optimizer) is torch.optim.AdamW for optimizer in self.optimizers):
            rank_zero_info(
                f"strategy={self.strategy_name!r} steps torch.optim.AdamW as it is; optim='adamw_torch_xla' takes "
                "torch_xla's sync-free kernel."
            )
        if any(Layerwise.of(optimizer) is not None for optimizer in self.optimizers):
            rank_zero_info(
                f"strategy={self.strategy_name!r}: a step is one graph on XLA, which frees gradients as it sees fit; "
                "stepping during backward need not save memory."
            )

    def _check(self, devices: Sequence[torch.device]) -> None:
        wrong = sorted({torch.device(device).type for device in devices} - {"xla"})
        if wrong:
            raise IncompatibleTrainer(
                f"strategy={self.strategy_name!r} trains on XLA devices, and the Trainer's accelerator has "
                f"{', '.join(wrong)}. Use Trainer(strategy={self.strategy_name!r}, accelerator='pjrt'), or 'tpu'.",
                code="LO716",
            )


class SingleDeviceXLASyncFreeStrategy(_OnXLA, SingleProcess, SingleDeviceXLAStrategy):
    """Trains on one XLA device.

    Unlike Lightning's ``single_xla`` it can be named in ``Trainer(strategy=...)``, takes any device of
    ``accelerator="pjrt"``, and stores bfloat16 by conversion: see :class:`~lightning_optim.XLASyncFreePrecision`.
    Identifiers such as ``adamw_torch_xla`` use the sync-free kernel; the module's own optimizer is stepped as it is.

    Args:
        accelerator: As in ``SingleDeviceXLAStrategy``; the Trainer sets it.
        checkpoint_io: As in ``SingleDeviceXLAStrategy``.
        precision_plugin: As in ``SingleDeviceXLAStrategy``; the Trainer sets it.
        debug: As in ``SingleDeviceXLAStrategy``.

    Raises:
        MissingDependency: If torch_xla is not installed, or not for this torch.
        IncompatibleTrainer: When the Trainer is made, if its accelerator has no XLA device or several. When it starts,
            if a backward ran in this process before the device was opened, or if torch_xla stores float32 in 16 bits.
    """

    strategy_name = layerwise_name = "single_xla_syncfree"
    for_several = "xla_syncfree"

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        checkpoint_io: XLACheckpointIO | None = None,
        precision_plugin: XLAPrecision | None = None,
        debug: bool = False,
    ) -> None:
        require_torch_xla(f"strategy={self.strategy_name!r}")
        # Not SingleDeviceXLAStrategy.__init__: it opens a device, which the Trainer has not chosen yet.
        SingleDeviceStrategy.__init__(self, "cpu", accelerator, checkpoint_io, precision_plugin)
        self.debug = debug

    def _opened(self, device: torch.device) -> torch.device:
        import torch_xla

        opened: torch.device = torch_xla.device(device.index)
        return opened

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return _run(super().validation_step(*args, **kwargs))

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return _run(super().test_step(*args, **kwargs))

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return _run(super().predict_step(*args, **kwargs))


class XLASyncFreeStrategy(_OnXLA, StartsNoneAlone, XLAStrategy):
    """Trains on all XLA devices of the machine, one process and one copy of the model each.

    Gradients are averaged after backward, those of a layerwise optimizer bucket by bucket in its hooks. Unlike
    Lightning's ``xla`` it also works on a single device. For the rest see
    :class:`~lightning_optim.SingleDeviceXLASyncFreeStrategy`.

    Args:
        accelerator: As in ``XLAStrategy``; the Trainer sets it.
        parallel_devices: As in ``XLAStrategy``; the Trainer sets it.
        checkpoint_io: As in ``XLAStrategy``.
        precision_plugin: As in ``XLAStrategy``; the Trainer sets it.
        debug: As in ``XLAStrategy``.
        sync_module_states: As in ``XLAStrategy``.

    Raises:
        MissingDependency: If torch_xla is not installed, or not for this torch.
        IncompatibleTrainer: When the Trainer is made, if its accelerator has no XLA device. When it starts, as in
            ``SingleDeviceXLASyncFreeStrategy``.
    """

    strategy_name = layerwise_name = "xla_syncfree"

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: XLACheckpointIO | None = None,
        precision_plugin: XLAPrecision | None = None,
        debug: bool = False,
        sync_module_states: bool = True,
    ) -> None:
        require_torch_xla(f"strategy={self.strategy_name!r}")
        super().__init__(accelerator, parallel_devices, checkpoint_io, precision_plugin, debug, sync_module_states)

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The devices; the Trainer sets them."""
        return super().parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        self._check(devices or ())
        packages.set_inherited(XLASyncFreeStrategy, self, "parallel_devices", devices)

    # XLAStrategy refuses a single device. That one needs no other process, so fit() can be called again and predict()
    # returns its predictions.

    def setup_distributed(self) -> None:
        if self.num_processes > 1:
            super().setup_distributed()
        else:
            rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            layerwise = Layerwise.of(optimizer)
            if layerwise is not None:
                layerwise.replicas = XLAReplicas()


def _run(result: Any) -> Any:
    """Runs the graph recorded by a step without an optimizer: it would otherwise grow over all batches."""
    import torch_xla

    torch_xla.sync()
    return result


def _refuse_narrow_floats(device: torch.device) -> None:
    """Refuses a process in which torch_xla stores float32 in a narrower type, which it decides only once."""
    exact = 1 + 2**-20
    if torch.tensor(exact, device=device).item() != exact:
        raise IncompatibleTrainer(
            "torch_xla stores float32 in 16 bits in this process: XLA_USE_BF16, XLA_DOWNCAST_BF16 or XLA_USE_F16 was "
            "set when it began, perhaps by an earlier run with Lightning's precision='bf16-true'. Start a new process "
            "without them, and use precision='bf16-true' here.",
            code="LO718",
        )


def _refuse_late_device(device: torch.device) -> None:
    """Refuses a process that ran a backward before opening the device: torch creates its device threads only then."""
    try:
        torch.autograd.backward(torch.ones((), device=device, requires_grad=True))
    except RuntimeError as error:
        if "device_ready_queues_" not in str(error):
            raise
        raise IncompatibleTrainer(
            "A backward ran in this process before the XLA device was opened, on the CPU perhaps, and since then torch "
            "can run none on XLA. Start a new process, or call torch_xla.device() before the first backward.",
            code="LO719",
        ) from error
