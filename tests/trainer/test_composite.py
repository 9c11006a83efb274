"""Several optimizers as one (contract C14): a pattern of ``param_groups`` that names an optimizer.

Equal to a hand-written loop with two optimizers, resumed exactly, the same stepped during backward.
"""

from __future__ import annotations

import copy
import csv
import pickle
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import get_scheduler

from lightning_optim import (
    FusedStrategy,
    IncompatibleTrainer,
    InvalidOption,
    InvalidParamGroups,
    Layerwise,
    OptimCallback,
    OptimConfig,
    OptimMixin,
    UnknownOptimizer,
    build_optimizer,
)
from lightning_optim.stepping import Composite, averaging_parts
from lightning_optim.table.rows import ROWS
from tests.cases import BY_NAME
from tests.composites import PAIRS, PATTERN, by_hand, fit, request, state_of, steps_in_backward
from tests.models import ForeignTokens, LitTokens, TokenModel, loader, trainer
from tests.trainer.test_resume import assert_equal, assert_plain


@pytest.mark.parametrize(("main", "other"), PAIRS)
def test_a_pair_is_two_optimizers_resumes_and_is_the_same_layerwise(main: str, other: str, tmp_path: Path) -> None:
    asked = request(main, other)
    whole = state_of(fit(asked, directory=tmp_path))
    assert_plain(whole["optimizer"], "state")
    assert_equal(whole["weights"], by_hand(main, other)[0], "by hand")
    checkpoint = tmp_path / "step=5.ckpt"
    assert torch.load(checkpoint, weights_only=True)["optimizer_states"]
    assert_equal(whole, state_of(fit(asked, resume=checkpoint)), "resumed")
    if steps_in_backward(main, other):
        layerwise = request(main, other, "_layerwise")
        assert_equal(whole, state_of(fit(layerwise, resume=checkpoint)), "resumed layerwise")
        assert_equal(whole, state_of(fit(layerwise)), "layerwise")


@pytest.mark.parametrize(("main", "other"), PAIRS)
def test_a_pair_under_a_scaler_clipped_by_norm_skips_as_one(main: str, other: str) -> None:
    """A gradient of the second part overflows, and the first part's step is skipped with it."""
    weights, scale = by_hand(main, other, "norm", scaled=True)
    assert scale == 2.0**15, "one overflow"
    for form in ("", "_layerwise") if steps_in_backward(main, other) else ("",):
        model = fit(request(main, other, form, scaled=True), "norm", scaled=True)
        assert_equal(dict(model.state_dict()), weights, form)
        assert model.trainer.scaler is not None
        assert model.trainer.scaler.get_scale() == scale


OWN = {"optim": "adamw_torch", "lr": 1e-2, "weight_decay": 0.1}
TWO = request("sgd", "adamw_torch", param_groups={PATTERN: OWN})
FOREIGN = {"(embedding|head)[.].*": OWN}


def test_each_part_may_have_a_schedule_and_loggers_see_one_optimizer(tmp_path: Path) -> None:
    own = {**OWN, "lr_scheduler": "cosine", "warmup_steps": 2}
    model = LitTokens(**{**TWO, "lr_scheduler": "linear", "param_groups": {PATTERN: own}})
    logger = CSVLogger(tmp_path)
    trainer(max_steps=8, logger=logger, callbacks=[LearningRateMonitor("step")], log_every_n_steps=1).fit(
        model, loader()
    )
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    rates = {name: [float(row[name]) for row in rows if row[name]] for name in rows[0] if name.startswith("lr-")}
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    expected = {}
    for label, lr, name, steps in (("decay", TWO["lr"], "linear", 0), (PATTERN, own["lr"], "cosine", 2)):
        reference = torch.optim.SGD(parameters, lr=lr)
        schedule = get_scheduler(name, reference, steps, 8)
        expected[label] = []
        for _ in range(8):
            expected[label].append(reference.param_groups[0]["lr"])
            reference.step()
            schedule.step()
    assert rates["lr-Composite/decay"] == pytest.approx(expected["decay"])
    assert rates[f"lr-Composite/{PATTERN}/decay"] == pytest.approx(expected[PATTERN])
    hyperparameters = logger.experiment.hparams["optimizer"]
    assert hyperparameters["parts"][PATTERN]["class"] == "torch.optim.AdamW"
    assert hyperparameters["schedule"].startswith(f"linear; {PATTERN}: cosine")


