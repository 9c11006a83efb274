"""What is refused where an optimizer is to be stepped during backward: each rule, by its text, before any batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins import MixedPrecision
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn

from lightning_optim import (
    REGISTRY,
    FusedDDPStrategy,
    FusedStrategy,
    IncompatibleTrainer,
    InvalidOption,
    Layerwise,
    LayerwiseStrategy,
    NPUDDPStrategy,
    OptimConfig,
    UnknownOptimizer,
    build_optimizer,
)
from lightning_optim._compat.torch import entries
from lightning_optim.build import rules
from lightning_optim.build.rules import _layerwise as stepping
from lightning_optim.layerwise._coupled import Watch
from lightning_optim.layerwise._split_step import SplitStep
from tests.models import ForeignTokens, LitTokens, fp16_mixed, loader, trainer
from tests.trainer.test_resume import assert_equal

RULES = rules.LAYERWISE_RULES
Rule = Callable[[rules.Stepping], str | None]


class OwnClipping(LitTokens):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, 1.0, "norm")


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
        ("optim='sgd_layerwise' together with a configure_gradient_clipping", "Trainer(gradient_clip_val=...)"),
        OwnClipping,
    ),
    Case(
        stepping._clipping_of_ones_own,
        ("strategy='layerwise' together with a configure_gradient_clipping", "a Trainer without strategy='layerwise'"),
        OwnClipping,
        lambda: {"strategy": "layerwise"},
        {"optim": "torch.optim.SGD", "lr": 0.1},
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
        stepping._previous_norm_is_of_all,
        ("norm_clipping='previous' with a clip of param_groups", "Use norm_clipping='exact' or 'per_parameter'"),
        trainer=lambda: {"gradient_clip_val": 1.0},
        optim={
            "optim": "sgd_layerwise",
            "optim_args": {"norm_clipping": "previous"},
            "param_groups": {".*head.*": {"optim": "adamw_torch", "clip": {"norm": 1.0}}},
        },
    ),
    Case(
        stepping._norm_budget_needs_a_measurement,
        ("norm_budget_mb=8 would be ignored", "Trainer(gradient_clip_val=...)", "leave norm_budget_mb out"),
        optim={"optim": "sgd_layerwise", "optim_args": {"norm_budget_mb": 8}},
    ),
    Case(
        stepping._norm_budget_needs_a_measurement,
        ("norm_budget_mb=8 would be ignored",),
        trainer=lambda: {"gradient_clip_val": 1.0},
        optim={"optim": "sgd_layerwise", "optim_args": {"norm_budget_mb": 8, "norm_clipping": "previous"}},
    ),
    Case(
        stepping._overflow_needs_a_scaler,
        ("overflow='skip_bucket' without a GradScaler", "Trainer(precision='16-mixed')"),
        optim={"optim": "sgd_layerwise", "optim_args": {"overflow": "skip_bucket"}},
    ),
    Case(
        stepping._overflow_needs_a_scaler,
        ("overflow='skip_step' with manual optimization", "or use optim='sgd'"),
        Manual,
        lambda: {"plugins": fp16_mixed()},
        {"optim": "sgd_layerwise", "optim_args": {"overflow": "skip_step"}},
    ),
    Case(
        stepping._measuring_needs_the_graph,
        ("does not take retain_graph",),
        PlainBackward,
        lambda: {"plugins": fp16_mixed()},
        {"optim": "sgd_layerwise", "optim_args": {"overflow": "skip_step"}},
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

    monkeypatch.setattr(rules, "LAYERWISE_RULES", {code: recorded(rule) for code, rule in RULES.items()})
    model = case.model(**case.optim)
    fit = trainer(max_steps=1, **case.trainer())
    with pytest.raises(IncompatibleTrainer) as caught:
        fit.fit(model, loader())
    assert all(part in str(caught.value) for part in case.parts), caught.value
    assert fired == [case.rule]
    assert [RULES[code] for code in caught.value.codes] == fired
    assert model.losses == []
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_every_rule_has_a_case() -> None:
    assert {case.rule for case in CASES} == set(RULES.values())


@pytest.mark.parametrize(
    ("strategy", "flag"),
    [
        ("ddp", "strategy='layerwise_ddp'"),
        ("fused_ddp", "strategy='layerwise_ddp'"),
        ("npu_ddp", "strategy='layerwise_ddp'"),
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
    from lightning_optim.trainer.callbacks._layerwise import _strategy_name

    class Mine(ModelParallelStrategy):
        pass

    class layerwise(Strategy):  # A name of ours, by chance.
        pass

    layerwise.__abstractmethods__ = frozenset()
    strategies: list[Strategy] = [Mine(), DDPStrategy(), FusedStrategy(), layerwise()]  # type: ignore[abstract]
    names = ["ModelParallelStrategy", "ddp", "single_device", f"{__name__}.{layerwise.__qualname__}"]
    assert [_strategy_name(strategy) for strategy in strategies] == names


def test_strategies_of_ours_go_by_the_flag_that_was_typed() -> None:
    from lightning_optim.trainer.callbacks._layerwise import _strategy_name

    strategies: list[Strategy] = [LayerwiseStrategy(), FusedDDPStrategy(), NPUDDPStrategy()]
    assert [_strategy_name(strategy) for strategy in strategies] == ["layerwise", "fused_ddp", "npu_ddp"]


def test_one_device_is_not_told_of_processes() -> None:
    for strategy, drifts in (("single_xla", False), ("xla", True)):
        with pytest.raises(IncompatibleTrainer) as caught:
            rules.check_layerwise(rules.Stepping("optim='sgd_layerwise'", strategy))
        assert ("processes would drift apart" in str(caught.value)) is drifts


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


# --- who reads gradients ---------------------------------------------------------------------------------------------


def norms(module: nn.Module) -> list[Tensor]:
    return [parameter.grad.norm() for parameter in module.parameters() if parameter.grad is not None]


class LogsByHelper(LitTokens):
    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.a()

    def a(self) -> None:
        self.b()

    def b(self) -> None:
        norms(self)


class Masks(LitTokens):
    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None


class ClipsInBackward(LitTokens):
    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        loss.backward(**kwargs)
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class WrapsTheClosure(LitTokens):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        def closure() -> Any:
            loss = optimizer_closure()
            norms(self)
            return loss

        optimizer.step(closure=closure)


class OwnInstance(LitTokens):
    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        self.on_before_zero_grad = lambda optimizer: norms(self)


class LogsAtBatchEnd(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        norms(pl_module)


class LogsByAttribute(Callback):
    def __init__(self) -> None:
        self.on_after_backward = lambda trainer, module: torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)


class Harmless(Callback):
    """Looks at gradients of inputs, at those of nothing, and zeroes them."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        with torch.enable_grad():
            x = torch.ones(2, requires_grad=True)
            torch.autograd.grad((x * x).sum(), x)
        assert x.grad is None
        pl_module.zero_grad()
        trainer.optimizers[0].zero_grad()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step < 0:
            norms(pl_module)


