"""``clip`` in a pattern of ``param_groups``: the part is clipped by itself, all else by the Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import (
    Clipping,
    InvalidOption,
    InvalidParamGroups,
    Layerwise,
    OptimConfig,
    build_optimizer,
)
from tests.models import LitTokens, fp16_mixed, loader, trainer

STEPS = 4
PATTERN = "model[.](embedding|head)[.].*"
# Of the part and of the Trainer, both so small that they clip.
LIMITS = {"norm": (0.05, 0.02), "value": (0.003, 0.002)}
BOTH = [(own, shared) for own in LIMITS for shared in (*LIMITS, None)]


def asked(form: str = "", own: str = "norm", **options: Any) -> dict[str, Any]:
    part = {"optim": "adamw_torch", "lr": 2e-3, "weight_decay": 0.0, "clip": {own: LIMITS[own][0]}}
    return {"optim": f"sgd{form}", "lr": 0.5, "param_groups": {PATTERN: part}, "optim_args": options or None}


def flags(shared: str | None) -> dict[str, Any]:
    if shared is None:
        return {}
    return {"gradient_clip_val": LIMITS[shared][1], "gradient_clip_algorithm": shared}


def train(own: str, shared: str | None, form: str = "", options: dict[str, Any] | None = None, **more: Any) -> Any:
    torch.manual_seed(0)
    module = LitTokens(**asked(form, own, **(options or {})))
    trainer(max_steps=STEPS, **flags(shared), **more).fit(module, loader())
    return module


def clip(parameters: list[Tensor], kind: str, limit: float) -> None:
    clipper = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[kind]
    clipper(parameters, limit)


def by_hand(own: str, shared: str | None, accumulate: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = LitTokens().model
    mine = [model.embedding.weight, model.head.weight, model.head.bias]
    others = [p for p in model.parameters() if not any(p is q for q in mine)]
    optimizers = [torch.optim.SGD(others, lr=0.5), torch.optim.AdamW(mine, lr=2e-3, weight_decay=0.0)]
    batches = [batch for _ in range(2) for batch in loader()][: STEPS * accumulate]
    for number, (tokens, targets) in enumerate(batches, 1):
        scores = model(tokens)
        (nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten()) / accumulate).backward()
        if number % accumulate:
            continue
        if shared is not None:
            clip(others, shared, LIMITS[shared][1])
        clip(mine, own, LIMITS[own][0])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


def assert_same(module: LitTokens, expected: dict[str, Tensor], **tolerance: float) -> None:
    assert expected.keys() == module.model.state_dict().keys()
    for name, weight in module.model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("own", "shared"), BOTH)
def test_equals_a_loop_that_clips_two_optimizers(own: str, shared: str | None, accumulate: int) -> None:
    expected = by_hand(own, shared, accumulate)
    more = {"accumulate_grad_batches": accumulate}
    assert_same(train(own, shared, **more), expected)
    for options in ({"bucket_mb": 0.0}, {}, {"norm_budget_mb": 64.0}):
        if "norm_budget_mb" not in options or "norm" in (own, shared):
            assert_same(train(own, shared, "_layerwise", options, **more), expected)


def test_without_its_clip_the_part_would_be_clipped_with_the_others() -> None:
    part = asked()["param_groups"][PATTERN]
    torch.manual_seed(0)
    module = LitTokens(**{**asked(), "param_groups": {PATTERN: {k: v for k, v in part.items() if k != "clip"}}})
    trainer(max_steps=STEPS, **flags("norm")).fit(module, loader())
    with pytest.raises(AssertionError):
        assert_same(module, by_hand("norm", "norm"))


@pytest.mark.parametrize("form", ["", "_layerwise"])
def test_under_a_scaler_what_is_clipped_is_unscaled(form: str) -> None:
    options = {"overflow": "skip_step"} if form else {}
    module = train("norm", "norm", form, options, plugins=fp16_mixed())
    assert_same(module, by_hand("norm", "norm"), rtol=2e-2, atol=1e-3)


def test_the_trainer_clips_all_again_afterwards() -> None:
    module = train("norm", "norm")
    optimizer = module.trainer.optimizers[0]
    clipped = module.trainer.precision_plugin.main_params(optimizer)
    assert len(list(clipped)) == len(list(module.parameters()))


def test_in_plain_pytorch_and_with_the_engine() -> None:
    weights = []
    for layerwise in (False, True):
        torch.manual_seed(0)
        module = LitTokens()
        request = asked("_layerwise" if layerwise else "")
        optimizer = build_optimizer(module, **request)
        for tokens, targets in list(loader())[:STEPS]:
            loss = nn.functional.cross_entropy(module.model(tokens).flatten(0, 1), targets.flatten())
            if layerwise:
                Layerwise.of(optimizer).backward(loss)
            else:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        weights.append(module.model.state_dict())
    for found in weights:
        module.model.load_state_dict(found)
        assert_same(module, by_hand("norm", None))


@pytest.mark.parametrize("given", [1.0, {}, {"norm": 0}, {"norm": True}, {"max": 1.0}, {"norm": 1.0, "value": 1.0}])
def test_what_is_no_clip_is_refused_at_once(given: Any) -> None:
    with pytest.raises(InvalidOption, match=r"clip=.*Use clip=\{'norm': 1.0\} or clip=\{'value': 0.5\}"):
        OptimConfig(optim="sgd", lr=0.1, param_groups={PATTERN: {"optim": "adamw_torch", "clip": given}})


def test_a_clip_is_for_a_part() -> None:
    with pytest.raises(InvalidParamGroups, match=r"sets 'clip' and names no optimizer.*add 'optim': 'sgd'"):
        OptimConfig(optim="sgd_layerwise", lr=0.1, param_groups={PATTERN: {"clip": {"norm": 1.0}}})


def test_the_engine_knows_the_previous_norm_of_all_gradients_only() -> None:
    optimizer = build_optimizer(LitTokens(), **asked("_layerwise"))
    with pytest.raises(InvalidOption, match=r"Clipping\('previous', ...\) where a part has a clipping of its own"):
        Layerwise.of(optimizer).begin(Clipping("previous", 1.0))
