"""Live bytes, against what is known of a module's storages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn.functional import embedding

from lightning_optim.bench import Parts, Workload
from lightning_optim.bench._trial import _fit, measure_memory, quiet
from lightning_optim.bench._watching import MemoryWatch
from lightning_optim.build import OptimConfig
from lightning_optim.choose import MemoryTracker
from tests.bench.tiny import Data, Tokens

WIDTH = 64


def workload() -> Workload:
    return Workload("tiny", lambda: Parts(Tokens(WIDTH), Data(), {"accelerator": "cpu"}), facts={}, shared={})


def memory(optim: str) -> dict[str, Any]:
    with quiet():
        return measure_memory(workload(), OptimConfig(optim=optim))


def test_an_optimizer_costs_its_state() -> None:
    plain, adam, quantized = (memory(name) for name in ("sgd", "adamw_torch", "adamw_8bit"))
    size, count = sum(one.nbytes for one in Tokens(WIDTH).parameters()), len(list(Tokens(WIDTH).parameters()))
    assert plain["state_bytes"] == 0
    assert adam["state_bytes"] == 2 * size + 4 * count, "two moments, and a counter of four bytes"
    assert adam["peak_bytes"] - plain["peak_bytes"] == adam["state_bytes"]
    assert quantized["peak_bytes"] - plain["peak_bytes"] < 0.7 * adam["state_bytes"]


def test_sparse_gradients_are_counted() -> None:
    weight = nn.Parameter(torch.ones(1000, 2))
    with MemoryTracker() as tracker:
        embedding(torch.tensor([1, 2]), weight, sparse=True).sum().backward()
        # Two rows of two float32, and their two indices of int64.
        assert tracker.live["other"] == 2 * 2 * 4 + 2 * 8


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_step_that_is_compiled_is_left_alone(in_backward: bool) -> None:
    """torch compiles nothing while operations are counted."""
    watch = MemoryWatch(compiles=True, in_backward=in_backward)
    counting: list[bool] = []

    class Step(Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            counting.append(watch._is_counting)

    trainer = {"accelerator": "cpu", "callbacks": [watch, Step()]}
    tiny = Workload("tiny", lambda: Parts(Tokens(WIDTH), Data(), dict(trainer)), facts={}, shared={})
    with quiet():
        _fit(tiny, OptimConfig(optim="adamw_torch"), 0, 3, Callback(), validate=False)
    assert counting == [False] * 3
    assert watch.state > 0
    assert (watch.peak is None) == in_backward
    assert watch.peak is None or watch.peak > watch.state
