"""What a finetuning callback thaws is grouped as what trained from the beginning, and scaled once by a schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import Tensor, nn

from lightning_optim import IncompatibleTrainer, OptimMixin
from tests.models import trainer

BATCHES = torch.utils.data.DataLoader(torch.arange(16) % 8, batch_size=8)


class Pretrained(OptimMixin, L.LightningModule):
    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        self.backbone = nn.Sequential(nn.Embedding(8, 64), nn.Linear(64, 64), nn.LayerNorm(64))
        self.head = nn.Linear(64, 2)
        self.rates: list[dict[str, float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        groups = self.trainer.optimizers[0].param_groups
        self.rates.append({group["name"]: float(group["lr"]) for group in groups})
        return self.head(self.backbone(batch)).square().mean()


def finetuning() -> BackboneFinetuning:
    return BackboneFinetuning(1, lambda epoch: 2.0, backbone_initial_lr=1e-3, should_align=False, train_bn=True)


def fit(model: Pretrained, epochs: int = 4, ckpt_path: Any = None, **kwargs: Any) -> L.Trainer:
    callbacks = [finetuning(), *kwargs.pop("callbacks", [])]
    run = trainer(max_epochs=epochs, callbacks=callbacks, **kwargs)
    run.fit(model, BATCHES, ckpt_path=ckpt_path)
    return run


def names_of(run: L.Trainer, model: Pretrained) -> dict[str, list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = run.optimizers[0].param_groups
    return {group["name"]: [names[parameter] for parameter in group["params"]] for group in groups}


def test_biases_and_norms_do_not_decay_and_all_have_the_callbacks_rate() -> None:
    model = Pretrained(optim="adamw_torch", lr=1e-2, lr_scheduler="linear")
    run = fit(model)
    assert names_of(run, model) == {
        "decay": ["head.weight"],
        "no_decay": ["head.bias"],
        "added_1/no_decay": ["backbone.1.bias", "backbone.2.weight", "backbone.2.bias"],
        "added_1/decay": ["backbone.0.weight", "backbone.1.weight"],
    }
    decays = {group["name"]: group["weight_decay"] for group in run.optimizers[0].param_groups}
    assert decays == {"decay": 1e-2, "no_decay": 0.0, "added_1/no_decay": 0.0, "added_1/decay": 1e-2}
    thawed = [rates for rates in model.rates if "added_1/decay" in rates]
    assert all(rates["added_1/decay"] == rates["added_1/no_decay"] for rates in thawed)
    # Two steps per epoch: 1e-3 when thawed at step 2 of 8, then along the line to 0; doubled at each later epoch.
    assert [rates["added_1/decay"] for rates in thawed] == pytest.approx(
        [1e-3, 5 / 6e3, 2e-3, 2e-3 * 3 / 4, 4e-3, 2e-3]
    )
    assert "add_param_group" not in vars(run.optimizers[0])


@pytest.mark.parametrize(
    ("optim", "key", "expected"),
    [
        ({"optim": "adamw_8bit"}, "optim_bits", {"backbone.0.weight": 32, "backbone.1.weight": 8}),
        (
            {"optim": "galore_adamw", "optim_args": {"rank": 2}},
            "rank",
            {"backbone.0.weight": None, "backbone.1.weight": 2, "backbone.1.bias": None},
        ),
        (
            {"optim": "adamw_torch_layerwise", "param_groups": {"backbone[.]1[.].*|head.*": {"lr": 0.125}}},
            "lr",
            {"backbone.1.weight": 0.125, "backbone.1.bias": 0.125, "backbone.2.weight": 4e-3},
        ),
    ],
)
def test_the_policy_is_that_of_the_other_parameters(optim: dict[str, Any], key: str, expected: dict[str, Any]) -> None:
    model = Pretrained(lr=1e-2, **optim)
    run = fit(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: group[key] for group in run.optimizers[0].param_groups for p in group["params"]}
    assert {name: found[name] for name in expected} == expected
    assert all(parameter in run.optimizers[0].state for parameter in model.parameters())


def test_a_checkpoint_with_thawed_groups_is_resumed(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(Pretrained(optim="adamw_torch", lr=1e-2), epochs=3, callbacks=[saving], enable_checkpointing=True)
    model = Pretrained(optim="adamw_torch", lr=1e-2)
    run = fit(model, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert [*names_of(run, model)][2:] == ["added_1/no_decay", "added_1/decay"]
    assert model.rates[-1]["added_1/no_decay"] == model.rates[-1]["added_1/decay"] == pytest.approx(4e-3)


class Sparse(Pretrained):
    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        self.backbone[0] = nn.Embedding(8, 64, sparse=True)


@pytest.mark.parametrize("layerwise", ["", "_layerwise"])
def test_what_cannot_be_stepped_is_refused_when_it_is_thawed(layerwise: str) -> None:
    """Frozen, it was none of the optimizer's."""
    model = Sparse(optim=f"adamw_torch{layerwise}", lr=1e-2)
    with pytest.raises(IncompatibleTrainer, match=r"cannot step sparse gradients, and 'backbone\.0\.weight'"):
        fit(model)
    assert len(model.rates) == 2
    fit(Sparse(optim=f"sgd{layerwise}", lr=1e-2, weight_decay=0.0))
    with pytest.raises(IncompatibleTrainer, match="weight_decay together with the sparse gradients"):
        fit(Sparse(optim=f"sgd{layerwise}", lr=1e-2, weight_decay=0.1))
