"""Every row really trains, in every precision, with clipping and with accumulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import BY_NAME, in_modes
from tests.models import LitTokens, fp16_mixed, loader, trainer

MODES: dict[str, dict[str, Any]] = {
    "32-true": {},
    "bf16-true": {"precision": "bf16-true"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"plugins": [fp16_mixed]},
    "clip_norm": {"gradient_clip_val": 0.5},
    "clip_value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "accumulate": {"accumulate_grad_batches": 4},
    "16-mixed clip_norm": {"plugins": [fp16_mixed], "gradient_clip_val": 0.5},
    "bf16-mixed clip_value": {
        "precision": "bf16-mixed",
        "gradient_clip_val": 0.05,
        "gradient_clip_algorithm": "value",
    },
}
# In 32-true tests/testing trains all by their defaults.
FOR_ALL = ("bf16-true", "16-mixed clip_norm")


@pytest.mark.parametrize(("name", "mode"), in_modes(MODES, FOR_ALL))
def test_thirty_steps_lower_the_loss(name: str, mode: str) -> None:
    case = BY_NAME[name]
    flags = {**MODES[mode], "plugins": [make() for make in MODES[mode].get("plugins", ())] or None}
    model = LitTokens(optim=name, lr=case.lr, optim_args=case.options, lr_scheduler=case.schedule)
    run = trainer(max_steps=30, **flags)
    run.fit(model, loader())
    assert run.global_step == 30
    # An epoch of 10 batches, accumulated by 4, makes 3 steps: the last one from 2 batches.
    assert len(model.losses) == (100 if mode == "accumulate" else 30)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    first, last = sum(model.losses[:5]) / 5, sum(model.losses[-5:]) / 5
    assert last < 0.8 * first, f"{first:.3f} -> {last:.3f}"
