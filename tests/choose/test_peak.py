"""The estimated peak is that of real training on a CPU, as the tracker and as the allocator measure it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_optim import estimate_memory
from tests.choose.real import LitText, measure, tokens

# A batch whose activations are most of the memory, and one beside which a step's temporaries are.
MUCH, LITTLE = (8, 64), (1, 2)


@pytest.mark.parametrize(
    ("name", "args", "precision", "batch", "setting"),
    [
        ("adamw_torch", None, "32-true", MUCH, {}),
        ("adamw_torch", "foreach=True", "bf16-true", LITTLE, {}),
        ("adamw_torch", None, "bf16-mixed", MUCH, {"accumulate_grad_batches": 2}),
        ("adamw_torch_layerwise", None, "32-true", MUCH, {"gradient_clip_val": 1.0}),
        ("adamw_torch_layerwise", "bucket_mb=0", "32-true", LITTLE, {}),
        ("adamw_torch_layerwise", None, "bf16-true", LITTLE, {"accumulate_grad_batches": 2}),
        ("galore_adamw", "rank=16,update_proj_gap=1", "32-true", LITTLE, {}),
        ("galore_adamw_layerwise", "rank=16,update_proj_gap=1", "bf16-true", LITTLE, {}),
        ("galore_adafactor_layerwise", "rank=16,update_proj_gap=1", "32-true", LITTLE, {}),
        ("apollo_adamw", "rank=16,update_proj_gap=1", "bf16-true", LITTLE, {}),
        ("adafactor", None, "bf16-true", LITTLE, {}),
        ("lomo", None, "bf16-true", LITTLE, {"gradient_clip_val": 1.0}),
        ("grokadamw", None, "bf16-true", LITTLE, {}),
        ("schedule_free_adamw", None, "32-true", LITTLE, {}),
        ("stable_adamw", None, "bf16-true", LITTLE, {}),
        ("adagrad", "foreach=True", "32-true", LITTLE, {}),
        ("lion_8bit_layerwise", None, "bf16-true", MUCH, {}),
        ("adamw_torch_4bit", None, "bf16-true", MUCH, {}),
    ],
)
def test_peak_is_what_training_takes(
    name: str, args: str | None, precision: str, batch: tuple[int, int], setting: dict[str, Any]
) -> None:
    # torchao would compile for half a minute.
    with torch.compiler.set_stance("force_eager"):
        module = LitText(optim=name, optim_args=args)
        real = measure(
            module,
            tokens(*batch),
            precision,
            setting.get("accumulate_grad_batches", 1),
            gradient_clip_val=setting.get("gradient_clip_val"),
        )
    with torch.device("meta"):
        model = LitText()
    estimate = estimate_memory(
        model, name, optim_args=args, batch=tokens(*batch), precision=precision, accelerator="cpu", **setting
    )
    assert estimate.peak == pytest.approx(real.tracker.peak.total, rel=0.02)
    assert estimate.peak == pytest.approx(real.allocated, rel=0.05)
    assert estimate.state == real.state
    assert estimate.parameters == real.tracker.live["parameters"]
    assert estimate.buffers == real.tracker.live["buffers"]
    assert sum(estimate.at_peak.values()) == estimate.peak
