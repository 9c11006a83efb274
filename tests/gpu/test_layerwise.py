"""Layerwise on the GPU: the numbers of the plain run bit for bit, and less memory at the peak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import Layerwise, build_optimizer
from tests.cases import BY_NAME, LAYERWISE, case_of
from tests.gpu.device import DEVICE, FLAGS, cuda_only, fp16
from tests.layerwise.test_layerwise import assert_near, build, outcome, run
from tests.trainer.test_resume import assert_equal

EXACT: dict[str, Callable[[], dict[str, Any]]] = {
    "32-true": dict,
    "bf16-true accumulate": lambda: {"precision": "bf16-true", "accumulate_grad_batches": 3},
    "16-mixed": fp16,
}


def both(name: str, **flags: Any) -> list[dict[str, Any]]:
    outcomes = []
    for identifier in (BY_NAME[name].plain, BY_NAME[name].layerwise):
        model = build(identifier)
        plugins = {"plugins": [lambda made=made: made for made in flags["plugins"]]} if "plugins" in flags else {}
        outcomes.append(outcome(model, run(model, **{**FLAGS, **flags, **plugins})))
    return outcomes


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("name", LAYERWISE)
def test_bit_for_bit(name: str, mode: str) -> None:
    assert_equal(*both(name, **EXACT[mode]()), name)


@pytest.mark.parametrize("name", LAYERWISE)
def test_clipped_by_norm(name: str) -> None:
    plain, layerwise = both(name, gradient_clip_val=0.5)
    assert_near(plain, layerwise)


@cuda_only
@pytest.mark.parametrize(
    "name", ["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "lion_32bit", "galore_adamw", "lomo", "sgd"]
)
def test_the_peak_is_lower(name: str) -> None:
    """In a step whose states exist already, by more than half of all gradients."""
    peaks = []
    for identifier in (case_of(name).plain, case_of(name).layerwise):
        model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(16))).to(DEVICE)
        optimizer = build_optimizer(model, identifier, lr=1e-5)
        layerwise = Layerwise.of(optimizer)
        batch = torch.randn(4, 1024, device=DEVICE)

        def backward(loss: Tensor, optimizer: Any = optimizer, layerwise: Layerwise | None = layerwise) -> None:
            if layerwise is not None:
                layerwise.backward(loss)
                return
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        backward(model(batch).square().mean())
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        backward(model(batch).square().mean())
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    gradients = 16 * (1024 * 1024 + 1024) * 4
    assert peaks[1] < peaks[0] - gradients / 2, f"{peaks[0] / 2**20:.0f} -> {peaks[1] / 2**20:.0f} MiB"
