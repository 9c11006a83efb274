"""Pairs of optimizers on two real processes with gloo: equal to a loop by hand, after backward and during it.

Accumulated, clipped by norm, each part with its schedule, in float16 with a scaler; a gradient overflows on one rank.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.composites import ON_TWO_RANKS, by_hand, steps_in_backward
from tests.processes import run_fresh
from tests.trainer.test_resume import assert_equal

Ranks = list[dict[tuple[str, str], dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """All runs of each pair by name, of each process."""
    directory = tmp_path_factory.mktemp("composite_ddp")
    done = run_fresh("-m", "tests.composite_worker", str(directory), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize(("main", "other"), ON_TWO_RANKS)
def test_two_ranks_are_the_loop_by_hand_before_and_after_a_checkpoint(ranks: Ranks, main: str, other: str) -> None:
    weights, scale = by_hand(main, other, "norm", ranks=2, scaled=True)
    assert scale == 2.0**15, "one overflow"
    state = next(iter(ranks[0][main, other].values()))["optimizer"]
    for runs in (rank[main, other] for rank in ranks):
        assert len(runs) == 2 or not steps_in_backward(main, other)
        for name, run in runs.items():
            assert run["same"] == [True] * 18
            assert run["scale"] == scale
            assert_equal(run["weights"], weights, name)
            assert_equal(run["optimizer"], state, name)
