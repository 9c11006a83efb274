"""The estimated peak is that of real training in two processes, with copies of a model and with shards of one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_optim import IncompatibleTrainer, InvalidOption, MemoryEstimate, Shape, compare_memory, estimate_memory
from lightning_optim._compat.shards import absent_processes
from lightning_optim.choose import Estimator
from lightning_optim.table import REGISTRY
from tests.choose.ranks import CASES, Case, LitCopies, LitShards, module_of
from tests.choose.real import tokens
from tests.models import LitTokens
from tests.processes import run_fresh

SMALL = Shape("llama", hidden=64, layers=2, heads=4, intermediate=96, vocab=130, length=32)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file: Path = tmp_path_factory.mktemp("ranks") / "measured.json"
    run = run_fresh("-m", "tests.choose.ranks", str(file), ranks=2)
    assert not run.returncode, run.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_peak_is_what_each_process_takes(case: Case, measured: Any) -> None:
    real = measured[str(case)]
    estimate = estimate_memory(
        module_of(case),
        case.optim,
        batch=tokens(*case.batch),
        precision=case.precision,
        accelerator="cpu",
        strategy=case.strategy,  # type: ignore[arg-type]
        devices=2,
        **case.setting,
    )
    assert estimate.peak == pytest.approx(real["tracked"], rel=0.02)
    assert estimate.peak == pytest.approx(real["allocated"], rel=0.05)
    assert estimate.state == real["state"]
    assert estimate.parameters == real["at_peak"]["parameters"]
    assert sum(estimate.at_peak.values()) == estimate.peak
    if not case.strategy.startswith("layerwise"):
        # Stepped in backward, a step is no phase of its own to Lightning.
        assert estimate.moment == real["moment"]
    assert not dist.is_initialized()


def sharded(optim: str = "adamw_torch", devices: int = 4, **setting: Any) -> MemoryEstimate:
    strategy: Any = "layerwise_fsdp2" if REGISTRY.find(optim).layerwise else "fsdp2"
    return estimate_memory(SMALL, optim, **{"batch": (2, 32), "strategy": strategy, "devices": devices, **setting})


def test_shards_of_many_devices() -> None:
    whole, shards = estimate_memory(SMALL, "adamw_torch", batch=(2, 32)), sharded()
    # Rows that are not divided evenly are padded.
    assert whole.parameters / 4 <= shards.parameters < 1.05 * whole.parameters / 4
    assert whole.gradients / 4 <= shards.gradients < 1.05 * whole.gradients / 4
    # The first process has the largest of uneven shards, and all count steps.
    assert whole.state / 4 <= shards.state < 1.05 * whole.state / 4
    assert shards.peak < whole.peak
    assert shards.communication > 0
    # Without a batch nothing is gathered.
    assert sharded(batch=None).communication == 0
    layerwise = sharded("adamw_torch_layerwise", activation_checkpointing=True)
    assert layerwise.peak < shards.peak
    assert layerwise.gradients < shards.gradients


def test_comparing_leaves_out_what_cannot_step_shards() -> None:
    small = dataclasses.replace(SMALL, layers=1)
    names = {one.optim for one in compare_memory(small, strategy="fsdp2", devices=2, accelerator="cpu")}
    assert names == {
        name
        for name, spec in REGISTRY.plain.items()
        if spec.sharded and name == spec.name and not (spec.choices or spec.layerwise) and spec.runs_on({"cpu"})
    }


class Unsharded(LitTokens):
    def configure_model(self) -> None:
        return None


class Flat(LitTokens):
    """No numbered blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(4, 4)


class Broken(LitShards):
    def configure_model(self) -> None:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("model", "optim", "strategy", "devices", "error", "text"),
    [
        (LitShards, "adam_mini", "fsdp2", 2, IncompatibleTrainer, "cannot step sharded parameters"),
        (LitShards, "adamw_8bit", "fsdp2", 2, IncompatibleTrainer, "Use optim='adamw_torch' or 'adafactor'"),
        (LitShards, "adamw_torch", "fsdp2", 1, InvalidOption, "shards over devices, and devices=1"),
        (LitShards, "adamw_torch", "layerwise_fsdp2", 2, IncompatibleTrainer, "use strategy='fsdp2'"),
        (LitShards, "adamw_torch_layerwise", "fsdp2", 2, IncompatibleTrainer, "use strategy='layerwise_fsdp2'"),
        (Flat, "adamw_torch", "fsdp2", 2, IncompatibleTrainer, "no configure_model and no numbered blocks"),
        (Unsharded, "adamw_torch", "fsdp2", 2, IncompatibleTrainer, "Unsharded is not sharded"),
        (lambda: nn.Linear(4, 4), "adamw_torch", "fsdp2", 2, IncompatibleTrainer, "Linear does not say how"),
        (Broken, "adamw_torch", "fsdp2", 2, RuntimeError, "no"),
    ],
)
def test_what_cannot_be_sharded(model: Any, optim: str, strategy: Any, devices: int, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        estimate_memory(model(), optim, batch=tokens(2), strategy=strategy, devices=devices)
    assert not dist.is_initialized()


def test_shard_names_the_modules_of_one_that_does_not_say_how() -> None:
    def estimated(model: nn.Module, shard: str | None) -> MemoryEstimate:
        return estimate_memory(model, batch=tokens(2), strategy="fsdp2", devices=2, shard=shard)  # type: ignore[arg-type]

    by_blocks = estimated(LitCopies(), None)
    assert estimated(LitCopies(), r"model\.blocks\.\d+") == by_blocks
    assert estimated(LitCopies(), "model").communication > by_blocks.communication
    with pytest.raises(InvalidOption, match=r"shard='nothing' is the whole name of no module of LitCopies"):
        estimated(LitCopies(), "nothing")
    with pytest.raises(InvalidOption, match="leave one of the two out"):
        estimated(LitShards(), "model")
    with pytest.raises(InvalidOption, match="is for a LightningModule and strategy='fsdp2'"):
        estimate_memory(SMALL, strategy="fsdp2", devices=2, shard="model")
    with pytest.raises(InvalidOption, match="is for a LightningModule and strategy='fsdp2'"):
        estimate_memory(LitCopies(), devices=2, shard="model")


def test_a_process_group_of_the_users_is_left_alone() -> None:
    with absent_processes(3):
        with pytest.raises(IncompatibleTrainer, match="this process has one already"):
            sharded()
        assert dist.get_world_size() == 3
        # Nothing is sharded for copies.
        assert estimate_memory(SMALL, "sgd", devices=2).strategy == "ddp"


def test_an_open_estimator_shares_one_group_and_closes_it() -> None:
    estimator = Estimator(SMALL, strategy="fsdp2", devices=2)
    with estimator.opened():
        group = dist.group.WORLD
        assert [one.optim for one in estimator.compare(["sgd", "adamw_torch"])] == ["sgd", "adamw_torch"]
        assert dist.group.WORLD is group
    assert not dist.is_initialized()
    assert estimator.compare(["sgd"])[0].parameters > 0


class Made(L.LightningModule):
    """Has no layers before ``configure_model``."""

    def configure_model(self) -> None:
        self.layer = nn.Linear(64, 64)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch).sum()


def test_what_configure_model_makes_has_the_precision_of_the_trainer() -> None:
    estimate = estimate_memory(Made(), "sgd", batch=torch.ones(2, 64), precision="bf16-true")
    assert estimate.parameters == 2 * (64 * 64 + 64)