def test_a_schedule_free_part_is_evaluated_and_saved_at_its_average(tmp_path: Path) -> None:
    asked = request("adamw_torch", "schedule_free_sgd", lr_scheduler="cosine")
    model = LitTokens(**asked)
    saver = ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(max_steps=10, callbacks=[saver], enable_checkpointing=True)
    run.fit(model, loader(), loader(batches=2, seed=1))
    part = run.optimizers[0].parts[PATTERN]  # type: ignore[attr-defined]
    assert not part.training
    assert part.param_groups[0]["lr"] == asked["param_groups"][PATTERN]["lr"], "no schedule but its own"
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    head = model.model.head.weight
    assert torch.equal(saved["model.head.weight"], head), "the average is saved"
    part.train()
    assert not torch.equal(saved["model.head.weight"], head)


@pytest.mark.parametrize(("main", "other"), PAIRS)
def test_a_copy_of_a_pair_trains_on_by_itself(main: str, other: str) -> None:
    torch.manual_seed(0)
    model = TokenModel()
    part = {"optim": other, "lr": BY_NAME[other].lr, "clip": {"norm": 1.0}}
    optimizer = build_optimizer(model, main, lr=BY_NAME[main].lr, param_groups={"(embedding|head)[.].*": part})
    for averaging in averaging_parts(optimizer):
        averaging.train()
    step(model, optimizer)
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer)
    for copied, own in copies:
        assert_equal(copied.state_dict(), before, "not moved with the original")
        step(copied, own)
        assert_equal(copied.state_dict(), model.state_dict(), "weights")
        assert_equal(own.state_dict(), optimizer.state_dict(), "state")


def test_it_is_copied_pickled_and_goes_through_a_distributed_checkpoint() -> None:
    torch.manual_seed(0)
    model = TokenModel()
    arguments = {"lr": 0.1, "optim_args": {"momentum": 0.9}, "param_groups": FOREIGN}
    optimizer = build_optimizer(model, "sgd", **arguments)
    assert isinstance(optimizer, Composite)
    step(model, optimizer)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert all(part.state is copied.state for part in copied.parts.values())
        assert_equal(optimizer.state_dict(), copied.state_dict(), "copied")
    saved = get_optimizer_state_dict(model, optimizer)
    other_model = copy.deepcopy(model)
    other = build_optimizer(other_model, "sgd", **arguments)
    set_optimizer_state_dict(other_model, other, copy.deepcopy(saved))
    assert_equal(optimizer.state_dict(), other.state_dict(), "distributed checkpoint")
    for each in ((model, optimizer), (other_model, other)):
        step(*each)
    assert_equal(model.state_dict(), other_model.state_dict(), "after a step")


def step(model: TokenModel, optimizer: Optimizer) -> None:
    tokens, targets = next(iter(loader()))
    F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_state_dict_is_loaded_whole_or_not_at_all() -> None:
    model = TokenModel()
    built = {
        name: build_optimizer(model, "sgd", lr=0.1, param_groups={"head.*": {"optim": name}})
        for name in ("adamw_torch", "adagrad")
    }
    step(model, built["adamw_torch"])
    before = built["adagrad"].state_dict()
    with pytest.raises(
        InvalidOption, match=r"optim='sgd' and optim='adamw_torch' wrote the state .*'adagrad' would read"
    ):
        built["adagrad"].load_state_dict(built["adamw_torch"].state_dict())
    assert_equal(before, built["adagrad"].state_dict(), "unchanged")
    plain = build_optimizer(model, "sgd", lr=0.1)
    with pytest.raises(InvalidOption, match=r"optim='sgd' wrote the state .* optim='sgd' and optim='adagrad' would"):
        built["adagrad"].load_state_dict(plain.state_dict())
    other = build_optimizer(model, "sgd", lr=0.1, param_groups={".*bias": {"optim": "adagrad"}})
    with pytest.raises(InvalidOption, match="belongs to other groups"):
        other.load_state_dict(built["adagrad"].state_dict())


