"""Optimizers that need more than gradients train under a Trainer: the closure, the graph, a flag for each group."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer

from lightning_optim import REGISTRY, OptimCallback, OptimizerSpec, build_optimizer
from lightning_optim.table._spec import MatrixFlag
from lightning_optim.testing import check_results
from tests.models import ForeignTokens, LitTokens, TokenModel, loader, trainer

CURVED = f"{__name__}.Curved"
FLAGGED = f"{__name__}.Flagged"


class Curved(Optimizer):
    """Divides each gradient by the curvature along a fixed direction, which it differentiates the gradients for."""

    def __init__(self, params: Any, lr: float = 1e-2, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        members = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients: list[Tensor] = [p.grad for _, p in members]
        curvatures = torch.autograd.grad(
            gradients, [p for _, p in members], [torch.ones_like(g) for g in gradients], allow_unused=True
        )
        with torch.no_grad():
            for (group, p), gradient, curvature in zip(members, gradients, curvatures, strict=True):
                kept = self.state[p].setdefault("curvature", torch.zeros_like(p))
                kept.lerp_(torch.zeros_like(p) if curvature is None else curvature.abs(), 1 - group["beta"])
                p.addcdiv_(gradient, kept + 1.0, value=-group["lr"])
        return loss


class Flagged(SGD):
    """Wants to be told of each group whether it holds hidden matrices, as classes of Muon do."""

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        weight_decay: float = 0.0,
        adamw_lr: float = 0.01,
        adamw_wd: float = 0.3,
    ) -> None:
        groups = list(params)
        if not all("use_muon" in group for group in groups):
            raise ValueError("use_muon must be set")
        super().__init__(groups, lr, weight_decay=weight_decay)


@pytest.fixture(scope="module", autouse=True)
def rows() -> Iterator[None]:
    """The classes with what their rows must say."""
    curved = dataclasses.replace(REGISTRY.find(CURVED), name="curved", needs_graph=True)
    flag = MatrixFlag("use_muon", "adamw_lr", "adamw_wd")
    flagged = dataclasses.replace(REGISTRY.find(FLAGGED), name="flagged", flag=flag)
    with ExitStack() as registered:
        registered.enter_context(REGISTRY.knowing(curved))
        registered.enter_context(REGISTRY.knowing(flagged))
        yield


def same(module: nn.Module, other: nn.Module) -> None:
    for (name, one), (_, two) in zip(module.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def by_hand(optim: Callable[[nn.Module], Optimizer], accumulate: int = 1, clip: float = 0.0) -> TokenModel:
    """What a loop without Lightning makes of the same model and data."""
    torch.manual_seed(1)
    model = TokenModel()
    optimizer = optim(model)

    def compute(batch: list[Tensor], graph: bool) -> Tensor:
        loss = nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())
        (loss / accumulate).backward(create_graph=graph)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        return loss

    def closure(batch: list[Tensor]) -> Tensor:
        optimizer.zero_grad()
        return compute(batch, graph=False)

    for number, batch in enumerate(loader(6)):
        if isinstance(optimizer, LBFGS):
            optimizer.step(lambda batch=batch: closure(batch))  # type: ignore[arg-type]
            continue
        compute(batch, graph=True)
        if (number + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model


def fitted(model: Any, epochs: int = 1, ckpt_path: Path | None = None, save: Path | None = None, **flags: Any) -> Any:
    run = trainer(max_epochs=epochs, **flags)
    run.fit(model, loader(6), ckpt_path=ckpt_path)
    if save is not None:
        run.save_checkpoint(save)
    return model


def lit(optim: str, **arguments: Any) -> LitTokens:
    torch.manual_seed(1)
    return LitTokens(optim=optim, **arguments)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_differentiated_as_by_hand(accumulate: int) -> None:
    model = lit("curved", lr=0.1)
    fitted(model, accumulate_grad_batches=accumulate)
    same(model.model, by_hand(lambda m: Curved(m.parameters(), lr=0.1), accumulate))
    assert "backward" not in vars(model)
    assert all(p.grad is None or p.grad.grad_fn is None for p in model.parameters())


def test_clipped_gradients_keep_their_graph() -> None:
    model = fitted(lit("curved", lr=0.1), gradient_clip_val=0.5)
    same(model.model, by_hand(lambda m: Curved(m.parameters(), lr=0.1), clip=0.5))


def test_a_module_that_is_not_ours_makes_the_graph_too() -> None:
    torch.manual_seed(1)
    model = fitted(ForeignTokens(), callbacks=[OptimCallback("curved", lr=0.1)])
    same(model.model, by_hand(lambda m: Curved(m.parameters(), lr=0.1)))


def test_the_closure_is_called_as_by_hand() -> None:
    model = fitted(lit("torch.optim.LBFGS", lr=0.5, optim_args={"max_iter": 3}))
    same(model.model, by_hand(lambda m: LBFGS(m.parameters(), lr=0.5, max_iter=3)))
    assert len(model.losses) > 6


def test_the_closure_is_clipped_at_every_call() -> None:
    model = fitted(lit("torch.optim.LBFGS", lr=0.5, optim_args={"max_iter": 3}), gradient_clip_val=0.1)
    same(model.model, by_hand(lambda m: LBFGS(m.parameters(), lr=0.5, max_iter=3), clip=0.1))


@pytest.mark.parametrize(("optim", "lr"), [("curved", 0.1), ("torch.optim.LBFGS", 0.5), ("flagged", 0.1)])
def test_they_resume_exactly(optim: str, lr: float, tmp_path: Path) -> None:
    whole = fitted(lit(optim, lr=lr), epochs=2)
    fitted(lit(optim, lr=lr), save=tmp_path / "half.ckpt")
    resumed = fitted(LitTokens(optim=optim, lr=lr), epochs=2, ckpt_path=tmp_path / "half.ckpt")
    same(whole, resumed)


def test_each_group_says_whether_it_is_hidden_matrices() -> None:
    optimizer = build_optimizer(
        TokenModel(), "flagged", lr=0.2, weight_decay=0.1, param_groups={".*linear[.]bias": {"lr": 0.5}}
    )
    said = {
        group["name"]: (group["use_muon"], group["lr"], group["weight_decay"], len(group["params"]))
        for group in optimizer.param_groups
    }
    assert said == {
        "hidden/decay": (True, 0.2, 0.1, 1),
        "decay": (False, 0.01, 0.3, 2),
        "no_decay": (False, 0.01, 0.0, 3),
        ".*linear[.]bias/no_decay": (False, 0.5, 0.0, 1),
    }


def test_what_the_flag_is_for_can_be_named() -> None:
    optimizer = build_optimizer(TokenModel(), "flagged", optim_target_modules=["head"])
    hidden = [p.shape for group in optimizer.param_groups if group["use_muon"] for p in group["params"]]
    assert hidden == [TokenModel().head.weight.shape]


def test_the_report_says_what_was_taken_for_the_output_layer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fitted(lit("flagged"), fast_dev_run=True)
    assert "'model.head.weight' is taken for the output layer" in caplog.text


@pytest.mark.parametrize("optim", ["curved", "torch.optim.LBFGS"])
def test_what_a_trainer_rules_out_is_refused_by_the_contract(optim: str) -> None:
    results = check_results(optim, lr=0.1)
    refused = {name for name, result in results.items() if result.status == "refused"}
    closure = {"accumulation", "groups"} if optim == "torch.optim.LBFGS" else set()
    assert refused == {"fp16_scaling", "layerwise", *closure}
    assert {results[name].status for name in ("trains", "resume", "closure", "schedule")} == {"kept"}


def test_a_row_that_needs_either_is_coupled() -> None:
    fields = {"name": "x", "target": "torch.optim:SGD", "summary": "", "source": "", "default_lr": 0.1}
    made = OptimizerSpec(**fields, options=REGISTRY["sgd"].options, default_weight_decay=0.0, state=None)
    assert not made.coupled
    assert "calls the closure" in dataclasses.replace(made, needs_closure=True).coupled
    assert "differentiates" in dataclasses.replace(made, needs_graph=True).coupled
    assert dataclasses.replace(made, needs_graph=True, coupled="otherwise").coupled == "otherwise"
