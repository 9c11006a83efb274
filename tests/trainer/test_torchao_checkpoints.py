"""torchao's states are stored as plain tensors: Lightning loads them everywhere; old-style files are read, too."""

from __future__ import annotations

import copy
import csv
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchao.optim
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch.optim import Optimizer
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8

from lightning_optim import OptimCallback, build_optimizer
from tests.models import ForeignTokens, LitTokens, loader, trainer
from tests.processes import run_fresh
from tests.trainer.test_resume import assert_equal, assert_plain

UPSTREAM = {
    "adamw_torch_8bit": torchao.optim.AdamW8bit,
    "adamw_torch_4bit": torchao.optim.AdamW4bit,
    "adamw_torch_fp8": torchao.optim.AdamWFp8,
}
SUBCLASS = {
    "adamw_torch_8bit": OptimState8bit,
    "adamw_torch_4bit": OptimState4bit,
    "adamw_torch_fp8": OptimStateFp8,
}
NAMES = tuple(UPSTREAM)


class WithUpstream(LitTokens):
    """What a user had before: torchao's optimizer, written by hand, with the groups that ours makes."""

    def configure_optimizers(self) -> Optimizer:
        name = self.upstream_name
        groups = build_optimizer(self, name, lr=1e-2).param_groups
        keys = ("params", "weight_decay", "optim_bits", "name")
        return UPSTREAM[name]([{key: group[key] for key in keys} for group in groups], lr=1e-2)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """By (name, style), a checkpoint of step 3: ours ("new") and what plain Lightning writes ("old")."""
    paths = {}
    for name in NAMES:
        by_hand = WithUpstream()
        by_hand.upstream_name = name
        for style, model in {"new": LitTokens(optim=name, lr=1e-2), "old": by_hand}.items():
            run = trainer(max_steps=3)
            run.fit(model, loader(batches=1))
            paths[name, style] = tmp_path_factory.mktemp(name) / f"{style}.ckpt"
            run.save_checkpoint(paths[name, style])
    return paths


@pytest.fixture(params=NAMES)
def saved(request: pytest.FixtureRequest, checkpoints: dict[tuple[str, str], Path]) -> tuple[str, Path, Path]:
    """Name, checkpoint of ours and old-style checkpoint."""
    return request.param, checkpoints[request.param, "new"], checkpoints[request.param, "old"]


def test_our_file_holds_plain_tensors_and_upstreams_does_not(saved: tuple[str, Path, Path]) -> None:
    name, new, old = saved
    assert_plain(torch.load(new, weights_only=True), "checkpoint")
    states = torch.load(old, weights_only=True, map_location="cpu")["optimizer_states"][0]["state"]
    assert any(isinstance(state["exp_avg"], SUBCLASS[name]) for state in states.values())


_READ = """
import sys, torch
from tests.models import LitTokens, loader, trainer
action, name, path = sys.argv[1:]
assert "torchao" not in sys.modules
if action == "load_from_checkpoint":
    model = LitTokens.load_from_checkpoint(path)
else:
    model = LitTokens(optim=name, lr=1e-2)
    getattr(trainer(max_steps=3), action)(model, loader(), ckpt_path=path)
expected = torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
assert all(torch.equal(expected[key], value) for key, value in model.state_dict().items())
"""


@pytest.mark.parametrize("action", ["fit", "validate", "test", "predict", "load_from_checkpoint"])
@pytest.mark.parametrize("style", ["new", "old"])
def test_a_fresh_process_reads_it(style: str, action: str, checkpoints: dict[tuple[str, str], Path]) -> None:
    """Fresh, because importing torchao anywhere makes its classes known to ``torch.load``."""
    done = run_fresh("-c", _READ, action, NAMES[0], str(checkpoints[NAMES[0], style]))
    assert done.returncode == 0, done.stderr


