"""Classes of the collections that need more than gradients train under a Trainer, and resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_optim import IncompatibleTrainer, UnknownOptimizer, build_optimizer
from lightning_optim.testing import held
from tests.collections.test_collections import needs_package
from tests.models import LitTokens, TokenModel, loader, trainer

DEMANDING = {
    # The graph.
    "pytorch_optimizer:sophiah": {"lr": 1e-2},
    "pytorch_optimizer:adahessian": {},
    # The closure.
    "pytorch_optimizer:alig": {"optim_args": {"max_lr": 0.1}},
    "pytorch_optimizer:SAM": {},
    # A flag for each group.
    "pytorch_optimizer:adago": {},
    "pytorch_optimizer:adamuon": {},
    "pytorch_optimizer:muon": {},
    "pytorch_optimizer:muonclip": {},
    "pytorch_optimizer:normuon": {},
    # A switch between training and evaluation.
    "pytorch_optimizer:schedulefreeadamw": {"warmup_steps": 2},
    "pytorch_optimizer:schedulefreeradam": {},
    "pytorch_optimizer:schedulefreesgd": {},
    "pytorch_optimizer:splus": {},
}


class Seeded(Callback):
    """Has a step draw the same random numbers whenever it is taken; Lightning's checkpoints do not hold their state."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(trainer.global_step)


def fitted(name: str, epochs: int, ckpt_path: Path | None = None, save: Path | None = None) -> dict[str, Any]:
    torch.manual_seed(0)
    model = LitTokens(optim=name, **DEMANDING[name])
    run = trainer(max_epochs=epochs, val_check_interval=2, num_sanity_val_steps=0, callbacks=[Seeded()])
    run.fit(model, loader(6), loader(2, seed=1), ckpt_path=ckpt_path)
    if save is not None:
        run.save_checkpoint(save)
    return {"weights": model.state_dict(), "losses": model.losses}


@pytest.mark.parametrize("name", DEMANDING)
def test_they_train_and_resume_exactly(name: str, tmp_path: Path) -> None:
    needs_package(name.replace(":", "."))
    whole = fitted(name, 2)
    half = fitted(name, 1, save=tmp_path / "half.ckpt")
    resumed = fitted(name, 2, ckpt_path=tmp_path / "half.ckpt")
    assert whole["losses"] == half["losses"] + resumed["losses"]
    for key, value in whole["weights"].items():
        assert torch.equal(value, resumed["weights"][key]), key
    assert whole["losses"][-1] < whole["losses"][0]


def test_one_with_a_generator_of_its_own_trains() -> None:
    # Which no state dict holds.
    needs_package("timm.optim")
    model = LitTokens(optim="timm:adahessian")
    trainer(max_epochs=1).fit(model, loader(6))
    assert model.losses[-1] < model.losses[0]


@pytest.mark.parametrize("name", ["pytorch_optimizer:schedulefreeadamw", "pytorch_optimizer:splus"])
def test_checkpoints_hold_averaged_weights(name: str) -> None:
    needs_package(name.replace(":", "."))
    model = LitTokens(optim=name)
    trainer(max_epochs=1).fit(model, loader(4))
    after = {key: value.clone() for key, value in model.state_dict().items()}
    (optimizer,) = [model.trainer.optimizers[0]]
    optimizer.train()
    assert any(not torch.equal(after[key], value) for key, value in model.state_dict().items())
    trained = [p.detach().clone() for p in model.parameters()]
    averages = optimizer.averaged_weights()
    optimizer.eval()
    assert all(torch.equal(averages[p], p) for p in model.parameters())
    optimizer.train()
    assert all(torch.equal(before, p) for before, p in zip(trained, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "name", ["pytorch_optimizer:muon", "pytorch_optimizer:normuon", "pytorch_optimizer:schedulefreeadamw"]
)
def test_layerwise_is_plain(name: str) -> None:
    needs_package(name.replace(":", "."))
    (result,) = held(name, {}, promises=["layerwise"])
    assert (result.status, result.text) == ("kept", "")


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("pytorch_optimizer:lomo", UnknownOptimizer, "takes the model where optimizers take parameters. Use optim='l"),
        ("pytorch_optimizer:Lookahead", UnknownOptimizer, "wraps another optimizer .'optimizer'."),
        ("pytorch_optimizer:FriendlySAM", UnknownOptimizer, "wraps another optimizer .'base_optimizer'."),
        ("pytorch_optimizer:WSAM", UnknownOptimizer, "Build it yourself: WSAM.module"),
        ("pytorch_optimizer:ScheduleFreeWrapper", UnknownOptimizer, "Build it yourself, in a configure_optimizers"),
        ("pytorch_optimizer:distributedmuon", IncompatibleTrainer, "torch.distributed is not initialized"),
        ("pytorch_optimizer:spectralsphere", IncompatibleTrainer, "two dimensions only"),
    ],
)
def test_others_are_refused_when_they_are_built(name: str, error: type[Exception], text: str) -> None:
    needs_package(name.replace(":", "."))
    with pytest.raises(error, match=text):
        build_optimizer(TokenModel(), name)
