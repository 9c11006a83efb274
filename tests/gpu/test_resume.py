"""Exact resume on the GPU, in a fresh process, and checkpoints that move between GPU and CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import BY_NAME, CASES, LAYERWISE, NAMES
from tests.gpu.device import DEVICE, FLAGS
from tests.models import LitTokens, loader, trainer
from tests.trainer.test_resume import MOVES, assert_equal, resumed, train


@pytest.fixture(scope="module", params=["32-true", "bf16-true"])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Outcomes by file name: uninterrupted ``NAME``, resumed ``NAME@NAME``; one fresh process resumes them all."""
    directory = tmp_path_factory.mktemp("step")
    names = [name for case in CASES for name in case.forms]
    uninterrupted = {name: train(name, request.param, "step", directory, **FLAGS) for name in names}
    return {**uninterrupted, **resumed(directory, request.param, DEVICE.type)}


@pytest.mark.parametrize(
    ("name", "move"),
    [(name, move) for name in NAMES for move in MOVES if name in LAYERWISE or "layerwise" not in MOVES[move]],
)
def test_a_fresh_process_continues_exactly(name: str, move: str, outcomes: dict[str, Any]) -> None:
    case = BY_NAME[name]
    writer, reader = (getattr(case, form) for form in MOVES[move])
    assert_equal(outcomes[case.plain], outcomes[f"{writer}@{reader}"], move)


@pytest.mark.parametrize("direction", ["to the GPU", "to the CPU"])
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_move_between_devices(name: str, direction: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    there = {"accelerator": "cpu", "devices": 1}
    before, after = (there, FLAGS) if direction == "to the GPU" else (FLAGS, there)
    train(case.plain, "32-true", "step", tmp_path, **before)
    checkpoint = tmp_path / f"{case.plain}@32-true.ckpt"
    losses = []
    for flags in (before, after):
        hyperparameters = torch.load(checkpoint, weights_only=True, map_location="cpu")["hyper_parameters"]
        model = LitTokens(**hyperparameters)
        run = trainer(max_steps=20, **flags)
        run.fit(model, loader(), ckpt_path=checkpoint, weights_only=True)
        assert run.global_step == 20
        losses.append(model.losses)
    # Both devices round differently, and ten steps make more of it.
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-2, atol=2e-2)