def told(caught: Any) -> list[str]:
    """Returns the hooks that a fit warned of."""
    texts = [str(warning.message) for warning in caught]
    return [text.partition(" ")[0] for text in texts if "looks at the gradient of" in text]


@pytest.mark.parametrize(
    ("model", "callback", "readers"),
    [
        (LogsByHelper, None, ["LogsByHelper.on_before_optimizer_step"]),
        (Masks, None, ["Masks.on_after_backward"]),
        (ClipsInBackward, None, ["ClipsInBackward.backward"]),
        (WrapsTheClosure, None, ["WrapsTheClosure.optimizer_step"]),
        (OwnInstance, None, ["OwnInstance.on_before_zero_grad"]),
        (LitTokens, LogsAtBatchEnd, ["LogsAtBatchEnd.on_train_batch_end"]),
        (LitTokens, LogsByAttribute, ["LogsByAttribute.on_after_backward"]),
        (LitTokens, Harmless, []),
    ],
)
def test_each_hook_that_looks_for_freed_gradients_is_told_once(
    model: type[LitTokens], callback: type[Callback] | None, readers: list[str]
) -> None:
    callbacks = [callback()] if callback else []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(max_steps=4, callbacks=callbacks).fit(model(optim="sgd_layerwise", optim_args="bucket_mb=0"), loader())
    assert told(caught) == readers
    for remedy in ("log_grad_norm=True", "parameter.register_hook", "optim='sgd'", "gradient_readers='ignore'"):
        assert all(remedy in str(w.message) for w in caught if "looks at the gradient of" in str(w.message))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = model(optim="torch.optim.SGD", lr=0.1)
        trainer(max_steps=2, strategy=LayerwiseStrategy(gradient_readers="ignore"), callbacks=callbacks).fit(
            module, loader()
        )
    assert told(caught) == []


