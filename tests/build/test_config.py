"""``OptimConfig``: a request is checked when it is written down, and nothing is built for that."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from lightning_optim import (
    REGISTRY,
    IncompatibleTrainer,
    InvalidOption,
    MissingDependency,
    OptimConfig,
    UnknownOptimizer,
    UnknownSchedule,
    build_optimizer,
)
from tests.models import TokenModel

VALID = OptimConfig(
    "adamw_bnb_8bit",
    lr=1e-3,
    weight_decay=0.1,
    optim_args="betas=(0.8, 0.9)",
    param_groups={"head.*": {"lr": 1e-4}},
    layer_decay=0.75,
    layer_pattern=r"blocks\.(\d+)",
    lr_scheduler="cosine",
    lr_scheduler_args={"num_cycles": 0.5},
    warmup_steps=0.1,
)


@pytest.mark.parametrize("name", sorted(REGISTRY.plain))
def test_every_identifier_is_a_request_by_itself(name: str) -> None:
    config = OptimConfig(name)
    assert dataclasses.asdict(config) == {
        "optim": name,
        "lr": None,
        "weight_decay": None,
        "optim_args": None,
        "optim_target_modules": None,
        "param_groups": None,
        "layer_decay": None,
        "layer_pattern": None,
        "lr_scheduler": None,
        "lr_scheduler_args": None,
        "warmup_steps": 0,
        "optim_fallback": False,
        "override_on_resume": None,
    }


def test_numbers_are_numbers_whatever_they_were_written_as() -> None:
    config = OptimConfig(lr="1e-3", weight_decay="0.1", layer_decay=1, lr_scheduler="linear", warmup_steps="0.1")  # type: ignore[arg-type]
    assert (config.lr, config.weight_decay, config.layer_decay, config.warmup_steps) == (1e-3, 0.1, 1.0, 0.1)
    assert type(config.layer_decay) is float
    assert type(dataclasses.replace(config, warmup_steps=10.0).warmup_steps) is int


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"optim": "adamw_torc"}, UnknownOptimizer, ["'adamw_torc'", "'adamw_torch'"]),
        ({"optim": "torch.optim.AdamX"}, UnknownOptimizer, ["optim='torch.optim.AdamX'"]),
        ({"optim": None}, UnknownOptimizer, ["got None (NoneType)"]),
        ({"lr": -1}, InvalidOption, ["lr=-1", "0 <= value"]),
        ({"lr": "fast"}, InvalidOption, ["lr='fast' (str) is not a number"]),
        ({"lr": math.nan}, InvalidOption, ["lr=nan"]),
        ({"lr": math.inf}, InvalidOption, ["lr=inf", "0 <= value (finite)"]),
        ({"lr": True}, InvalidOption, ["lr=True (bool) is not a number"]),
        ({"weight_decay": -0.1}, InvalidOption, ["weight_decay=-0.1", "0 <= value"]),
        ({"weight_decay": [0.1]}, InvalidOption, ["weight_decay=[0.1] (list) is not a number"]),
        ({"layer_decay": 1.1}, InvalidOption, ["layer_decay=1.1", "0 < value <= 1"]),
        ({"warmup_steps": -1}, InvalidOption, ["warmup_steps=-1", "whole number of steps or a fraction"]),
        ({"warmup_steps": None}, InvalidOption, ["warmup_steps=None"]),
        ({"param_groups": "head.*"}, InvalidOption, ["param_groups='head.*'", "{'embed.*': {'lr': 1e-4}}"]),
        (
            {"optim_target_modules": 3},
            InvalidOption,
            ["optim_target_modules=3 (int)", "'all-linear'", "['attn', 'mlp']"],
        ),
        ({"optim_target_modules": ["attn", 1]}, InvalidOption, ["optim_target_modules=['attn', 1] (list)"]),
        ({"optim_target_modules": []}, InvalidOption, ["optim_target_modules=[] (list)"]),
        ({"optim_target_modules": ["attn", ""]}, InvalidOption, ["optim_target_modules=['attn', ''] (list)"]),
        ({"optim_target_modules": ""}, InvalidOption, ["optim_target_modules='' (str)"]),
        ({"optim_target_modules": {"attn": 1}}, InvalidOption, ["optim_target_modules={'attn': 1} (dict)"]),
        ({"optim_args": "kahan_sum=True"}, InvalidOption, ["'adamw_torch' has no option 'kahan_sum'", "betas"]),
        ({"optim_args": 3}, InvalidOption, ["optim_args=3 (int)", "'adamw_torch'"]),
        ({"optim": "adamw_8bit", "optim_args": {"eps": -1}}, InvalidOption, ["eps=-1", "'adamw_8bit'"]),
        ({"lr_scheduler": "cosinus"}, UnknownSchedule, ["'cosinus'", "'cosine'"]),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": "power=2"}, InvalidOption, ["'cosine' has no option 'power'"]),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": 3}, InvalidOption, ["lr_scheduler_args=3 (int)", "'cosine'"]),
        ({"lr_scheduler": "warmup_stable_decay"}, InvalidOption, ["needs 'num_decay_steps' in lr_scheduler_args"]),
        ({"warmup_steps": 5}, IncompatibleTrainer, ["warmup_steps=5 without lr_scheduler"]),
    ],
)
def test_wrong_requests_are_refused_at_once(
    arguments: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        OptimConfig(**arguments)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lr": -1}, "lr=-1 is out of range"),
        ({"optim": "nope"}, "no optimizer 'nope'"),
        ({"lr_scheduler": None}, "lr_scheduler_args without lr_scheduler"),
        ({"optim_args": "speed=1"}, "no option 'speed'"),
        ({"layer_decay": None}, "layer_pattern without layer_decay"),
    ],
)
def test_a_changed_copy_is_checked_too(change: dict[str, Any], text: str) -> None:
    assert VALID.replace(lr=0.5).lr == 0.5
    assert VALID.replace(lr=0.5).replace(lr=VALID.lr) == VALID
    with pytest.raises(ValueError, match=text):
        VALID.replace(**change)


def test_a_request_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        VALID.lr = 1.0  # type: ignore[misc]


# --- weight decay among the options ----------------------------------------------------------------------------------


@pytest.mark.parametrize("args", ["momentum=0.9,weight_decay=0.1", {"momentum": 0.9, "weight_decay": "0.1"}])
@pytest.mark.parametrize("beside", [None, 0.1])
def test_weight_decay_is_understood_among_the_options(args: Any, beside: float | None) -> None:
    given = dict(args) if isinstance(args, dict) else args
    config = OptimConfig("sgd", weight_decay=beside, optim_args=args)
    assert config.weight_decay == 0.1
    assert dict(config.optim_args or {}).keys() == {"momentum"}
    assert args == given
    optimizer = build_optimizer(TokenModel(8), "sgd", weight_decay=beside, optim_args=args)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.defaults["momentum"] == 0.9
    # The copy still says it once.
    assert config.replace(lr=1.0).weight_decay == 0.1


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        (
            {"weight_decay": 0.2, "optim_args": "weight_decay=0.1"},
            InvalidOption,
            ["given twice", "weight_decay=0.2", "optim_args weight_decay=0.1"],
        ),
        ({"weight_decay": 0.0, "optim_args": "weight_decay=0.1"}, InvalidOption, ["given twice"]),
        ({"optim_args": "weight_decay=-1"}, InvalidOption, ["weight_decay='-1'", "0 <= value"]),
        ({"optim_args": "weight_decay=None"}, InvalidOption, ["weight_decay='None'"]),
        (
            {"optim": "torch.optim.Rprop", "optim_args": {"weight_decay": 0.1}},
            IncompatibleTrainer,
            ["weight_decay=0.1"],
        ),
    ],
)
def test_wrong_weight_decay_among_the_options_is_refused(
    arguments: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        OptimConfig(**arguments)
    assert all(part in str(caught.value) for part in parts), caught.value


# --- packages --------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_an_error_only_when_the_optimizer_is_built() -> None:
    config = OptimConfig("no_such_package.Best", lr=1e-3, optim_args={"speed": 1})
    assert config.replace(lr=2e-3).optim == "no_such_package.Best"
    with pytest.raises(MissingDependency, match="no package 'no_such_package' is installed"):
        build_optimizer(TokenModel(8), "no_such_package.Best", lr=1e-3)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"lr": -1}, "lr=-1 is out of range"),
        ({"lr_scheduler": "nope"}, "no lr_scheduler 'nope'"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"param_groups": 3}, "param_groups=3 is not a mapping"),
        ({"optim_target_modules": 3}, "optim_target_modules=3"),
    ],
)
def test_what_needs_no_package_is_checked_without_it(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        OptimConfig("no_such_package.Best", **wrong)


# --- learning rate ---------------------------------------------------------------------------------------------------


def test_options_may_decide_on_the_default_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    decide = lambda self, default: 0.25 if self.momentum else default  # noqa: E731
    monkeypatch.setattr(REGISTRY["sgd"].options, "default_lr", decide)

    def rate(**arguments: Any) -> float:
        return build_optimizer(TokenModel(8), "sgd", **arguments).param_groups[0]["lr"]

    assert rate() == REGISTRY["sgd"].default_lr
    assert rate(optim_args="momentum=0.9") == 0.25
    assert rate(optim_args="momentum=0.9", lr=0.5) == 0.5