def test_ours_continues_an_old_style_file_exactly(saved: tuple[str, Path, Path]) -> None:
    name, _, old = saved
    uninterrupted = LitTokens()
    uninterrupted.load_state_dict(torch.load(old, weights_only=True, map_location="cpu")["state_dict"])
    reference = build_optimizer(uninterrupted, name, lr=1e-2)
    reference.load_state_dict(torch.load(old, weights_only=True, map_location="cpu")["optimizer_states"][0])
    for batch in [*loader(batches=1)] * 3:
        loss = uninterrupted._loss(batch)
        uninterrupted.zero_grad()
        loss.backward()
        reference.step()
    resumed = LitTokens(optim=name, lr=1e-2)
    trainer(max_steps=6).fit(resumed, loader(batches=1), ckpt_path=old)
    assert_equal(uninterrupted.model.state_dict(), resumed.model.state_dict(), "weights")


def test_optim_callback_reads_old_style_files(saved: tuple[str, Path, Path]) -> None:
    name, _, old = saved
    model = ForeignTokens()
    run = trainer(max_steps=3, callbacks=[OptimCallback(name, lr=1e-2)])
    run.fit(model, loader(), ckpt_path=old)
    assert type(run.strategy.checkpoint_io) is TorchCheckpointIO
    assert_equal(model.state_dict(), torch.load(old, map_location="cpu", weights_only=True)["state_dict"], "w")


def test_asynchronous_saving(saved: tuple[str, Path, Path], tmp_path: Path) -> None:
    name, *_ = saved
    model = LitTokens(optim=name, lr=1e-2)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="{step}")
    run = trainer(max_steps=3, plugins=[AsyncCheckpointIO()], callbacks=[saver], enable_checkpointing=True)
    run.fit(model, loader())
    checkpoint = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert_plain(checkpoint["optimizer_states"], "optimizer state")
    assert_equal(checkpoint["optimizer_states"][0], run.optimizers[0].state_dict(), "optimizer state")


def test_state_dicts_can_be_copied_and_pickled(saved: tuple[str, Path, Path]) -> None:
    name, new, _ = saved
    model = LitTokens(optim=name, lr=1e-2)
    optimizer = build_optimizer(model, name, lr=1e-2)
    state = torch.load(new, weights_only=True)["optimizer_states"][0]
    optimizer.load_state_dict(state)
    assert_equal(copy.deepcopy(optimizer.state_dict()), state, "deepcopy")
    assert_equal(pickle.loads(pickle.dumps(optimizer.state_dict())), state, "pickle")
    # Two optimizers that exchange states must not share the quantized codes.
    before = copy.deepcopy(state["state"][1]["exp_avg"])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert_equal(state["state"][1]["exp_avg"], before, "the caller's state dict")


def test_learning_rates_stay_tensors_and_floats_are_taken(tmp_path: Path) -> None:
    """Schedulers, LearningRateMonitor and Tuner.lr_find, which assigns floats."""
    from lightning.pytorch.tuner import Tuner

    model = LitTokens(optim="adamw_torch_8bit", lr=1e-2, lr_scheduler="cosine")
    logger = CSVLogger(tmp_path)
    run = trainer(max_steps=4, logger=logger, callbacks=[LearningRateMonitor("step")], log_every_n_steps=1)
    run.fit(model, loader())
    with open(logger.experiment.metrics_file_path) as file:
        rows = list(csv.DictReader(file))
    logged = [float(row["lr-AdamW8bit/decay"]) for row in rows if row["lr-AdamW8bit/decay"]]
    assert logged == pytest.approx([1e-2, 8.5355e-3, 5e-3, 1.4645e-3], rel=1e-3)
    assert isinstance(run.optimizers[0].param_groups[0]["lr"], torch.Tensor)

    model = LitTokens(optim="adamw_torch_8bit", lr=1e-2)
    run = trainer(max_steps=40, default_root_dir=tmp_path, enable_checkpointing=True)
    found: Any = Tuner(run).lr_find(model, loader(), num_training=30, min_lr=1e-4, max_lr=1e-1)
    assert found is not None
    assert model.lr == found.suggestion()
    assert model.optim_config.lr == model.lr
