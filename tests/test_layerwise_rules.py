"""What is refused where an optimizer is to be stepped during backward: each rule, by its text, before any batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn

from lightning_optim import (
    REGISTRY,
    IncompatibleTrainer,
    InvalidOption,
    LayerwiseStrategy,
    OptimConfig,
    build_optimizer,
    rules,
)
from lightning_optim.rules import stepping
from tests.models import ForeignTokens, LitTokens, loader, trainer

Rule = Callable[[rules.Stepping], str | None]


class OwnClipping(LitTokens):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, 1.0, "norm")


class LogsNorms(LitTokens):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms = [parameter.grad.norm() for parameter in self.parameters()]


class LooksForUnused(Callback):
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.unused = {name: p for name, p in pl_module.named_parameters() if (lambda p=p: p.grad)() is None}


class Manual(LitTokens):
    automatic_optimization = False


class PlainBackward(LitTokens):
    def backward(self, loss: Tensor) -> None:
        loss.backward()


class Sparse(LitTokens):
    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        self.model.embedding = nn.Embedding(16, 64, sparse=True)


@dataclass(frozen=True)
class Case:
    """A fit that breaks one rule."""

    rule: Rule
    parts: tuple[str, ...]
    model: type[LitTokens] = LitTokens
    trainer: Callable[[], dict[str, Any]] = dict
    optim: dict[str, Any] = field(default_factory=lambda: {"optim": "sgd_layerwise"})


def on_one_process(**kwargs: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"strategy": "layerwise_ddp", "devices": 1, **kwargs}


CASES = (
    Case(
        stepping._strategy_leaves_gradients_to_hooks,
        ("optim='sgd_layerwise' under the strategy 'ddp'", "Use Trainer(strategy='layerwise_ddp')"),
        trainer=lambda: {"strategy": "ddp", "devices": 1},
    ),
    Case(
        stepping._clipping_of_ones_own,
        ("optim='sgd_layerwise' beside a configure_gradient_clipping", "Trainer(gradient_clip_val=...)"),
        OwnClipping,
    ),
    Case(
        stepping._clipping_of_ones_own,
        ("strategy='layerwise' beside a configure_gradient_clipping", "a Trainer without strategy='layerwise'"),
        OwnClipping,
        lambda: {"strategy": "layerwise"},
        {"optim": "torch.optim.SGD", "lr": 0.1},
    ),
    Case(stepping._gradients_are_gone, ("LogsNorms.on_before_optimizer_step", "log_grad_norm=True"), LogsNorms),
    Case(
        stepping._gradients_are_gone,
        ("LooksForUnused.on_after_backward", "parameter.register_hook"),
        trainer=lambda: {"callbacks": LooksForUnused()},
    ),
    Case(
        stepping._manual_needs_one_process,
        ("strategy='layerwise_ddp' with manual optimization", "Trainer(strategy='ddp')"),
        Manual,
        on_one_process(),
    ),
    Case(
        stepping._measuring_needs_the_graph,
        ("its first backward only measures", "def backward(self, loss, *args, **kwargs)"),
        PlainBackward,
        lambda: {"gradient_clip_val": 1.0},
    ),
    Case(stepping._measuring_needs_the_graph, ("does not take retain_graph",), PlainBackward, on_one_process()),
    Case(
        stepping._norm_clipping_needs_clipping,
        ("norm_clipping='previous' without Trainer(gradient_clip_val=...", "leave norm_clipping out"),
        optim={"optim": "sgd_layerwise", "optim_args": {"norm_clipping": "previous"}},
    ),
    Case(
        stepping._norm_clipping_needs_clipping,
        ("norm_clipping='per_parameter'",),
        trainer=lambda: {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
        optim={"optim": "sgd_layerwise", "optim_args": "norm_clipping=per_parameter"},
    ),
    Case(
        stepping._sparse_gradients_are_not_averaged,
        (
            "'model.embedding.weight' belongs to an embedding with sparse=True",
            "Trainer(strategy='ddp') and optim='sgd'",
        ),
        Sparse,
        on_one_process(),
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule.__name__}-{case.model.__name__}")
def test_fits_are_refused_before_the_first_batch(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    fired = []

    def recorded(rule: Rule) -> Rule:
        def call(facts: rules.Stepping) -> str | None:
            text = rule(facts)
            fired.extend([rule] if text else [])
            return text

        return call

    monkeypatch.setattr(rules, "LAYERWISE_RULES", tuple(map(recorded, rules.LAYERWISE_RULES)))
    model = case.model(**case.optim)
    fit = trainer(max_steps=1, **case.trainer())
    with pytest.raises(IncompatibleTrainer) as caught:
        fit.fit(model, loader())
    assert all(part in str(caught.value) for part in case.parts), caught.value
    assert fired == [case.rule]
    assert model.losses == []
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_every_rule_has_a_case() -> None:
    assert {case.rule for case in CASES} == set(rules.LAYERWISE_RULES)


@pytest.mark.parametrize(
    ("strategy", "flag"),
    [
        ("ddp", "strategy='layerwise_ddp'"),
        ("fsdp", "strategy='layerwise_fsdp2'"),
        ("deepspeed", "strategy='layerwise_fsdp2'"),
        ("ModelParallelStrategy", "strategy='layerwise_fsdp2'"),
        ("MyStrategy", "'layerwise' (one device) or 'layerwise_ddp' (several)"),
    ],
)
def test_each_strategy_is_answered_with_the_flag_to_type(strategy: str, flag: str) -> None:
    with pytest.raises(IncompatibleTrainer) as caught:
        rules.check_layerwise(rules.Stepping("optim='sgd_layerwise'", strategy))
    assert flag in str(caught.value)
    assert f"the strategy {strategy!r}" in str(caught.value)


def test_the_names_of_strategies_are_lightnings_classes() -> None:
    from lightning_optim.callbacks.layerwise import _strategy_name

    strategies: list[Strategy] = [ModelParallelStrategy(), LayerwiseStrategy()]
    assert [_strategy_name(strategy) for strategy in strategies] == ["ModelParallelStrategy", "layerwise"]


def test_hooks_that_do_not_look_at_gradients_are_welcome() -> None:
    class Counts(LitTokens):
        steps = 0

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.steps += 1

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)

        def backward(self, loss: Tensor, **kwargs: Any) -> None:
            loss.backward(**kwargs)

    model = Counts(optim="sgd_layerwise")
    trainer(max_steps=2, gradient_clip_val=1.0).fit(model, loader())
    assert model.steps == 2


def test_strategy_layerwise_lifts_the_limit_of_fused_optimizers() -> None:
    from tests.models import fp16_mixed

    model = LitTokens(optim="adamw_torch_fused")
    fit = trainer(max_steps=2, strategy="layerwise", plugins=fp16_mixed(), gradient_clip_val=1.0)
    fit.fit(model, loader())
    assert fit.global_step == 2


# --- the suffix ------------------------------------------------------------------------------------------------------


def test_what_steps_all_parameters_together_has_no_layerwise_form() -> None:
    with pytest.raises(IncompatibleTrainer, match=r"LBFGS.*several times.*Use optim='torch.optim.LBFGS'"):
        OptimConfig("torch.optim.LBFGS_layerwise", lr=1.0)

    class OwnLBFGS(ForeignTokens):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(IncompatibleTrainer, match="LBFGS evaluates the model several times"):
        trainer(max_steps=1, strategy="layerwise").fit(OwnLBFGS(), loader())


def test_the_row_is_derived() -> None:
    base, derived = REGISTRY["adamw_8bit"], REGISTRY["adamw_8bit_layerwise"]
    assert derived.layerwise
    assert not base.layerwise
    assert derived.name == "adamw_bnb_8bit_layerwise"
    assert derived.aliases == ("adamw_8bit_layerwise",)
    assert (derived.target, derived.fixed, derived.state, derived.requirements) == (
        base.target,
        base.fixed,
        base.state,
        base.requirements,
    )
    assert issubclass(derived.options, base.options)
    assert REGISTRY["adamw_8bit_layerwise"] == derived
    assert "adamw_8bit_layerwise" in REGISTRY
    assert REGISTRY.get("adamw_8bit_layerwise") == derived
    assert "adamw_8bit_layerwise_layerwise" not in REGISTRY
    assert not any(name.endswith("_layerwise") for name in REGISTRY)


def test_a_dotted_path_takes_the_suffix() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = build_optimizer([weight], "torch.optim.NAdam_layerwise", lr=0.1, optim_args="bucket_mb=0")
    optimizer.step(lambda: (weight.sum() * 2).backward())
    assert type(optimizer) is torch.optim.NAdam
    assert weight.grad is None
    assert not torch.equal(weight, torch.ones(4))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bucket_mb": -1}, "bucket_mb=-1 of 'sgd_layerwise' is out of range"),
        ({"norm_clipping": "adaptive"}, "'exact' | 'previous' | 'per_parameter'"),
        ({"log_grad_norm": "maybe"}, "log_grad_norm='maybe'"),
        ({"rank": 4}, "'rank'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        OptimConfig("sgd_layerwise", optim_args=options)
    assert text in str(caught.value)


def test_plain_rows_take_no_layerwise_options() -> None:
    with pytest.raises(InvalidOption, match="bucket_mb"):
        OptimConfig("sgd", optim_args={"bucket_mb": 1})
