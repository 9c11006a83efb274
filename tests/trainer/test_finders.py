"""What the schedule is told of the training: its true length, and what Lightning's finders find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder
from torch.utils.data import DataLoader, IterableDataset

from lightning_optim import IncompatibleTrainer, InvalidOption, OptimCallback
from tests.models import ForeignTokens, LitTokens, fp16_mixed, loader, trainer


class Rates(L.Callback):
    """Notes the learning rate of every group at every step of the real fit."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.seen.append([float(group["lr"]) for group in optimizer.param_groups])


def finder(**kwargs: Any) -> LearningRateFinder:
    return LearningRateFinder(num_training_steps=15, early_stop_threshold=None, min_lr=1e-5, max_lr=1e-2, **kwargs)


# --- the length of a training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheduling", "steps"), [({0: 2}, 15), ({0: 4}, 9), ({1: 4}, 16), ({0: 3, 2: 1}, 18)])
@pytest.mark.parametrize("max_steps", [-1, 8])
def test_accumulation_by_epoch_is_counted(scheduling: dict[int, int], steps: int, max_steps: int) -> None:
    rates = Rates()
    run = trainer(max_epochs=3, max_steps=max_steps, callbacks=[GradientAccumulationScheduler(scheduling), rates])
    run.fit(LitTokens(optim="sgd", lr=1.0, lr_scheduler="linear"), loader())
    steps = steps if max_steps == -1 else max_steps
    assert run.global_step == steps
    assert [rate for rate, _ in rates.seen] == pytest.approx([1 - step / steps for step in range(steps)])


def test_a_fraction_is_one_of_the_true_length() -> None:
    model = LitTokens(optim="schedule_free_adamw", warmup_steps=0.5)
    run = trainer(max_epochs=3, callbacks=[GradientAccumulationScheduler({0: 4})])
    run.fit(model, loader())
    assert {group["warmup_steps"] for group in run.optimizers[0].param_groups} == {5}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from loader(batches=2).dataset


def test_epochs_of_unknown_length_have_none() -> None:
    """Lightning says -1 steps, with which a schedule would stand at 0 for ever."""
    model = LitTokens(lr_scheduler="linear")
    with pytest.raises(InvalidOption, match="needs the length of the training"):
        trainer(max_epochs=2).fit(model, DataLoader(Stream(), batch_size=16))
    assert not model.losses


@pytest.mark.parametrize("optim", ["sgd", "schedule_free_adamw"])
def test_a_warmup_as_long_as_the_training_is_said(optim: str) -> None:
    schedule = {"lr_scheduler": "constant_with_warmup"} if optim == "sgd" else {}
    with pytest.warns(UserWarning, match="the warm-up has 50 steps and the whole training 4: the learning rate never"):
        trainer(max_steps=4).fit(LitTokens(optim=optim, warmup_steps=50, **schedule), loader())


# --- LearningRateFinder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "curve"),
    [
        ({}, [1, 1, 1]),
        ({"lr_scheduler": "linear"}, [1, 0.95, 0.9]),
        ({"lr_scheduler": "constant_with_warmup", "warmup_steps": 4}, [0, 0.25, 0.5]),
        ({"lr_scheduler": "reduce_lr_on_plateau", "lr_scheduler_args": {"monitor": "train_loss"}}, [1, 1, 1]),
        ({"optim": "adamw_torch_layerwise", "lr_scheduler": "linear"}, [1, 0.95, 0.9]),
    ],
)
def test_the_found_rate_is_the_peak_of_all_groups(tmp_path: Path, options: dict[str, Any], curve: list[float]) -> None:
    rates, found = Rates(), finder()
    own = {"model[.]head[.].*": {"lr": 1e-9}}
    run = trainer(max_steps=20, callbacks=[found, rates], default_root_dir=tmp_path)
    run.fit(LitTokens(**{"lr": 0.3, "param_groups": own, **options}), loader())
    assert found.optimal_lr is not None
    peak = found.optimal_lr.suggestion()
    names = [group["name"] for group in run.optimizers[0].param_groups]
    # A group with a rate of its own keeps it.
    peaks = torch.tensor([1e-9 if "head" in name else peak for name in names])
    assert 0 < peak < 0.01
    for step, factor in enumerate(curve):
        assert rates.seen[step] == pytest.approx((peaks * factor).tolist(), rel=1e-5)


