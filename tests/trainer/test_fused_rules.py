"""What the strategies ``fused`` and ``fused_ddp`` refuse: each rule, by its text, before any batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from lightning_optim import IncompatibleTrainer
from lightning_optim._compat.torch import sgd_is_wrong_on_half
from lightning_optim.build import rules
from lightning_optim.build.rules import _fused as fused
from tests.models import ForeignTokens, LitTokens, fp16_mixed, loader, trainer

RULES = rules.FUSED_RULES
Rule = Callable[[rules.Fusing], str | None]


@dataclass(frozen=True)
class Case:
    """A fit that breaks one rule.

    Attributes:
        rule: The rule.
        parts: What the text must contain: what was passed and what to type instead.
        optim: The arguments of the mixin, or what makes an optimizer of the module's own.
        parameter: One that the module gets besides its layers.
        trainer: Makes the Trainer's arguments.
    """

    rule: Rule
    parts: tuple[str, ...]
    optim: dict[str, Any] | Callable[..., Optimizer]
    parameter: torch.Tensor | None = None
    sparse: bool = False
    trainer: Callable[[], dict[str, Any]] = field(default=dict)


class Own(ForeignTokens):
    def __init__(self, make: Callable[..., Optimizer]) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Optimizer:
        return self.make(self.parameters())


CASES = (
    Case(
        fused._kernel_exists,
        (
            "strategy='fused' with optim='lion_8bit': torch has no fused kernel of Lion for cpu",
            "Use one of optim='adamw', 'sgd', 'adagrad', or a Trainer without strategy",
        ),
        {"optim": "lion_8bit"},
    ),
    Case(
        fused._kernel_exists,
        ("strategy='fused' with optim='schedule_free_adamw'", "no fused kernel of AdamWScheduleFree"),
        {"optim": "schedule_free_adamw"},
    ),
    Case(
        fused._kernel_exists,
        ("strategy='fused' with the module's RMSprop: torch has no fused kernel of RMSprop for cpu",),
        RMSprop,
    ),
    Case(
        fused._kernel_exists,
        ("strategy='fused_ddp' with optim='rmsprop'", "or Trainer(strategy='ddp')"),
        {"optim": "rmsprop"},
        trainer=lambda: {"strategy": "fused_ddp", "devices": 1},
    ),
    Case(
        fused._not_stepped_in_backward,
        (
            "strategy='fused' with optim='adamw_torch_layerwise'",
            "Use optim='adamw_torch', or a Trainer without strategy",
        ),
        {"optim": "adamw_torch_layerwise"},
    ),
    Case(
        fused._flags_agree,
        ("strategy='fused' with optim='sgd' and foreach=True", "Leave it out"),
        {"optim": "sgd", "optim_args": {"foreach": True}},
    ),
    Case(
        fused._flags_agree,
        ("strategy='fused' with the module's AdamW and differentiable=True",),
        lambda parameters: AdamW(parameters, differentiable=True),
    ),
    Case(
        fused._gradients_are_dense,
        ("strategy='fused' with optim='adagrad'", "'model.embedding.weight'", "sparse=False"),
        {"optim": "adagrad"},
        sparse=True,
    ),
    Case(
        fused._parameters_are_real,
        ("optim='adamw_torch'", "'extra' is torch.complex64", "torch.view_as_real"),
        {"optim": "adamw_torch"},
        parameter=torch.ones(2, dtype=torch.complex64),
    ),
    Case(
        fused._parameters_are_packed,
        ("optim='adamw_torch'", "'extra' is a view with gaps or overlaps", "tensor.contiguous()"),
        {"optim": "adamw_torch"},
        parameter=torch.zeros(4, 6)[:, ::2],
    ),
    *[
        Case(
            fused._sgd_on_cpu_is_not_half,
            (
                f"strategy='fused' with {own}",
                f"the fused SGD of torch {torch.__version__}",
                "https://github.com/pytorch/pytorch/issues/191763",
                "precision='bf16-mixed'",
            ),
            optim,
            trainer=lambda precision=precision: {"precision": precision},
        )
        for own, optim, precision in (
            ("optim='sgd'", {"optim": "sgd"}, "bf16-true"),
            ("optim='sgd'", {"optim": "sgd"}, "16-true"),
            ("the module's SGD", lambda parameters: SGD(parameters, fused=True), "bf16-true"),
        )
    ],
    Case(
        fused._velocity_starts_at_zero,
        ("optim='sgd', dampening and float16 loss scaling", "Use dampening=0"),
        {"optim": "sgd", "optim_args": {"momentum": 0.9, "dampening": 0.5}},
        trainer=lambda: {"plugins": fp16_mixed()},
    ),
)


@pytest.fixture
def fired(monkeypatch: pytest.MonkeyPatch) -> list[Rule]:
    """Collects the rules that refuse something."""
    refusing: list[Rule] = []

    def recorded(rule: Rule) -> Rule:
        def call(fusing: rules.Fusing) -> str | None:
            text = rule(fusing)
            if text is not None:
                refusing.append(rule)
            return text

        return call

    monkeypatch.setattr(rules, "FUSED_RULES", {code: recorded(rule) for code, rule in RULES.items()})
    return refusing


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule.__name__)
def test_is_refused_before_the_first_batch(case: Case, fired: list[Rule]) -> None:
    if case.rule is fused._sgd_on_cpu_is_not_half:
        assert sgd_is_wrong_on_half(), "this torch is right: the rule, its cases and what the docs say of it may go"
    model = LitTokens(**case.optim) if isinstance(case.optim, dict) else Own(case.optim)
    if case.parameter is not None:
        model.extra = nn.Parameter(case.parameter)
    model.model.embedding = nn.Embedding(16, 64, sparse=case.sparse)
    run = trainer(**{"max_steps": 1, "strategy": "fused", **case.trainer()})
    with pytest.raises(IncompatibleTrainer) as caught:
        run.fit(model, loader())
    assert all(part in str(caught.value) for part in case.parts), caught.value
    assert fired == [case.rule]
    assert [RULES[code] for code in caught.value.codes] == fired
    assert run.global_step == 0


def test_every_rule_has_a_case() -> None:
    assert {case.rule for case in CASES} == set(RULES.values())


@pytest.mark.parametrize(
    ("optim", "arguments"),
    [
        ({"optim": "sgd"}, lambda: {"precision": "bf16-mixed"}),
        ({"optim": "sgd", "optim_args": {"momentum": 0.9, "dampening": 0.5}}, dict),
        ({"optim": "sgd", "optim_args": {"dampening": 0.5}}, lambda: {"plugins": fp16_mixed()}),
        ({"optim": "adagrad"}, lambda: {"precision": "bf16-true"}),
        ({"optim": "adamw_torch", "optim_args": {"foreach": False}}, lambda: {"precision": "bf16-true"}),
        # What is refused without the strategy.
        (
            {"optim": "torch.optim.SGD", "optim_args": {"fused": True, "momentum": 0.9}},
            lambda: {"plugins": fp16_mixed(), "gradient_clip_val": 1.0},
        ),
    ],
)
def test_neighbours_that_work(optim: dict[str, Any], arguments: Callable[[], dict[str, Any]]) -> None:
    model = LitTokens(**optim)
    trainer(max_steps=12, strategy="fused", **arguments()).fit(model, loader())
    assert len(model.losses) == 12


def test_lomo_is_not_told_to_leave_out_a_suffix() -> None:
    with pytest.raises(IncompatibleTrainer) as caught:
        trainer(strategy="fused").fit(LitTokens(optim="lomo"), loader())
    assert "does not go through one fused step. Use a Trainer without strategy;" in str(caught.value)
