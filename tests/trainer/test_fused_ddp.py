"""Two real processes with gloo under ``fused_ddp``: equal to Lightning's DDP without the kernel, in float16."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.fused_ddp_worker import CLIPPING, OPTIMS, OVERFLOWED, STEPS
from tests.processes import run_fresh
from tests.trainer.test_fused import TOLERANCE

PAIRS = [f"{optim}, {clipping}" for optim in OPTIMS for clipping in (*CLIPPING, "overflow")] + ["bucket views"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """All pairs of runs by name, of each process."""
    directory = tmp_path_factory.mktemp("fused_ddp")
    done = run_fresh("-m", "tests.fused_ddp_worker", str(directory), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("pair", PAIRS)
def test_equals_ddp_and_ranks_agree(ranks: list[dict[str, dict[str, Any]]], pair: str) -> None:
    for rank in ranks:
        plain, fused = rank[pair]["ddp"], rank[pair]["fused"]
        assert plain["steps"] == fused["steps"] == STEPS
        assert plain["wrapped"] is fused["wrapped"] is True
        # Two groups, with and without decay.
        assert (plain["kernels"], fused["kernels"]) == (0, 2 * STEPS)
        assert all(fused["same"])
        assert fused["moved"] == plain["moved"]
        assert fused["scales"] == plain["scales"]
        assert fused["groups"] == [{"fused": None, "foreach": None}] * 2
        for name, weight in plain["weights"].items():
            assert (fused["weights"][name] - weight).abs().max() < TOLERANCE
            assert torch.equal(fused["weights"][name], ranks[0][pair]["fused"]["weights"][name])


@pytest.mark.parametrize("optim", OPTIMS)
def test_an_overflow_in_one_process_skips_the_step_in_both(ranks: list[dict[str, dict[str, Any]]], optim: str) -> None:
    for rank in ranks:
        fused = rank[f"{optim}, overflow"]["fused"]
        assert [not moved for moved in fused["moved"]] == [step in OVERFLOWED for step in range(STEPS)]
        assert fused["scales"][-1] == 65536.0 / 4


def test_several_optimizers_as_one_are_fused_and_skip_a_step_together(ranks: list[dict[str, dict[str, Any]]]) -> None:
    for rank in ranks:
        plain, fused = rank["several optimizers"]["ddp"], rank["several optimizers"]["fused"]
        # Each part has two groups; for several as one the scaler reads the overflow, and calls no kernel.
        assert (plain["kernels"], fused["kernels"]) == (0, 4 * (STEPS - len(OVERFLOWED)))
        assert all(fused["same"])
        assert fused["moved"] == plain["moved"] == [step not in OVERFLOWED for step in range(STEPS)]
        assert fused["scales"] == plain["scales"]
        for name, weight in plain["weights"].items():
            assert (fused["weights"][name] - weight).abs().max() < TOLERANCE
