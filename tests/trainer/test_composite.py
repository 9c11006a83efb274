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
from torch import Tensor, nn
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
    UnknownOptimizer,
    build_optimizer,
)
from lightning_optim.stepping import Composite
from lightning_optim.table.rows import ROWS
from tests.cases import BY_NAME, Case
from tests.models import ForeignTokens, LitTokens, TokenModel, fp16_mixed, loader, trainer
from tests.trainer.test_reference import WARMUP, upstream
from tests.trainer.test_resume import assert_equal, assert_plain

STEPS, DECAY = 10, 0.1
PATTERN = "model[.](embedding|head)[.].*"
# The main optimizer, and that of embedding and head; each provider beside others, in both places.
PAIRS = (
    ("sgd", "adamw_torch"),
    ("adamw_torch", "sgd"),
    ("adamw_torch_fused", "rmsprop"),
    ("galore_adamw", "adamw_8bit"),
    ("galore_adamw_8bit", "lion_8bit"),
    ("lion_32bit", "adafactor"),
    ("apollo_adamw", "adamw_torch_8bit"),
    ("adamw_torch_4bit", "adagrad"),
    ("schedule_free_adamw", "sgd"),
    ("ademamix_8bit", "schedule_free_sgd"),
    ("schedule_free_radam", "schedule_free_adamw"),
    ("adafactor", "stable_adamw"),
    ("grokadamw", "adamw_anyprecision"),
    ("rmsprop_bnb_8bit", "galore_adafactor"),
)


def warmup(name: str) -> int:
    """Returns the steps for which the reference of a case warms up by itself."""
    return WARMUP if BY_NAME[name].row.warmup == "optimizer" else 0


def request(main: str, other: str, form: str = "", **changes: Any) -> dict[str, Any]:
    """Returns the arguments of a module whose embedding and head are another optimizer's."""
    case, part = BY_NAME[main], BY_NAME[other]
    own = {"optim": other, "lr": part.lr, "weight_decay": DECAY, "warmup_steps": warmup(other), **part.options}
    asked = {
        "optim": main + form,
        "lr": case.lr,
        "weight_decay": DECAY,
        "optim_args": case.options,
        "param_groups": {PATTERN: own},
        "lr_scheduler": case.schedule,
        "warmup_steps": warmup(main),
    }
    return {**asked, **changes}


def train(asked: dict[str, Any], directory: Path | None = None, resume: str | None = None, **flags: Any) -> LitTokens:
    """Trains two epochs of 5 steps of two batches each; ``directory`` gets a checkpoint of step 5."""
    torch.manual_seed(0)
    model = LitTokens(**asked)
    saver = [ModelCheckpoint(directory, every_n_train_steps=5, save_top_k=-1)] if directory else []
    flags = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "gradient_clip_algorithm": "value", **flags}
    run = trainer(max_steps=STEPS, callbacks=saver, enable_checkpointing=bool(saver), **flags)
    run.fit(model, loader(), ckpt_path=resume)
    return model


def state_of(model: LitTokens) -> dict[str, Any]:
    return {"weights": dict(model.state_dict()), "optimizer": model.trainer.optimizers[0].state_dict()}


def group(case: Case, parameters: list[Tensor], weight_decay: float, kind: str = "") -> dict[str, Any]:
    """Returns a param group as one would write it for this class."""
    own: dict[str, Any] = {"params": parameters, "weight_decay": weight_decay}
    if case.projects and kind != "linear":
        own["rank"] = None
    if case.row.bits:
        own["optim_bits"] = 32 if kind == "embedding" else case.row.bits
    return own


def by_hand(main: str, other: str) -> dict[str, Tensor]:
    """Trains as ``train`` does, with two optimizers of the upstream classes; returns the weights."""
    torch.manual_seed(0)
    model = LitTokens().model
    one, two = BY_NAME[main], BY_NAME[other]
    optimizers = [
        upstream(
            one,
            [
                group(one, [model.linear.weight], DECAY, "linear"),
                group(one, [model.linear.bias, *model.norm.parameters()], 0.0),
            ],
        ),
        upstream(
            two,
            [
                group(two, [model.embedding.weight], DECAY, "embedding"),
                group(two, [model.head.weight], DECAY, "linear"),
                group(two, [model.head.bias], 0.0),
            ],
        ),
    ]
    built = [*zip(optimizers, (one, two), strict=True)]
    schedules = [get_scheduler("linear", each, 0, STEPS) for each, case in built if one.schedule and case.schedule]
    averaging = [each for each, case in built if case.averages]
    for averaged in averaging:
        averaged.train()  # type: ignore[attr-defined]
    batches = [batch for _ in range(2) for batch in loader()]
    for first in range(0, 2 * STEPS, 2):
        for tokens, targets in batches[first : first + 2]:
            (F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()) / 2).backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.05)
        for each in (*optimizers, *schedules):
            each.step()
        model.zero_grad()
    for averaged in averaging:
        averaged.eval()  # type: ignore[attr-defined]
    return {f"model.{name}": value for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("main", "other"), PAIRS)
def test_a_pair_is_two_optimizers_resumes_and_is_the_same_layerwise(main: str, other: str, tmp_path: Path) -> None:
    asked = request(main, other)
    whole = state_of(train(asked, tmp_path))
    assert_plain(whole["optimizer"], "state")
    assert_equal(whole["weights"], by_hand(main, other), "by hand")
    checkpoint = next(str(path) for path in tmp_path.glob("*step=5.ckpt"))
    assert torch.load(checkpoint, weights_only=True)["optimizer_states"]
    assert_equal(whole, state_of(train(asked, resume=checkpoint)), "resumed")
    if not (BY_NAME[main].row.coupled or BY_NAME[other].row.coupled):
        layerwise = request(main, other, "_layerwise")
        assert_equal(whole, state_of(train(layerwise, resume=checkpoint)), "resumed layerwise")
        assert_equal(whole, state_of(train(layerwise)), "layerwise")


TWO = request("sgd", "adamw_torch")
FOREIGN = {"(embedding|head)[.].*": TWO["param_groups"][PATTERN]}


def test_clipping_by_norm_covers_all_parts_and_a_scaler_scales_once() -> None:
    """The norm is that of all gradients; a composite under a GradScaler is one optimizer, fused parts included."""
    flags = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "norm"}
    plain, layerwise = train(TWO, **flags), train(request("sgd", "adamw_torch", "_layerwise"), **flags)
    for one, other in zip(plain.parameters(), layerwise.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    fused = request("sgd", "adamw_torch_fused")
    scaled = [train(asked, plugins=[fp16_mixed()], gradient_clip_val=0.05) for asked in (TWO, fused)]
    for one, other in zip(*(model.parameters() for model in scaled), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)
    assert scaled[0].losses[-1] < 0.8 * scaled[0].losses[0]


def test_each_part_may_have_a_schedule_and_loggers_see_one_optimizer(tmp_path: Path) -> None:
    own = {**TWO["param_groups"][PATTERN], "lr_scheduler": "cosine", "warmup_steps": 2}
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
    groups = {PATTERN: TWO["param_groups"][PATTERN]}
    run = trainer(max_steps=2, callbacks=[OptimCallback("sgd", lr=0.1, param_groups=groups)])
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
    assert rates[f"{PATTERN}/decay"] == TWO["param_groups"][PATTERN]["lr"], "a part keeps what it asked for"

    plainly, fused = train(TWO), train(TWO, strategy=FusedStrategy())
    for one, other in zip(plainly.parameters(), fused.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


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