def test_nothing_is_told_of_micro_batches_that_accumulate() -> None:
    class Looks(LitTokens):
        def on_after_backward(self) -> None:
            if self.trainer.fit_loop._should_accumulate():
                self.found = len(norms(self))

    model = Looks(optim="sgd_layerwise")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(max_steps=2, accumulate_grad_batches=2).fit(model, loader())
    assert model.found
    assert told(caught) == []


@pytest.mark.parametrize("fails", [False, True])
def test_watching_ends_after_two_steps_and_with_the_fit(fails: bool) -> None:
    class Watches(Callback):
        modes: list[int]

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.modes = []

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            self.modes.append(torch._C._len_torch_function_stack())
            if fails:
                raise RuntimeError("on purpose")

    watches = Watches()
    run = trainer(max_steps=4, callbacks=watches)
    model = LitTokens(optim="sgd_layerwise")
    with pytest.raises(RuntimeError, match="on purpose") if fails else nullcontext():
        run.fit(model, loader())
    assert watches.modes == ([1] if fails else [1, 1, 0, 0])
    assert "profile" not in vars(run.profiler)
    assert torch._C._len_torch_function_stack() == 0
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


# --- optimizers that step their parameters together -------------------------------------------------------------------


def test_wrappers_of_optimizers_are_refused() -> None:
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, base: torch.optim.Optimizer) -> None:
            super().__init__(base.param_groups, {})
            self.base = base

    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(IncompatibleTrainer, match=r"Lookahead wraps another optimizer \(SGD\)"):
        Layerwise(Lookahead(torch.optim.SGD([weight], lr=0.1)))
    assert not weight._post_accumulate_grad_hooks


class Estimates(torch.optim.SGD):
    """Keeps one estimate from all gradients, as D-Adaptation and Prodigy do: from its second step on in a group."""

    @staticmethod
    def of(optimizer: torch.optim.Optimizer) -> float:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if any(len(parameter) not in (2, 4) for parameter in parameters):
            # The probe learns nothing, so that only the steps themselves show it.
            raise ValueError("only the shapes of this test")
        return sum(p.grad.abs().sum().item() for p in parameters)

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["d"] = self.of(self) if group["k"] > 1 else 1e-6
        return super().step(closure)


class EstimatesInATensor(Estimates):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["d"].fill_(self.of(self))
        return torch.optim.SGD.step(self, closure)


class EstimatesInAnAttribute(Estimates):
    def step(self, closure: Any = None) -> Any:
        self.d = self.of(self)
        return torch.optim.SGD.step(self, closure)


class EstimatesInATensorOfItsOwn(Estimates):
    def step(self, closure: Any = None) -> Any:
        self.d.fill_(self.of(self))
        return torch.optim.SGD.step(self, closure)


