"""Every identifier trains on the GPU, in every precision, and its parameters and states are really there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import BY_NAME, NAMES
from tests.gpu.device import DEVICE, FLAGS, fp16
from tests.models import LitTokens, loader, trainer

MODES: dict[str, Callable[[], dict[str, Any]]] = {
    "32-true": dict,
    "bf16-true": lambda: {"precision": "bf16-true"},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "16-mixed": fp16,
    "16-mixed clip_norm": lambda: {**fp16(), "gradient_clip_val": 0.5},
    "accumulate": lambda: {"accumulate_grad_batches": 4},
}


class Located(LitTokens):
    """Notes where parameters, gradients and states are while it trains; afterwards Lightning moves them to the CPU."""

    def on_train_batch_start(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        tensors = [*self.parameters(), *(p.grad for p in self.parameters() if p.grad is not None)]
        states = (value for state in self.trainer.optimizers[0].state.values() for value in state.values())
        # Counters may stay on the CPU.
        tensors += [value for value in states if isinstance(value, Tensor) and value.ndim]
        self.devices = {tensor.device.type for tensor in tensors}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_thirty_steps_lower_the_loss(name: str, mode: str) -> None:
    case = BY_NAME[name]
    flags = {**FLAGS, **MODES[mode]()}
    if case.arguments.get("fused") and mode == "16-mixed clip_norm":
        flags["strategy"] = "fused"
    options = {key: value for key, value in case.options.items() if key != "triton"}
    model = Located(optim=name, lr=case.lr, optim_args=options, lr_scheduler=case.schedule)
    run = trainer(max_steps=30, **flags)
    run.fit(model, loader())
    assert run.global_step == 30
    assert model.devices == {DEVICE.type}
    assert len(model.losses) == (100 if mode == "accumulate" else 30)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    first, last = sum(model.losses[:5]) / 5, sum(model.losses[-5:]) / 5
    assert last < 0.8 * first, f"{first:.3f} -> {last:.3f}"
