"""``adamw_apex_fused`` with NVIDIA's apex itself."""

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
from tests.trainer.test_apex import ARGUMENTS, NAME, walk
from tests.trainer.test_resume import assert_equal

pytestmark = [
    cuda_only,
    pytest.mark.skipif(
        importlib.util.find_spec("amp_C") is None, reason="needs NVIDIA's apex, built with its CUDA kernels"
    ),
]

OPTIONS = {"betas": (0.8, 0.95)}


def fit(name: str = NAME, path: Path | None = None, **flags: Any) -> tuple[LitTokens, dict[str, Any]]:
    torch.manual_seed(0)
    model = LitTokens(optim=name, lr=1e-2, optim_args=OPTIONS, weight_decay=0.1, lr_scheduler="linear")
    run = trainer(**{"max_steps": 20, **FLAGS, **flags})
    run.fit(model, loader(), ckpt_path=path, weights_only=True)
    return model, {"weights": model.state_dict(), "optimizer": run.optimizers[0].state_dict()}


def test_equal_to_torch() -> None:
    first = TokenModel().to(DEVICE)
    second = copy.deepcopy(first)
    for model, name in ((first, NAME), (second, "adamw_torch_fused")):
        optimizer = build_optimizer(model, name, lr=1e-2, weight_decay=ARGUMENTS["weight_decay"], optim_args=OPTIONS)
        walk(model, optimizer, range(20))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
def test_resumes_exactly(precision: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    _, uninterrupted = fit(precision=precision, callbacks=[saver], enable_checkpointing=True)
    _, resumed = fit(path=tmp_path / "step=10.ckpt", precision=precision)
    assert_equal(uninterrupted, resumed, precision)


@pytest.mark.parametrize("flags", [{}, {"precision": "bf16-true"}, {"accumulate_grad_batches": 3}], ids=str)
def test_layerwise_bit_for_bit(flags: dict[str, Any]) -> None:
    assert_equal(fit(**flags)[1], fit(f"{NAME}_layerwise", **flags)[1], NAME)


def test_fp16_with_clipping_lowers_the_loss() -> None:
    model, _ = fit(**fp16(), gradient_clip_val=0.5)
    assert sum(model.losses[-5:]) < 0.8 * sum(model.losses[:5])
