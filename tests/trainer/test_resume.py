"""Exact resume (contract C3): 10 steps, a checkpoint, a fresh process and 10 steps equal 20 steps, bit for bit.

That holds for the layerwise form of every row, too, and for moves between it and the plain form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_optim import OptimCallback
from tests.cases import BY_NAME, KINDS, LAYERWISE, NAMES, case_of
from tests.compat.test_lightning import GoesOn
from tests.models import ForeignTokens, LitTokens, loader, trainer
from tests.processes import run_fresh

# What a validation is to leave alone: the point of those that are switched for it, and one of each other way to step.
SWITCHED = (*(name for name in NAMES if BY_NAME[name].averages), "adamw_torch", "galore_adamw_8bit", "adalomo")
# When the checkpoint is written, within training or after the validation at the epoch's end; the precision; who trains.
RUNS = {("step", "32-true"): NAMES, ("step", "bf16-true"): KINDS, ("validation", "32-true"): SWITCHED}
# Which form writes the checkpoint, and which one reads it. The engine moves between forms whatever the class's options,
# the precision and the moment are: one name of each class does, in one run.
STAYS = {"plain": ("plain", "plain"), "layerwise": ("layerwise", "layerwise")}
MOVES = {**STAYS, "plain to layerwise": ("plain", "layerwise"), "layerwise to plain": ("layerwise", "plain")}
MOVING = ("step", "32-true")
Outcome = dict[str, Any]


def train(name: str, precision: str, moment: str, directory: Path, **flags: Any) -> Outcome:
    """Trains 20 steps without interruption, leaving a checkpoint of step 10; ``flags`` are the Trainer's."""
    case = case_of(name)
    torch.manual_seed(0)
    model = LitTokens(optim=name, lr=case.lr, optim_args=case.options, weight_decay=0.1, lr_scheduler=case.schedule)
    when = {"every_n_train_steps": 10} if moment == "step" else {"every_n_epochs": 1, "save_on_train_epoch_end": False}
    saver = ModelCheckpoint(directory, filename=f"{name}@{{step}}", save_top_k=-1, **when)
    run = trainer(max_steps=20, precision=precision, callbacks=[saver], enable_checkpointing=True, **flags)
    run.fit(model, loader(), loader(batches=2, seed=1))
    (directory / f"{name}@step=10.ckpt").rename(directory / f"{name}@{precision}.ckpt")
    (directory / f"{name}@step=20.ckpt").unlink()
    return {"weights": model.state_dict(), "optimizer": run.optimizers[0].state_dict()}


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], dict[str, Any]]:
    """Outcomes of a run by file name: uninterrupted ``NAME``, resumed ``NAME@NAME``, all in one fresh process.

    Those of the names that are tested, all or, with ``-k NAME``, one.
    """
    tests = [getattr(item, "callspec", None) for item in request.session.items]
    asked = {test.params["name"] for test in tests if test is not None and isinstance(test.params.get("name"), str)}

    @functools.cache
    def all_of(moment: str, precision: str) -> dict[str, Any]:
        directory = tmp_path_factory.mktemp(moment)
        cases = [BY_NAME[name] for name in RUNS[moment, precision] if name in asked]
        names = [name for case in cases for name in case.forms]
        uninterrupted = {name: train(name, precision, moment, directory) for name in names}
        for name in names:
            checkpoint = torch.load(directory / f"{name}@{precision}.ckpt", weights_only=True)
            assert_plain(checkpoint["optimizer_states"], f"optimizer state of {name}")
        moving = [case.name for case in cases if case.name in KINDS and (moment, precision) == MOVING]
        return {**uninterrupted, **resumed(directory, precision, moving=moving)}

    return all_of


def resumed(directory: Path, precision: str, accelerator: str = "cpu", moving: Iterable[str] = NAMES) -> dict[str, Any]:
    """Resumes all checkpoints of ``directory`` in one fresh process; returns the outcomes as ``NAME@NAME``.

    Those of cases that are ``moving`` in both forms, the others in the form that wrote them.
    """
    done = run_fresh("-m", "tests.resume_worker", str(directory), accelerator, *moving, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = {path.stem: torch.load(path, weights_only=True) for path in directory.glob("*.out")}
    return {stem.replace(f"@{precision}", ""): outcome for stem, outcome in outcomes.items()}


@pytest.mark.parametrize(
    ("moment", "precision", "name", "move"),
    [
        (*run, name, move)
        for run, names in RUNS.items()
        for name in names
        for move, forms in (MOVES if run == MOVING and name in KINDS else STAYS).items()
        if name in LAYERWISE or "layerwise" not in forms
    ],
)
def test_a_fresh_process_continues_exactly(
    moment: str, precision: str, name: str, move: str, outcomes: Callable[[str, str], dict[str, Any]]
) -> None:
    found, case = outcomes(moment, precision), BY_NAME[name]
    writer, reader = (getattr(case, form) for form in MOVES[move])
    assert_equal(found[case.plain], found[f"{writer}@{reader}"], move)


@pytest.mark.parametrize("schedule", [None, "constant", "linear"])
@pytest.mark.parametrize("by_callback", [False, True])
def test_data_that_go_on_where_they_were_do_whatever_the_schedule(
    tmp_path: Path, schedule: str | None, by_callback: bool
) -> None:
    """A schedule asks for the length of the training, and Lightning then forgets the state of the dataloaders."""

    def run(path: Path | None) -> dict[str, Any]:
        torch.manual_seed(0)
        optim: dict[str, Any] = {"optim": "adamw_torch", "lr": 1e-2, "lr_scheduler": schedule}
        model = ForeignTokens() if by_callback else LitTokens(**optim)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
        callbacks = [saver, OptimCallback(**optim)] if by_callback else [saver]
        fit = trainer(max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
        fit.fit(model, GoesOn(loader(5).dataset, batch_size=16), ckpt_path=path)
        return model.state_dict()

    whole = run(None)
    assert_equal(whole, run(tmp_path / "step=7.ckpt"), "weights")


def assert_plain(value: Any, where: str) -> None:
    """Fails unless ``value`` consists of ordinary tensors and plain values."""
    if isinstance(value, dict):
        for key, item in value.items():
            assert_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            assert_plain(item, f"{where}[{index}]")
    else:
        assert type(value) in (Tensor, int, float, bool, str, type(None)), f"{where} is a {type(value)}"


def assert_equal(left: Any, right: Any, where: str) -> None:
    """Fails unless both are the same, tensors bit for bit and of the same dtype."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_equal(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_equal(a, b, f"{where}[{index}]")
    elif isinstance(left, Tensor):
        assert left.dtype is right.dtype, where
        assert torch.equal(left, right), f"{where}: {(left.float() - right.float()).abs().max()}"
    else:
        assert left == right, where
