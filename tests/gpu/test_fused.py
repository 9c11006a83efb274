"""``strategy="fused"`` on the GPU: loss scaling and clipping together, and what ``adamw`` stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_optim import build_optimizer
from tests.gpu.device import DEVICE, FLAGS, fp16
from tests.models import LitTokens, TokenModel, loader, trainer

OVERFLOWING = 3


class Overflowing(LitTokens):
    """One batch has a loss that is not finite."""

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == OVERFLOWING else loss

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        self.counts = [int(state["step"]) for state in optimizer.state.values()]


def fit(name: str, model_class: type[LitTokens] = LitTokens, **flags: Any) -> tuple[LitTokens, Trainer]:
    torch.manual_seed(0)
    model = model_class(optim=name, lr=1e-2, weight_decay=0.1, lr_scheduler="linear")
    run = trainer(**{"max_steps": 10, **FLAGS, **fp16(), **flags})
    run.fit(model, loader())
    return model, run


@pytest.mark.parametrize(
    "clipping",
    [{"gradient_clip_val": 0.05}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}],
    ids=["norm", "value"],
)
@pytest.mark.parametrize(("usual", "strategy"), [("auto", "fused"), ("ddp", "fused_ddp")])
def test_scaled_and_clipped_as_without_the_kernel(usual: str, strategy: str, clipping: dict[str, Any]) -> None:
    plain, _ = fit("adamw_torch", strategy=usual, **clipping)
    fused, _ = fit("adamw_torch_fused", strategy=strategy, **clipping)
    unclipped, _ = fit("adamw_torch", strategy=usual)
    torch.testing.assert_close(fused.losses, plain.losses, rtol=1e-2, atol=1e-2)
    assert fused.losses != unclipped.losses


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_torch"])
def test_a_step_that_overflows_is_skipped(name: str) -> None:
    """The scale starts low, so that nothing else overflows."""
    torch.manual_seed(0)
    model = Overflowing(optim=name, lr=1e-2)
    run = trainer(max_steps=10, **FLAGS, **fp16(), strategy="fused", gradient_clip_val=0.5)
    run.precision_plugin.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**8)
    run.fit(model, loader())
    # Nine are noted before the tenth, and one of them was skipped.
    assert model.counts == [8] * len(model.counts)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert run.precision_plugin.scaler.get_scale() == 2.0**7


def test_adamw_is_the_fused_one() -> None:
    optimizer = build_optimizer(TokenModel().to(DEVICE), "adamw")
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["fused"] for group in optimizer.param_groups)
