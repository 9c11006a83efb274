"""``flash_adamw`` and ``flash_lion`` with flashoptim itself."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_optim import build_optimizer
from tests.gpu.device import DEVICE, FLAGS, cuda_only, fp16
from tests.models import LitTokens, TokenModel, loader, trainer
from tests.trainer.test_apex import give_gradients
from tests.trainer.test_resume import assert_equal

pytestmark = [
    cuda_only,
    pytest.mark.skipif(
        importlib.util.find_spec("flashoptim") is None,
        reason="needs flashoptim: pip install 'lightning-optim[flashoptim]'",
    ),
    pytest.mark.parametrize("name", ["flash_adamw", "flash_lion"]),
]


def fit(name: str, path: Path | None = None, **flags: Any) -> tuple[LitTokens, dict[str, Any]]:
    torch.manual_seed(0)
    lr = 3e-3 if "lion" in name else 1e-2
    model = LitTokens(optim=name, lr=lr, optim_args="betas=(0.8, 0.95)", weight_decay=0.1, lr_scheduler="linear")
    run = trainer(**{"max_steps": 20, **FLAGS, **flags})
    run.fit(model, loader(), ckpt_path=path, weights_only=True)
    return model, {"weights": model.state_dict(), "optimizer": run.optimizers[0].state_dict()}


def test_near_the_optimizer_with_float32_states(name: str) -> None:
    """Eight bits keep the direction: after 20 steps along equal gradients the ways point the same way."""
    start = TokenModel().to(DEVICE)
    ways = []
    for optim in (name, {"flash_adamw": "adamw_torch", "flash_lion": "lion_32bit"}[name]):
        model = copy.deepcopy(start)
        optimizer = build_optimizer(model, optim, lr=1e-3, weight_decay=0.1, optim_args="betas=(0.8, 0.95)")
        for step in range(20):
            give_gradients(model, step)
            optimizer.step()
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        ways.append(torch.cat([(after - before).detach().flatten() for after, before in pairs]))
    assert torch.nn.functional.cosine_similarity(*ways, dim=0) > 0.95


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
def test_resumes_exactly(precision: str, name: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    _, uninterrupted = fit(name, precision=precision, callbacks=[saver], enable_checkpointing=True)
    _, resumed = fit(name, path=tmp_path / "step=10.ckpt", precision=precision)
    assert_equal(uninterrupted, resumed, precision)


@pytest.mark.parametrize("flags", [{}, {"precision": "bf16-true"}, {"accumulate_grad_batches": 3}], ids=str)
def test_layerwise_bit_for_bit(flags: dict[str, Any], name: str) -> None:
    assert_equal(fit(name, **flags)[1], fit(f"{name}_layerwise", **flags)[1], name)


def test_fp16_with_clipping_lowers_the_loss(name: str) -> None:
    model, _ = fit(name, **fp16(), gradient_clip_val=0.5)
    assert sum(model.losses[-5:]) < 0.8 * sum(model.losses[:5])