@pytest.mark.parametrize("bucket_mb", [0, 8], ids=["buckets", "one_bucket"])
@pytest.mark.parametrize("kind", [Estimates, EstimatesInATensor, EstimatesInAnAttribute, EstimatesInATensorOfItsOwn])
def test_an_optimizer_that_couples_its_parameters_is_refused_and_moves_nothing(
    kind: type[Estimates], bucket_mb: float
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    # Its gradient is zero: by itself it would tell nothing.
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    optimizer = kind(model.parameters(), lr=0.1, momentum=0.9)
    if kind is EstimatesInATensor:
        optimizer.param_groups[0]["d"] = torch.zeros(())
    optimizer.d = torch.zeros(1)
    layerwise = Layerwise(optimizer, bucket_mb)

    def step() -> None:
        layerwise.backward(model(torch.ones(1, 4)).square().sum() + (model.unused * 0).sum())

    if kind is Estimates:
        step()
    parameters = [parameter.detach().clone() for parameter in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(IncompatibleTrainer, match=r"different values of 'd'.*couples its parameters"):
        step()
    assert all(map(torch.equal, parameters, model.parameters()))
    assert_equal(state, optimizer.state_dict(), "state")
    assert torch.equal(optimizer.d, torch.zeros(1))


def test_a_part_whose_sparse_gradient_adds_up_to_zero_is_undone_if_its_entries_count() -> None:
    class EstimatesFromEntries(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            (group,) = self.param_groups
            for parameter in group["params"]:
                if parameter.grad.is_sparse:
                    group["d"] = entries(parameter.grad).abs().sum().item()
                parameter.data.mul_(0.5)

    weights = [nn.Parameter(torch.ones(3, 2)) for _ in range(3)]
    places = torch.tensor([[0, 0]])
    for weight, values in ((weights[0], [[1.0, 1.0], [-1.0, -1.0]]), (weights[2], [[5.0, 5.0], [5.0, 5.0]])):
        weight.grad = torch.sparse_coo_tensor(places, torch.tensor(values), (3, 2), check_invariants=True)
    # Writes no estimate, though its gradient is not zero.
    weights[1].grad = torch.ones(3, 2)
    optimizer = EstimatesFromEntries(weights, lr=0.1)
    split = SplitStep(optimizer, Watch(optimizer, {}))
    for weight in weights[:2]:
        split.inner([weight]).step()
    with pytest.raises(IncompatibleTrainer, match="different values of 'd'"):
        split.inner([weights[2]]).step()
    assert torch.equal(weights[0], torch.ones(3, 2))
    assert torch.equal(weights[2], torch.ones(3, 2))


@pytest.mark.parametrize("bucket_mb", [0, 8])
def test_a_counter_changed_in_place_advances_once_per_step(bucket_mb: float) -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            return super().step(closure)

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = Counting(model.parameters(), lr=0.1)
    optimizer.steps = counter = torch.zeros(())
    layerwise = Layerwise(optimizer, bucket_mb)
    for number in range(1, 6):
        layerwise.backward(model(torch.ones(1, 4)).square().sum())
        assert optimizer.steps is counter
        assert counter == number


def test_bitsandbytes_overrides_by_position_are_refused() -> None:
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    model = nn.Linear(64, 64)
    manager.register_module_override(model, "weight", {"optim_bits": 32})
    try:
        with pytest.raises(IncompatibleTrainer, match=r"GlobalOptimManager.*optim='adamw_8bit_layerwise'"):
            Layerwise(bitsandbytes.optim.AdamW8bit(model.parameters()))
        Layerwise(build_optimizer(model, "adamw_8bit"))
    finally:
        manager.module_weight_config_triple.clear()


# --- backward that comes too early ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw_torch_layerwise", "adamw_8bit_layerwise"])
def test_a_weight_whose_old_value_is_needed_after_its_step_is_found(name: str) -> None:
    """bitsandbytes writes without autograd's knowledge."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    optimizer = build_optimizer(model, name, lr=0.1, optim_args={"bucket_mb": 0})
    hidden = nn.functional.linear(model[0](torch.ones(2, 64)), model[1].weight.detach())
    with pytest.raises(IncompatibleTrainer, match=r"already been stepped.*weight.detach\(\)"):
        Layerwise.of(optimizer).backward(model[1](hidden).square().sum())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_two_backwards_in_one_step_are_refused() -> None:
    model = nn.Linear(4, 4)
    optimizer = build_optimizer(model, "sgd_layerwise", lr=0.1)

    def twice(loss: Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()

    with pytest.raises(IncompatibleTrainer, match="two backward calls in one step"):
        Layerwise.of(optimizer).backward(model(torch.ones(1, 4)).sum(), backward=twice)


def test_processes_whose_gradients_nobody_averages_are_refused() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = nn.Linear(4, 4)
    optimizer = build_optimizer(model, "sgd_layerwise", lr=0.1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(IncompatibleTrainer, match=r"2 processes, and nothing averages.*replicas=Replicas\(\)"):
            Layerwise.of(optimizer).backward(model(torch.ones(1, 4)).sum())
    finally:
        dist.destroy_process_group()
    Layerwise.of(optimizer).backward(model(torch.ones(1, 4)).sum())


def test_fabric_that_scales_by_itself_is_refused() -> None:
    fabric = L.Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu"))
    model = nn.Linear(4, 4)
    module, optimizer = fabric.setup(model, build_optimizer(model, "sgd_layerwise", lr=0.1))
    with pytest.raises(IncompatibleTrainer, match=r"scales the loss inside fabric\.backward"):
        Layerwise.of(optimizer).backward(module(torch.ones(1, 4)).sum(), backward=fabric.backward)


def test_the_suffix_is_taken_once() -> None:
    with pytest.raises(UnknownOptimizer, match="NAdam_layerwise_layerwise"):
        REGISTRY.find("torch.optim.NAdam_layerwise_layerwise")


@pytest.mark.parametrize("strategy", ["fsdp2", "layerwise_fsdp2"])
def test_double_precision_of_shards_is_refused_by_flag_too(strategy: str) -> None:
    """As Lightning does where the strategy is an object."""
    model = LitTokens()
    with pytest.raises(IncompatibleTrainer, match=r"precision='64-true' under .*FSDP2Strategy.*Use '32-true'"):
        trainer(max_steps=1, strategy=strategy, devices=1, precision="64-true").fit(model, loader())
    assert not model.losses