def test_every_door_takes_it(tmp_path: Path) -> None:
    """The callback, plain PyTorch layerwise, a found learning rate, the fused strategy."""
    foreign = ForeignTokens()
    run = trainer(max_steps=2, callbacks=[OptimCallback("sgd", lr=0.1, param_groups={PATTERN: OWN})])
    run.fit(foreign, loader())
    assert [type(part).__name__ for part in run.optimizers[0].parts.values()] == ["SGD", "AdamW"]  # type: ignore[attr-defined]

    models = [TokenModel(), TokenModel()]
    models[1].load_state_dict(models[0].state_dict())
    plain = build_optimizer(models[0], "sgd", lr=0.1, param_groups=FOREIGN)
    layerwise = build_optimizer(models[1], "sgd_layerwise", lr=0.1, param_groups=FOREIGN)
    attached = Layerwise.of(layerwise)
    assert attached is not None
    tokens, targets = next(iter(loader()))
    for _ in range(3):
        step(models[0], plain)
        attached.backward(F.cross_entropy(models[1](tokens).flatten(0, 1), targets.flatten()))
    assert_equal(models[0].state_dict(), models[1].state_dict(), "layerwise")
    assert_equal(plain.state_dict(), layerwise.state_dict(), "layerwise")

    found = LitTokens(**{**TWO, "lr_scheduler": "constant"})
    finder = LearningRateFinder(num_training_steps=20)
    run = trainer(max_steps=2, callbacks=[finder], default_root_dir=tmp_path, logger=CSVLogger(tmp_path))
    run.fit(found, loader())
    rates = {group["name"]: group["lr"] for group in run.optimizers[0].param_groups}
    assert rates["decay"] == finder.optimal_lr.suggestion() == found.lr
    assert rates[f"{PATTERN}/decay"] == OWN["lr"], "a part keeps what it asked for"

    plainly, fused = fit(TWO), fit(TWO, strategy=FusedStrategy())
    for one, other in zip(plainly.parameters(), fused.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


class ByHand(OptimMixin, L.LightningModule):
    """Steps several as one by manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = TokenModel()

    def configure_optimizers(self) -> Any:
        return self.build_optimizer(self.model, "sgd", lr=0.1, param_groups=AVERAGED)

    def training_step(self, batch: tuple[torch.Tensor, ...], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.model(batch[0]).flatten(0, 1), batch[1].flatten()))
        optimizer.step()


AVERAGED = {"(embedding|head)[.].*": {"optim": "schedule_free_sgd", "lr": 1.0}}


def test_manual_optimization_and_fabric_take_it(tmp_path: Path) -> None:
    """Each gives the weights of a plain loop, and a state that Fabric saved goes on."""
    torch.manual_seed(0)
    by_hand = ByHand()
    models = [copy.deepcopy(by_hand.model) for _ in range(3)]
    trainer(max_epochs=1).fit(by_hand, loader())
    plain, outer, again = (build_optimizer(model, "sgd", lr=0.1, param_groups=AVERAGED) for model in models)
    for optimizer in (plain, outer, again):
        optimizer.parts["(embedding|head)[.].*"].train()  # type: ignore[attr-defined]
    fabric = L.Fabric(accelerator="cpu", devices=1)
    wrapped, wrapper = fabric.setup(models[1], outer)
    for number, (tokens, targets) in enumerate(loader()):
        F.cross_entropy(models[0](tokens).flatten(0, 1), targets.flatten()).backward()
        plain.step()
        plain.zero_grad()
        fabric.backward(F.cross_entropy(wrapped(tokens).flatten(0, 1), targets.flatten()))
        wrapper.step()
        wrapper.zero_grad()
        if number == 4:
            fabric.save(tmp_path / "half.ckpt", {"model": wrapped, "optimizer": wrapper})
            wrapped, wrapper = fabric.setup(models[2], again)
            fabric.load(tmp_path / "half.ckpt", {"model": wrapped, "optimizer": wrapper})
    assert_equal(models[0].state_dict(), models[2].state_dict(), "Fabric")
    assert_equal(plain.state_dict(), again.state_dict(), "Fabric")
    plain.parts["(embedding|head)[.].*"].eval()  # type: ignore[attr-defined]
    assert_equal(models[0].state_dict(), by_hand.model.state_dict(), "manual optimization")


REFUSED = {
    "unknown name": ({"head.*": {"optim": "adamx"}}, UnknownOptimizer, "adamw"),
    "another's option": ({"head.*": {"optim": "adamw_torch", "momentum": 0.9}}, InvalidOption, "head.*momentum"),
    "no identifier": ({"head.*": {"optim": 3}}, InvalidParamGroups, "no identifier"),
    "stepped in backward": ({"head.*": {"optim": "adamw_torch_layerwise"}}, IncompatibleTrainer, "all or nothing"),
    "lomo": ({"head.*": {"optim": "lomo"}}, IncompatibleTrainer, "all or nothing"),
    "plateau": (
        {"head.*": {"optim": "adamw_torch", "lr_scheduler": "reduce_lr_on_plateau"}},
        IncompatibleTrainer,
        "for the whole",
    ),
    "no schedule for a warm-up": (
        {"head.*": {"optim": "adamw_torch", "warmup_steps": 3}},
        IncompatibleTrainer,
        "param_groups\\['head[.][*]'\\]: warmup_steps=3 without lr_scheduler",
    ),
    "takes nothing": ({"tail.*": {"optim": "adamw_torch"}}, InvalidParamGroups, "matches no trainable parameter"),
    "takes what is taken": (
        {".*head.*": {"lr": 1.0}, "model.head.*": {"optim": "adamw_torch"}},
        InvalidParamGroups,
        "an earlier pattern takes",
    ),
    "takes all": ({".*": {"optim": "adamw_torch"}}, InvalidParamGroups, "would train nothing"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_one_is_refused(what: str) -> None:
    groups, error, text = REFUSED[what]
    with pytest.raises(error, match=text):
        build_optimizer(LitTokens(), "sgd", lr=0.1, param_groups=groups)


def test_what_couples_cannot_be_stepped_in_backward_and_a_metric_moves_all() -> None:
    coupled = next(row.name for row in ROWS if row.coupled)
    OptimConfig("sgd", param_groups={"head.*": {"optim": coupled}})
    with pytest.raises(IncompatibleTrainer, match=f"{coupled}_layerwise"):
        OptimConfig("sgd_layerwise", param_groups={"head.*": {"optim": coupled}})
    for part in ({"optim": "adamw_torch", "lr_scheduler": "linear"}, {"optim": "schedule_free_sgd"}):
        with pytest.raises(IncompatibleTrainer, match=re.escape("param_groups['head.*']")):
            OptimConfig("sgd", lr_scheduler="reduce_lr_on_plateau", param_groups={"head.*": part})


def test_groups_that_a_finetuning_callback_adds_go_to_their_part() -> None:
    class Unfreeze(L.pytorch.callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module: L.LightningModule) -> None:
            self.freeze(pl_module.model.embedding)  # type: ignore[arg-type]

        def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: Optimizer) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.model.embedding, optimizer, lr=0.05)  # type: ignore[arg-type]

    model = LitTokens(**TWO)
    before = model.model.embedding.weight.clone()
    run = trainer(max_epochs=3, callbacks=[Unfreeze()])
    run.fit(model, loader())
    composite: Any = run.optimizers[0]
    (added,) = [group for group in composite.param_groups if group["name"].startswith("added")]
    assert added["params"][0] is model.model.embedding.weight
    assert added in composite.parts[PATTERN].param_groups
    assert set(composite.state[added["params"][0]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert not torch.equal(before, model.model.embedding.weight)