def test_layers_keep_their_proportions(tmp_path: Path) -> None:
    found = finder()
    run = trainer(max_steps=2, callbacks=[found], default_root_dir=tmp_path)
    model = LitTokens(lr=0.3, layer_decay=0.5)
    model.model.blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
    asked = [group["lr"] / 0.3 for group in model.configure_optimizers().param_groups]  # type: ignore[union-attr]
    run.fit(model, loader())
    assert found.optimal_lr is not None
    taken = [group["lr"] / found.optimal_lr.suggestion() for group in run.optimizers[0].param_groups]
    assert taken == pytest.approx(asked)
    assert len(set(asked)) > 1


def test_a_finder_that_only_suggests_changes_nothing(tmp_path: Path) -> None:
    rates = Rates()
    run = trainer(max_steps=20, callbacks=[finder(update_attr=False), rates], default_root_dir=tmp_path)
    run.fit(LitTokens(lr=0.3, lr_scheduler="linear"), loader())
    assert [rate for rate, *_ in rates.seen[:2]] == pytest.approx([0.3, 0.285])


def test_a_finder_with_a_resume_is_refused(tmp_path: Path) -> None:
    first = trainer(max_steps=2)
    first.fit(LitTokens(), loader())
    first.save_checkpoint(tmp_path / "two.ckpt")
    model = LitTokens()
    with pytest.raises(IncompatibleTrainer, match=r"LearningRateFinder together with fit.*Remove the callback"):
        trainer(max_steps=4, callbacks=[finder()]).fit(model, loader(), ckpt_path=tmp_path / "two.ckpt")
    assert not model.losses


@pytest.mark.parametrize("optim", ["adamw", "sgd", "radam", "adamw_layerwise"])
def test_schedule_free_under_a_grad_scaler(tmp_path: Path, optim: str) -> None:
    """Nobody switches to training in a finder, and its step has no closure."""
    plugins, callbacks = [fp16_mixed()], [finder()]
    run = trainer(max_steps=3, plugins=plugins, callbacks=callbacks, default_root_dir=tmp_path)
    model = LitTokens(optim=f"schedule_free_{optim}", lr=1e-3)
    run.fit(model, loader())
    assert run.global_step == 3
    assert len(callbacks[0].optimal_lr.results["loss"]) == 15  # type: ignore[union-attr]


# --- BatchSizeFinder --------------------------------------------------------------------------------------------------


def fed(base: type[L.LightningModule]) -> type[L.LightningModule]:
    class Fed(base):  # type: ignore[misc, valid-type]
        batch_size = 2

        def train_dataloader(self) -> Any:
            return DataLoader(loader(batches=4).dataset, batch_size=self.batch_size)

        val_dataloader = train_dataloader

    return Fed


@pytest.mark.parametrize("by_callback", [False, True])
@pytest.mark.parametrize("optim", ["sgd", "schedule_free_adamw"])
def test_lengths_are_those_of_the_found_batches(tmp_path: Path, optim: str, by_callback: bool) -> None:
    rates = Rates()
    batches = BatchSizeFinder(init_val=2, max_trials=3, steps_per_trial=1)
    options: dict[str, Any] = {"optim": optim, "lr": 1.0, "warmup_steps": 0.25}
    if optim == "sgd":
        options["lr_scheduler"] = "linear"
    model = fed(ForeignTokens)() if by_callback else fed(LitTokens)(**options)
    callbacks = [batches, rates, *([OptimCallback(**options)] if by_callback else [])]
    run = trainer(max_epochs=2, callbacks=callbacks, default_root_dir=tmp_path)
    run.fit(model)
    assert model.batch_size == 8
    assert run.global_step == 16
    if optim == "sgd":
        rise, fall = [step / 4 for step in range(4)], [1 - step / 12 for step in range(12)]
        assert [rate for rate, _ in rates.seen] == pytest.approx(rise + fall)
    else:
        assert {group["warmup_steps"] for group in run.optimizers[0].param_groups} == {4}
