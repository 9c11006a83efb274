"""Precision on XLA devices by conversion and autocast, not by an environment variable."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.plugins import HalfPrecision, Precision
from torch import nn

from lightning_optim._compat.lightning import ReducesXLA
from lightning_optim.errors import IncompatibleTrainer
from lightning_optim.layerwise import Layerwise
from lightning_optim.trainer.accelerators._pjrt import require_torch_xla

XLAPrecisionName = Literal["32-true", "bf16-true", "bf16-mixed"]


class XLASyncFreePrecision(ReducesXLA):
    """Precision under the strategies ``single_xla_syncfree`` and ``xla_syncfree``.

    Lightning's ``XLAPrecision`` makes torch_xla store every float32 as bfloat16, by an environment variable that
    torch_xla reads once: later runs in the process are bfloat16 too. Here ``bf16-true`` converts the module and its
    inputs, as on other devices, and a later run in float32 is in float32.

    The strategies use it for ``Trainer(precision=...)``, except for ``"bf16-mixed"``, which Lightning refuses before
    it reaches them: pass ``Trainer(plugins=XLASyncFreePrecision("bf16-mixed"))``.

    Args:
        precision: ``"32-true"``, ``"bf16-true"`` or ``"bf16-mixed"`` (autocast).

    Raises:
        MissingDependency: If torch_xla is not installed, or not for this torch.
        IncompatibleTrainer: For another precision.
    """

    def __init__(self, precision: XLAPrecisionName = "32-true") -> None:
        if precision not in get_args(XLAPrecisionName):
            raise IncompatibleTrainer(
                f"precision={precision!r} on an XLA device: float16 would need loss scaling, which torch_xla lacks. "
                "Use precision='32-true' or 'bf16-true', or plugins=XLASyncFreePrecision('bf16-mixed').",
                code="LO717",
            )
        require_torch_xla(f"precision={precision!r} on an XLA device")
        super().__init__("32-true")
        self.precision = precision
        self._converter: Precision = HalfPrecision("bf16-true") if precision == "bf16-true" else Precision()

    def convert_module(self, module: nn.Module) -> nn.Module:
        return self._converter.convert_module(module)

    def convert_input(self, data: Any) -> Any:
        return self._converter.convert_input(data)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return self._converter.tensor_init_context()

    def module_init_context(self) -> AbstractContextManager[Any]:
        return self._converter.module_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        if self.precision == "bf16-mixed":
            return torch.autocast("xla", dtype=torch.bfloat16)
        return self._converter.forward_context()

    def teardown(self) -> None:
        """Leaves the environment alone: nothing was set."""

    def closure_and_reduction(self, optimizer: Any, closure: Callable[[], Any]) -> Any:
        layerwise = Layerwise.of(optimizer)
        if layerwise is None or layerwise.replicas is None:
            return super().closure_and_reduction(optimizer, closure)
        # Already reduced bucket by bucket, except for what has to wait for the end of backward.
        result = closure()
        if layerwise.has_gradients():
            layerwise.average_alive()
        return result
