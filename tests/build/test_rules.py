"""Refusals: every rule of both tables is broken as a user would break it, before the first training batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, Optimizer

from lightning_optim import (
    REGISTRY,
    IncompatibleTrainer,
    OptimCallback,
    OptimConfig,
    OptimizerSpec,
    build_optimizer,
)
from lightning_optim.build import rules
from lightning_optim.groups._parameters import NamedParameter
from tests.models import LitTokens, TokenModel, fp16_mixed, loader, trainer

RULES = {**rules.CONFIG_RULES, **rules.RUN_RULES, **rules.DEMAND_RULES}


class NoDefaultRate(SGD):
    def __init__(self, params: Any, lr: float, momentum: float = 0.0) -> None:
        super().__init__(params, lr, momentum)


class RelativeStep(SGD):
    def __init__(self, params: Any, lr: float = 1e-3, relative_step: bool = True) -> None:
        super().__init__(params, lr)


class Differentiates(SGD):
    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)


# What only a row can say, for classes that are not known.
DEMANDING = {
    "differentiates": {"needs_graph": True},
    "exchanges": {"needs_process_group": True},
    "couples": {"coupled": "it steps all parameters along one direction"},
}


@pytest.fixture(scope="module", autouse=True)
def demanding_rows() -> Iterator[None]:
    row = REGISTRY.find(f"{__name__}.Differentiates")
    with ExitStack() as registered:
        for name, fields in DEMANDING.items():
            registered.enter_context(REGISTRY.knowing(dataclasses.replace(row, name=name, **fields)))
        yield


@dataclass(frozen=True)
class Case:
    """A request that breaks a rule.

    Attributes:
        rule: The rule that refuses it.
        optim: The arguments of the mixin.
        parts: What the text must contain: what was passed and what to type instead.
    """

    rule: Callable[..., str | None]
    optim: dict[str, Any]
    parts: tuple[str, ...]


CONFIG_CASES = (
    Case(
        rules._request._no_schedule_for_averages,
        {"optim": "schedule_free_adamw", "lr_scheduler": "cosine"},
        ("lr_scheduler='cosine'", "optim='schedule_free_adamw'", "Leave lr_scheduler out; warmup_steps is handed"),
    ),
    Case(
        rules._request._no_schedule_for_averages,
        {"optim": "schedule_free_radam", "lr_scheduler": "reduce_lr_on_plateau"},
        ("lr_scheduler='reduce_lr_on_plateau'", "optim='schedule_free_radam'", "Leave lr_scheduler out."),
    ),
    Case(
        rules._request._warmup_has_an_effect,
        {"optim": "schedule_free_radam", "warmup_steps": 10},
        ("warmup_steps=10", "optim='schedule_free_radam'", "needs no warm-up", "Leave it out"),
    ),
    Case(
        rules._request._warmup_has_an_effect,
        {"optim": "lion_8bit", "warmup_steps": 0.1},
        ("warmup_steps=0.1 without lr_scheduler", "lr_scheduler='constant_with_warmup', 'linear' or 'cosine'"),
    ),
    Case(
        rules._request._plateau_and_constant_do_not_warm_up,
        {"lr_scheduler": "constant", "warmup_steps": 10},
        ("warmup_steps=10", "lr_scheduler='constant'", "lr_scheduler='constant_with_warmup'"),
    ),
    Case(
        rules._request._plateau_and_constant_do_not_warm_up,
        {"lr_scheduler": "reduce_lr_on_plateau", "warmup_steps": 10},
        ("warmup_steps=10", "lr_scheduler='reduce_lr_on_plateau'", "lr_scheduler='constant_with_warmup'"),
    ),
    Case(
        rules._request._schedule_args_need_a_schedule,
        {"lr_scheduler_args": "num_cycles=2"},
        ("lr_scheduler_args without lr_scheduler", "Add lr_scheduler", "'cosine'"),
    ),
    Case(
        rules._request._layer_pattern_needs_layer_decay,
        {"layer_pattern": r"blocks\.(\d+)"},
        ("layer_pattern without layer_decay", "Add layer_decay", "0.75"),
    ),
    Case(
        rules._request._parts_follow_a_function_of_the_step,
        {
            "optim": "sgd",
            "lr_scheduler": "module",
            "param_groups": {"head.*": {"optim": "adamw_torch", "lr_scheduler": "linear"}},
        },
        ("lr_scheduler='module'", "param_groups['head.*']", "Leave the pattern's out"),
    ),
    Case(
        rules._request._parts_follow_a_function_of_the_step,
        {
            "optim": "sgd",
            "lr_scheduler": "reduce_lr_on_plateau",
            "param_groups": {"head.*": {"optim": "schedule_free_sgd"}},
        },
        ("lr_scheduler='reduce_lr_on_plateau'", "optim='schedule_free_sgd'", "Use lr_scheduler='linear'"),
    ),
    Case(
        rules._request._demanding_ones_have_no_other_parts,
        {"optim": "torch.optim.LBFGS", "param_groups": {".*head.*": {"optim": "sgd"}}},
        ("optim='torch.optim.LBFGS' together with other optimizers", "calls the closure itself", "Use it alone"),
    ),
    Case(
        rules._request._demanding_ones_have_no_other_parts,
        {"optim": "muon", "optim_args": {"others": "differentiates"}},
        ("optim='differentiates' together with other optimizers", "whose graph the others' steps", "Use it alone"),
    ),
    Case(
        rules._request._lr_is_known,
        {"optim": f"{__name__}.NoDefaultRate"},
        (f"optim='{__name__}.NoDefaultRate'", "no default learning rate", "lr=1e-3"),
    ),
    Case(
        rules._request._weight_decay_exists,
        {"optim": "torch.optim.Rprop", "weight_decay": 0.1},
        ("weight_decay=0.1", "optim='torch.optim.Rprop'", "Leave it out"),
    ),
    Case(
        rules._request._averages_need_a_learning_rate,
        {"optim": "schedule_free_sgd", "lr": 0},
        ("lr=0", "optim='schedule_free_sgd'", "Use lr > 0"),
    ),
    Case(
        rules._request._target_modules_are_projected,
        {"optim": "adamw_torch", "optim_target_modules": ["linear"]},
        (
            "optim_target_modules=['linear'] together with optim='adamw_torch', which projects nothing",
            "Leave it out, or use optim='galore_adamw' or 'apollo_adamw'",
        ),
    ),
    Case(
        rules._request._relative_step_makes_the_learning_rate,
        {"optim": f"{__name__}.RelativeStep", "lr": 0.1},
        ("lr=0.1", f"optim='{__name__}.RelativeStep'", "Leave lr out, or set relative_step=False"),
    ),
    Case(
        rules._request._relative_step_makes_the_learning_rate,
        {"optim": "adafactor", "optim_args": "relative_step=True", "param_groups": {"head.*": {"lr": 0.1}}},
        ("param_groups['head.*']['lr']=0.1", "optim='adafactor'", "Leave lr out, or set relative_step=False"),
    ),
    Case(
        rules._request._relative_step_makes_the_learning_rate,
        {"optim": "transformers.optimization.Adafactor", "lr": 1e-3},
        ("Set relative_step=False, or use optim='adafactor' with optim_args={'relative_step': True", "without lr"),
    ),
    Case(
        rules._request._lr_is_known,
        {"optim": "transformers.optimization.Adafactor"},
        ("Give lr", "optim_args={'relative_step': False}, or use optim='adafactor' with optim_args="),
    ),
    Case(
        rules._request._overrides_are_known,
        {"optim": "galore_adamw", "override_on_resume": ["rank"]},
        ("override_on_resume names 'rank'", "another value of which would not fit the saved state", "'weight_decay'"),
    ),
)


@pytest.fixture
def fired(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., str | None]]:
    """Collects the rules that refuse something."""
    refusing: list[Callable[..., str | None]] = []

    def recorded(rule: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
        def call(subject: Any) -> str | None:
            text = rule(subject)
            if text is not None:
                refusing.append(rule)
            return text

        return call

    for table in ("CONFIG_RULES", "RUN_RULES", "DEMAND_RULES"):
        monkeypatch.setattr(rules, table, {code: recorded(rule) for code, rule in getattr(rules, table).items()})
    return refusing


@pytest.mark.parametrize("entry", [LitTokens, OptimCallback, OptimConfig])
@pytest.mark.parametrize("case", CONFIG_CASES, ids=lambda case: case.rule.__name__)
def test_requests_are_refused_when_they_are_written_down(
    case: Case, entry: Callable[..., Any], fired: list[Any]
) -> None:
    with pytest.raises(IncompatibleTrainer) as caught:
        # Without a name the callback keeps what the module builds.
        entry(**{"optim": "adamw_torch", **case.optim})
    assert all(part in str(caught.value) for part in case.parts), caught.value
    assert fired == [case.rule]
    assert [RULES[code] for code in caught.value.codes] == fired


# --- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run(Case):
    """A fit that breaks a rule.

    Attributes:
        model: Changes the model before the fit.
        trainer: Makes the Trainer's arguments.
    """

    model: Callable[[LitTokens], None] = lambda lit: None
    trainer: Callable[[], dict[str, Any]] = dict


def make_sparse(lit: LitTokens) -> None:
    lit.model.embedding = nn.Embedding(16, 64, sparse=True)


def make_complex(lit: LitTokens) -> None:
    lit.model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))


def make_gaps(lit: LitTokens) -> None:
    lit.model.gaps = nn.Parameter(torch.zeros(4, 6)[:, ::2])


def with_plain_backward(lit: LitTokens) -> None:
    # As a module's own method would be.
    lit.backward = lambda loss: loss.backward()  # type: ignore[method-assign]


FIT_CASES = (
    Run(
        rules._demands._graph_is_not_scaled,
        {"optim": "differentiates"},
        ("optim='differentiates' under a GradScaler", "second derivatives", "Trainer(precision='bf16-mixed')"),
        trainer=lambda: {"plugins": fp16_mixed()},
    ),
    Run(
        rules._demands._backward_makes_a_graph,
        {"optim": "differentiates"},
        ("optim='differentiates' needs backward(create_graph=True)", "def backward(self, loss, *args, **kwargs)"),
        model=with_plain_backward,
    ),
    Run(
        rules._demands._closure_is_not_scaled,
        {"optim": "torch.optim.LBFGS"},
        ("optim='torch.optim.LBFGS' under a GradScaler", "takes none", "Trainer(precision='bf16-mixed')"),
        trainer=lambda: {"plugins": fp16_mixed()},
    ),
    *[
        Run(
            rules._demands._closure_is_one_batch,
            {"optim": "torch.optim.LBFGS"},
            (
                "optim='torch.optim.LBFGS' with accumulate_grad_batches=2",
                "the last batch only",
                "Leave accumulate_grad_batches out",
            ),
            trainer=lambda accumulation=accumulation: accumulation(),
        )
        for accumulation in (
            lambda: {"accumulate_grad_batches": 2},
            lambda: {"callbacks": GradientAccumulationScheduler({4: 2})},
        )
    ],
    Run(
        rules._demands._takes_one_group,
        {"optim": "torch.optim.LBFGS", "param_groups": {".*head.*": {"lr": 0.1}}},
        ("optim='torch.optim.LBFGS' takes one param group, and there are 2: 'all', ", "Leave param_groups"),
    ),
    Run(
        rules._demands._needs_a_process_group,
        {"optim": "exchanges"},
        ("optim='exchanges' exchanges tensors between processes", "Use Trainer(strategy='ddp')"),
    ),
    Run(
        rules._demands._takes_only_matrices,
        {"optim": "torch.optim.Muon"},
        ("optim='torch.optim.Muon' takes parameters of two dimensions only", "has 1", "Use optim='muon'"),
    ),
    Run(
        rules._demands._not_in_backward,
        {"optim": "couples"},
        (
            "optim='couples' under a strategy that steps during backward: it steps all parameters along one direction",
            "Use another strategy",
        ),
        trainer=lambda: {"strategy": "layerwise"},
    ),
    *[
        Run(
            rules._run._compiler,
            {"optim": f"adamw_torch_{bits}bit"},
            (
                f"optim='adamw_torch_{bits}bit'",
                "C++ compiler",
                "'g++' is not on the PATH",
                "apt-get install g++",
                "CXX",
            ),
        )
        for bits in (4, 8)
    ],
    Run(
        rules._run._sparse_gradients,
        {"optim": "adamw_torch"},
        ("optim='adamw_torch' cannot step sparse", "'model.embedding.weight'", "'adagrad' or 'sgd'", "sparse=False"),
        model=make_sparse,
    ),
    Run(
        rules._run._sparse_gradients,
        {"optim": "sgd", "weight_decay": 0.1},
        ("weight_decay", "param_groups={'model.embedding.weight': {'weight_decay': 0.0}}"),
        model=make_sparse,
    ),
    *[
        Run(
            rules._run._complex_parameters,
            {"optim": name},
            (f"optim='{name}' cannot step complex", "'model.phase' is torch.complex64", "optim='adamw_torch'"),
            model=make_complex,
        )
        for name in ("adamw_torch_fused", "lion_32bit", "stable_adamw", "schedule_free_sgd")
    ],
    *[
        Run(
            rules._run._half_weights,
            {"optim": name},
            (f"optim='{name}'", "'model.embedding.weight' is float16", "'16-mixed'", "'bf16-true'", "'adamw_bnb_8bit'"),
            trainer=lambda: {"precision": "16-true"},
        )
        for name in ("adamw_torch", "stable_adamw", "schedule_free_adamw")
    ],
    *[
        Run(
            rules._run._fused_sgd_on_cpu_is_not_half,
            {"optim": "torch.optim.SGD", "optim_args": {"fused": True}},
            (
                "optim='torch.optim.SGD' with fused=True",
                f"the fused SGD of torch {torch.__version__}",
                f"'model.embedding.weight' is torch.{dtype}",
                "https://github.com/pytorch/pytorch/issues/191763",
                "optim='sgd'",
            ),
            trainer=lambda precision=precision: {"precision": precision},
        )
        for precision, dtype in (("bf16-true", "bfloat16"), ("16-true", "float16"))
    ],
    Run(
        rules._run._fused_parameters_are_packed,
        {"optim": "adamw_torch_fused"},
        ("optim='adamw_torch_fused'", "'model.gaps' is a view with gaps", "tensor.contiguous()", "'adamw_torch'"),
        model=make_gaps,
    ),
    Run(
        rules._run._capturable,
        {"optim": "adamw_torch", "optim_args": {"capturable": True}},
        ("optim='adamw_torch' with capturable=True", "parameters are on cpu", "Leave it out"),
    ),
    *[
        Run(
            rules._run._two_averages,
            {"optim": "schedule_free_adamw"},
            (
                f"the callback {name} together with optim='schedule_free_adamw'",
                "Remove the callback",
                "optim='adamw_torch'",
            ),
            trainer=lambda callback=callback: {"callbacks": callback()},
        )
        for name, callback in (
            ("WeightAveraging", WeightAveraging),
            ("EMAWeightAveraging", EMAWeightAveraging),
            ("StochasticWeightAveraging", lambda: StochasticWeightAveraging(1e-3)),
        )
    ],
    Run(
        rules._run._plateau_hears_its_metric,
        {"optim": "adamw_torch", "lr_scheduler": "reduce_lr_on_plateau"},
        (
            "'reduce_lr_on_plateau' with Trainer(barebones=True)",
            "no metric to watch",
            "Leave barebones out",
            "'linear'",
        ),
        trainer=lambda: {"barebones": True},
    ),
)


@pytest.mark.parametrize("case", FIT_CASES, ids=lambda case: f"{case.rule.__name__}-{case.optim['optim']}")
def test_fits_are_refused_before_the_first_batch(
    case: Run, fired: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if case.rule is rules._run._compiler:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    model = LitTokens(**case.optim)
    case.model(model)
    fit = trainer(**{"max_steps": 1, **case.trainer()})
    with pytest.raises(IncompatibleTrainer) as caught:
        fit.fit(model, loader())
    assert all(part in str(caught.value) for part in case.parts), caught.value
    assert fired == [case.rule]
    assert [RULES[code] for code in caught.value.codes] == fired
    assert model.losses == []
    assert fit.global_step == 0


def test_the_compiler_that_cxx_names_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "my-c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", str(compiler))
    build_optimizer(TokenModel(), "adamw_torch_8bit")
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    with pytest.raises(IncompatibleTrainer, match="absent' is not on the PATH"):
        build_optimizer(TokenModel(), "adamw_torch_8bit")


# --- what needs more than a Trainer on a CPU --------------------------------------------------------------------------


@contextmanager
def one_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = TokenModel()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


def flattened(use_orig_params: bool) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(TokenModel(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)


@dataclass(frozen=True)
class Built(Case):
    """A model for which an optimizer is built without a Trainer."""

    model: Callable[[], nn.Module] = field(default=TokenModel)


BUILD_CASES = (
    *[
        Built(
            rules._run._device,
            {"optim": name},
            (f"optim='{name}' runs on {devices}", "parameters are on meta", "optim='adamw'", "accelerator="),
            model=lambda: TokenModel().to("meta"),
        )
        for name, devices in (
            ("lion_8bit", "cpu, cuda, xpu"),
            ("adamw_torch_4bit", "cpu, cuda, xpu"),
            ("adamw_torch_fused", "cpu, cuda, mps, npu, xpu"),
        )
    ],
    *[
        Built(
            rules._run._sharded_parameters,
            {"optim": name},
            (f"optim='{name}' cannot step sharded", "'embedding.weight'", "'adafactor'", "strategy='ddp'"),
            model=sharded,
        )
        for name in ("lion_8bit", "paged_adamw_32bit", "adamw_torch_8bit", "adamw_torch_4bit", "adamw_torch_fp8")
    ],
    *[
        Built(
            rules._run._flattened_parameters,
            {"optim": "adamw_torch"},
            ("Trainer(strategy='fsdp')", "biases and norms", "Trainer(strategy='fsdp2')"),
            model=lambda use_orig_params=use_orig_params: flattened(use_orig_params),
        )
        for use_orig_params in (True, False)
    ],
)


@pytest.mark.parametrize("case", BUILD_CASES, ids=lambda case: f"{case.rule.__name__}-{case.optim['optim']}")
def test_models_are_refused_when_the_optimizer_is_built(case: Built, fired: list[Any]) -> None:
    with one_process_group():
        model = case.model()
        with pytest.raises(IncompatibleTrainer) as caught:
            build_optimizer(model, **case.optim)
    assert all(part in str(caught.value) for part in case.parts), caught.value
    assert fired == [case.rule]
    assert [RULES[code] for code in caught.value.codes] == fired


def run_on(device: str, config: OptimConfig, spec: OptimizerSpec) -> rules.Run:
    """What a rule is asked about parameters on a device that is not here."""
    parameter = NamedParameter(SimpleNamespace(device=torch.device(device)))  # type: ignore[arg-type]
    return rules.Run(rules.Request(spec, config, spec.options()), [parameter], [])


def test_what_cannot_run_on_xla_says_why() -> None:
    spec = dataclasses.replace(REGISTRY["sgd"], xla="it waits for the device in every step")
    text = rules._run._xla(run_on("xla", OptimConfig("sgd"), spec))
    assert text == (
        "optim='sgd' cannot run on XLA devices: it waits for the device in every step. Use optim='adamw' or "
        "'adamw_torch_xla'."
    )
    assert rules._run._xla(run_on("cpu", OptimConfig("sgd"), spec)) is None
    assert rules._run._xla(run_on("xla", OptimConfig("sgd"), REGISTRY["sgd"])) is None


def test_states_that_are_not_paged_count_only_where_something_else_may_be_taken() -> None:
    spec = REGISTRY["paged_lion_8bit"]
    config = OptimConfig("paged_lion_8bit", optim_fallback=True)
    assert rules._run._paging(run_on("cpu", config, spec)) == "optim='paged_lion_8bit' pages its states on cuda only."
    assert rules._run._paging(run_on("cuda", config, spec)) is None
    assert rules._run._paging(run_on("cpu", config.replace(optim_fallback=False), spec)) is None
    assert rules._run._paging(run_on("cpu", config, REGISTRY["lion_8bit"])) is None


@pytest.mark.parametrize(
    ("rule", "name", "why"),
    [
        (rules._demands._graph_is_of_one_process, "differentiates", "leaves no graph"),
        (rules._demands._closure_is_of_one_process, "torch.optim.LBFGS", "they would drift apart"),
    ],
)
def test_some_are_for_one_process(rule: Callable[..., str | None], name: str, why: str) -> None:
    spec = REGISTRY.find(name)
    run = run_on("cpu", OptimConfig(name), spec)
    text = rule(dataclasses.replace(run, trainer=rules.TrainerFacts(processes=2)))
    assert text is not None
    assert text.startswith(f"optim={name!r} with 2 processes: its step")
    assert why in text
    assert text.endswith("Use Trainer(devices=1, num_nodes=1).")
    assert rule(dataclasses.replace(run, trainer=rules.TrainerFacts(processes=1))) is None


def test_every_rule_has_a_case() -> None:
    covered = {case.rule for case in (*CONFIG_CASES, *FIT_CASES, *BUILD_CASES)}
    # For devices that are not here; for a resumed run (tests/trainer/test_finders.py).
    apart = {rules._run._xla, rules._run._paging, rules._run._finder_with_resume}
    several = {rules._demands._graph_is_of_one_process, rules._demands._closure_is_of_one_process}
    assert covered | apart | several == set(RULES.values())


# --- neighbours that work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optim",
    [
        {"optim": "schedule_free_adamw", "lr_scheduler": "constant"},
        {"optim": "schedule_free_adamw", "warmup_steps": 10},
        {"optim": "schedule_free_sgd", "warmup_steps": 0.1},
        {"optim": "adamw_torch", "warmup_steps": 10, "lr_scheduler": "constant_with_warmup"},
        {"optim": "adamw_torch", "lr": 0},
        {"optim": "torch.optim.Rprop", "weight_decay": 0.0},
        {"optim": f"{__name__}.NoDefaultRate", "lr": 1e-3},
        {"layer_decay": 0.5, "layer_pattern": r"blocks\.(\d+)"},
        {"optim": f"{__name__}.RelativeStep"},
        {"optim": f"{__name__}.RelativeStep", "lr": 0.1, "optim_args": "relative_step=False"},
        {"optim": "galore_adamw", "optim_target_modules": "all-linear"},
        {"optim": "galore_adamw"},
    ],
)
def test_permitted_requests(optim: dict[str, Any]) -> None:
    OptimConfig(**optim)


@pytest.mark.parametrize(
    ("optim", "arguments", "change"),
    [
        ({"optim": "adamw_torch_fused"}, lambda: {"plugins": fp16_mixed()}, None),
        ({"optim": "adamw_torch_fused"}, lambda: {"gradient_clip_val": 1.0}, None),
        ({"optim": "adamw_torch"}, lambda: {"plugins": fp16_mixed(), "gradient_clip_val": 1.0}, None),
        ({"optim": "adamw_torch"}, lambda: {"callbacks": WeightAveraging()}, None),
        ({"optim": "schedule_free_adamw"}, lambda: {"callbacks": type("WeightAveraging", (Callback,), {})()}, None),
        ({"optim": "adamw_8bit"}, lambda: {"precision": "16-true"}, None),
        ({"optim": "adamw_torch"}, dict, make_complex),
        ({"optim": "sgd"}, dict, make_complex),
        (
            {"optim": "sgd", "weight_decay": 0.1, "param_groups": {"model.embedding.weight": {"weight_decay": 0.0}}},
            dict,
            make_sparse,
        ),
    ],
)
def test_permitted_fits(
    optim: dict[str, Any], arguments: Callable[[], dict[str, Any]], change: Callable[[LitTokens], None] | None
) -> None:
    model = LitTokens(**optim, lr=1e-3)
    if change:
        change(model)
    fit = trainer(max_steps=2, **arguments())
    fit.fit(model, loader())
    assert fit.global_step == 2
    assert all(torch.isfinite(torch.view_as_real(p) if p.is_complex() else p).all() for p in model.parameters())


@pytest.mark.parametrize(("capability", "takes"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_torch_fp8_needs_a_gpu_that_has_8_bit_floats(
    capability: tuple[int, int], takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    with FakeTensorMode():
        weight = torch.empty(64, 64, device="cuda", requires_grad=True)
    optimizer_class: Any = REGISTRY["adamw_torch_fp8"].load()
    if takes:
        assert optimizer_class([weight]).param_groups[0]["params"] == [weight]
        return
    with pytest.raises(IncompatibleTrainer) as caught:
        optimizer_class([weight])
    version = ".".join(map(str, capability))
    assert f"compute capability 8.9 or newer (Ada, Hopper), and A GPU has {version}" in str(caught.value)
    assert caught.value.text.endswith("Use optim='adamw_torch_8bit'.")


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "stable_adamw", "rmsprop"])
def test_sharded_parameters_step_where_the_row_says_so(name: str) -> None:
    tokens = torch.arange(16).reshape(2, 8)

    def step(model: nn.Module) -> Optimizer:
        optimizer = build_optimizer(model, name, lr=1e-2)
        model(tokens).pow(2).sum().backward()
        optimizer.step()
        return optimizer

    torch.manual_seed(0)
    plain = TokenModel()
    step(plain)
    with one_process_group():
        torch.manual_seed(0)
        model = sharded()
        step(model)
        values = [parameter.full_tensor() for parameter in model.parameters()]
    torch.testing.assert_close(values, [parameter.detach() for parameter in plain.parameters()], rtol=1e-5, atol=1e-6)


# --- together --------------------------------------------------------------------------------------------------------


def test_all_broken_rules_are_named_at_once() -> None:
    with pytest.raises(IncompatibleTrainer) as caught:
        OptimConfig(lr_scheduler_args="power=2", layer_pattern=r"(\d+)", warmup_steps=5)
    *lines, see = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines] == ["warmup_steps=5", "lr_scheduler_args", "layer_pattern"]
    assert [line.split()[-1] for line in lines] == ["[LO402]", "[LO404]", "[LO405]"]
    assert see == "See: lightning-optim explain LO402 LO404 LO405"

    model = LitTokens(optim="stable_adamw")
    make_sparse(model)
    with pytest.raises(IncompatibleTrainer) as caught:
        trainer(max_steps=1, precision="16-true").fit(model, loader())
    sparse, half = caught.value.text.splitlines()
    assert "sparse gradients" in sparse
    assert "float16" in half


@pytest.mark.parametrize("name", ["adamw_torch", "schedule_free_radam"])
def test_warmup_without_a_schedule_is_refused_by_build_optimizer(name: str) -> None:
    with pytest.raises(IncompatibleTrainer) as caught:
        build_optimizer(TokenModel(), name, warmup_steps=5)
    assert f"warmup_steps=5 together with optim='{name}'" in str(caught.value)
    assert "build_schedule(optimizer, 'constant_with_warmup', warmup_steps=5)" in str(caught.value)
