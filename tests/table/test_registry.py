"""Names to rows: the table, what is not in it, register(), plugins and dotted paths."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import lightning_optim
from lightning_optim import (
    REGISTRY,
    DuplicateOptimizer,
    IncompatibleTrainer,
    InvalidOption,
    InvalidParamGroups,
    MissingDependency,
    OptimConfig,
    UnknownOptimizer,
    build_optimizer,
)
from lightning_optim.table._options import describe
from lightning_optim.table._registry import Registry, spec_from_path
from lightning_optim.table.rows import ROWS
from tests.cases import CASES, ELSEWHERE
from tests.models import LitTokens, loader, trainer
from tests.processes import run_fresh

IDENTIFIERS = {
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_4bit", "adamw_torch_8bit"),
    *("adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused"),
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_32bit", "rmsprop_bnb_8bit"),
    *("sgd", "adagrad", "adafactor", "rmsprop", "lomo", "adalomo", "grokadamw", "stable_adamw"),
    *("adamw_anyprecision", "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw"),
    *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "apollo_adamw_layerwise"),
    *("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
}


# --- the table -------------------------------------------------------------------------------------------------------


def test_all_identifiers_of_hugging_face_are_there() -> None:
    assert len(IDENTIFIERS) == 42
    assert set(IDENTIFIERS) <= set(REGISTRY)
    assert len(REGISTRY.plain) == len(CASES) + len(ELSEWHERE)


def test_what_is_in_is_what_is_listed_and_what_is_found() -> None:
    for name in (*REGISTRY, "adamw_torch_npu_fused_layerwise", "torch.optim.NAdam", "sgd_layerwise_layerwise", "sgdd"):
        assert (name in REGISTRY) is (name in list(REGISTRY)) is (REGISTRY.get(name) is not None), name
        if name in REGISTRY:
            assert REGISTRY[name] == REGISTRY.get(name) == REGISTRY.find(name)
        else:
            with pytest.raises(KeyError):
                REGISTRY[name]
    names = list(REGISTRY)
    assert len(names) == len(set(names)) == len(REGISTRY)
    # The suffix is taken by every row but those that cannot step a parameter without the others.
    assert set(REGISTRY) - set(REGISTRY.plain) == {
        f"{name}_layerwise" for name in REGISTRY.plain if name not in ("adamw_torch_npu_fused", "prodigy")
    }
    assert not any(other in REGISTRY for other in (None, 3))
    with pytest.raises(KeyError, match=r"REGISTRY\.find") as caught:
        REGISTRY["torch.optim.NAdam"]
    assert isinstance(caught.value, ValueError)
    assert REGISTRY.find("torch.optim.NAdam").name == "torch.optim.NAdam"


@pytest.mark.parametrize(("alias", "name"), [("adamw_8bit", "adamw_bnb_8bit"), ("rmsprop_bnb_32bit", "rmsprop_bnb")])
def test_aliases_are_the_same_row(alias: str, name: str) -> None:
    assert REGISTRY[alias] is REGISTRY[name]
    assert REGISTRY[alias].name == name
    assert alias in REGISTRY[name].aliases


@pytest.mark.parametrize("name", ["lomo", "adalomo"])
def test_what_is_meant_for_backward_steps_there_under_its_own_name(name: str) -> None:
    row, suffixed = REGISTRY[name], REGISTRY[f"{name}_layerwise"]
    assert row.layerwise
    assert suffixed == dataclasses.replace(row, name=f"{name}_layerwise")
    assert "bucket_mb" in {info.name for info in describe(row.options)}


def test_an_unknown_identifier_is_refused_with_close_names() -> None:
    with pytest.raises(UnknownOptimizer) as caught:
        OptimConfig("adamw_torch_fussed")
    message = str(caught.value)
    assert "there is no optimizer 'adamw_torch_fussed' in this version of lightning_optim" in message
    assert "'adamw_torch_fused'" in message, message
    assert "`lightning-optim list`" in message
    assert "'torch.optim.NAdam'" in message


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("AdamW_Torch", "adamw_torch"),
        ("adamw-torch", "adamw_torch"),
        ("lion8bit", "lion_8bit"),
        ("lion", "lion_32bit"),
        ("adam", "adamw_torch"),
        ("schedulefree_adamw", "schedule_free_adamw"),
        ("SGD", "sgd"),
    ],
)
def test_typing_errors_are_answered_with_what_was_meant(typed: str, meant: str) -> None:
    with pytest.raises(UnknownOptimizer, match="Close names: ") as caught:
        REGISTRY[typed]
    assert repr(meant) in str(caught.value)


@pytest.mark.parametrize("name", [None, 3, torch.optim.AdamW])
def test_a_name_is_a_string(name: Any) -> None:
    with pytest.raises(UnknownOptimizer) as caught:
        build_optimizer(nn.Linear(2, 2), name)
    assert "named by a string such as 'adamw_torch'" in str(caught.value)
    assert repr(name) in str(caught.value)


# --- register() ------------------------------------------------------------------------------------------------------


class Halving(Optimizer):
    """Halves the parameters, whatever the gradient."""

    def __init__(self, params: Any, lr: float = 0.5, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(group["lr"])
        return loss


HALVING = dataclasses.replace(
    REGISTRY["sgd"],
    name="halving",
    aliases=("half",),
    target="tests.table.test_registry:Halving",
    options=lightning_optim.Options,
    state=None,
)


@pytest.fixture
def _registered() -> Iterator[None]:
    lightning_optim.register(HALVING)
    yield
    for name in ("halving", "half"):
        del REGISTRY._specs[name]


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("name", ["halving", "half"])
def test_a_registered_row_trains_by_name(name: str) -> None:
    model = LitTokens(optim=name, lr=0.25)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer(max_steps=2).fit(model, loader())
    assert all(torch.equal(value, before[key] * 0.0625) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "aliases", "taken"),
    [
        ("sgd", (), "sgd"),
        ("adamw_8bit", (), "adamw_8bit"),
        ("new", ("newer", "rmsprop_bnb_32bit"), "rmsprop_bnb_32bit"),
        ("new", ("sgd_layerwise",), "sgd_layerwise"),
    ],
)
def test_taken_names_are_refused_and_nothing_is_added(name: str, aliases: tuple[str, ...], taken: str) -> None:
    registry = Registry(ROWS)
    with pytest.raises(DuplicateOptimizer) as caught:
        registry.register(dataclasses.replace(HALVING, name=name, aliases=aliases))
    derived = f"{taken!r} is the name of a derived row. Register 'sgd'"
    registered = f"{taken!r} is already registered ({registry[taken].implementation})"
    assert (derived if taken.endswith("_layerwise") else registered) in str(caught.value)
    assert set(registry) == set(REGISTRY)


# --- plugins ---------------------------------------------------------------------------------------------------------

PLUGIN = """
import dataclasses
from lightning_optim import REGISTRY, Options
from lightning_optim.table import ROWS
from lightning_optim.table._options import describe
ROW = dataclasses.replace(ROWS[0], name="plugged", aliases=("plugged_too",))
MORE = [dataclasses.replace(ROWS[0], name=f"plugged_{i}", aliases=()) for i in range(2)]
TAKEN = dataclasses.replace(ROWS[0], name="sgd", aliases=())
NOT_A_ROW = 42
"""


def install_plugin(folder: Path, name: str, entry_points: dict[str, str]) -> None:
    """Writes what pip would: a module and the metadata of its distribution."""
    (folder / f"{name}.py").write_text(PLUGIN)
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in entry_points.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[lightning_optim.optimizers]", *lines, ""]))


def test_plugins_are_found_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path, "plugin_good", {"one": "plugin_good:ROW", "several": "plugin_good:MORE"})
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry(ROWS)
    assert registry["plugged"].target == "torch.optim:AdamW"
    assert set(registry.plain) == set(REGISTRY.plain) | {"plugged", "plugged_too", "plugged_0", "plugged_1"}
    assert "plugged_layerwise" in registry
    assert registry["plugged_too"] is registry["plugged"]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("plugin_bad:ABSENT", "ABSENT"),
        ("no_such_module_of_a_plugin:ROW", "No module named 'no_such_module_of_a_plugin'"),
        ("plugin_bad:NOT_A_ROW", "'int' object is not iterable"),
        ("plugin_bad:TAKEN", "'sgd' is already registered (torch.optim.SGD)"),
    ],
)
def test_a_broken_plugin_is_named_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, reason: str
) -> None:
    install_plugin(tmp_path, "plugin_bad", {"good": "plugin_bad:ROW", "bad": target})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plugin_bad", raising=False)
    registry = Registry(ROWS)
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            registry["a_name_that_only_a_plugin_can_have"]
        message = str(caught.value)
        assert f"the plugin {target!r} (entry point 'bad' of 'lightning_optim.optimizers') cannot be loaded" in message
        assert reason in message
        assert "uninstall its package" in message
    assert registry["adamw_torch"].name == "adamw_torch"


def test_a_plugin_s_optimizer_is_built_in_a_fresh_process(tmp_path: Path) -> None:
    install_plugin(tmp_path, "plugin_good", {"one": "plugin_good:ROW"})
    code = (
        "import torch, lightning_optim as lo\n"
        "optimizer = lo.build_optimizer(torch.nn.Linear(2, 2), 'plugged_too', lr=0.5)\n"
        "print(type(optimizer).__name__, optimizer.param_groups[0]['lr'], len(lo.REGISTRY.plain))"
    )
    done = run_fresh("-c", code, path=tmp_path)
    assert done.stdout.split() == ["AdamW", "0.5", str(len(REGISTRY.plain) + 2)], done.stderr


# --- dotted paths ----------------------------------------------------------------------------------------------------


class Demanding(Optimizer):
    """Has an argument without default and one that may be any keyword."""

    def __init__(
        self, params: Any, lr: float, rho: float, weight_decay: float = 0.1, steps: int = 2, **more: Any
    ) -> None:
        super().__init__(params, {"lr": lr, "rho": rho, "weight_decay": weight_decay})
        self.steps = steps


class PositionalOnly(Optimizer):
    def __init__(self, params: Any, lr: float, rho: float, /) -> None:
        super().__init__(params, {"lr": lr})


class WithoutRate(Optimizer):
    def __init__(self, params: Any, rho: float = 0.1) -> None:
        super().__init__(params, {"rho": rho})


class NotAnOptimizer:
    pass


HERE = "tests.table.test_registry"


def test_a_dotted_path_trains_like_its_class() -> None:
    torch.manual_seed(1)
    model = LitTokens(optim="torch.optim.NAdam", lr=1e-2, weight_decay=0.1, optim_args="betas=(0.8, 0.9)")
    torch.manual_seed(1)
    plain = LitTokens()
    trainer(max_steps=8).fit(model, loader())
    decayed = [p for p in plain.parameters() if p.ndim > 1]
    others = [p for p in plain.parameters() if p.ndim == 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.NAdam(groups, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9))
    for batch in itertools.islice(loader(), 8):
        optimizer.zero_grad()
        plain._loss(batch).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert model.losses[-1] < model.losses[0]


@pytest.mark.parametrize(
    ("path", "lr", "weight_decay", "options", "decays"),
    [
        (
            "torch.optim.NAdam",
            2e-3,
            0.0,
            {
                "betas",
                "eps",
                "momentum_decay",
                "decoupled_weight_decay",
                "foreach",
                "maximize",
                "capturable",
                "differentiable",
            },
            True,
        ),
        (
            "torch.optim.Rprop",
            1e-2,
            0.0,
            {"etas", "step_sizes", "capturable", "foreach", "maximize", "differentiable"},
            False,
        ),
        (
            "torch.optim.LBFGS",
            1.0,
            0.0,
            {"max_iter", "max_eval", "tolerance_grad", "tolerance_change", "history_size", "line_search_fn"},
            False,
        ),
        (f"{HERE}.Demanding", None, 0.1, {"rho", "steps"}, True),
    ],
)
def test_the_row_of_a_dotted_path_comes_from_the_signature(
    path: str, lr: float | None, weight_decay: float, options: set[str], decays: bool
) -> None:
    spec = REGISTRY.find(path)
    assert (spec.name, spec.default_lr, spec.default_weight_decay, spec.decays) == (path, lr, weight_decay, decays)
    assert {info.name for info in describe(spec.options)} == options
    assert spec.implementation == path
    assert spec.state is None
    assert spec.load() is spec_from_path(path).load()


@pytest.mark.parametrize(
    ("raw", "value"), [("steps=3", 3), ({"steps": "3"}, 3), ({"steps": 3}, 3), ("", 2), ("steps=2.5", 2.5)]
)
def test_options_of_a_dotted_path_are_typed(raw: Any, value: float) -> None:
    args = f"rho=0.5,{raw}" if isinstance(raw, str) else {"rho": 0.5, **raw}
    optimizer = build_optimizer(nn.Linear(2, 2), f"{HERE}.Demanding", lr=1e-3, optim_args=args)
    assert isinstance(optimizer, Demanding)
    assert optimizer.steps == value
    assert type(optimizer.steps) is type(value)
    assert optimizer.param_groups[0]["rho"] == 0.5


@pytest.mark.parametrize(
    ("path", "arguments", "error", "parts"),
    [
        (
            "torch.optim.NAdam",
            {"optim_args": "speed=1"},
            InvalidOption,
            ["'torch.optim.NAdam'", "'speed'", "momentum_decay"],
        ),
        (
            "torch.optim.NAdam",
            {"optim_args": "decoupled_weight_decay=2"},
            InvalidOption,
            ["decoupled_weight_decay: bool"],
        ),
        (f"{HERE}.Demanding", {"lr": 1e-3}, InvalidOption, ["needs 'rho'", "rho: Any (required)"]),
        (f"{HERE}.Demanding", {"optim_args": "rho=1"}, IncompatibleTrainer, ["no default learning rate", "lr=1e-3"]),
        (f"{HERE}.Demanding", {"lr": 1, "optim_args": "rho=1,other=2"}, InvalidOption, ["'other'"]),
        ("torch.optim.Rprop", {"weight_decay": 0.1}, IncompatibleTrainer, ["weight_decay=0.1", "'torch.optim.Rprop'"]),
        (
            "torch.optim.LBFGS",
            {"param_groups": {".*": {"weight_decay": 0}}},
            InvalidParamGroups,
            ["weight_decay", "'lr'"],
        ),
        (f"{HERE}.PositionalOnly", {"lr": 1e-3}, UnknownOptimizer, ["'lr', 'rho' by position only"]),
        (f"{HERE}.WithoutRate", {"lr": 1e-3}, UnknownOptimizer, ["without the argument 'lr'", "rho"]),
        (f"{HERE}.NotAnOptimizer", {}, UnknownOptimizer, ["no subclass of torch.optim.Optimizer", "NotAnOptimizer"]),
        ("torch.optim.lr_scheduler", {}, UnknownOptimizer, ["no subclass of torch.optim.Optimizer"]),
        ("torch.optim.NAdan", {}, UnknownOptimizer, ["optim='torch.optim.NAdan' cannot be imported", "NAdan"]),
        ("torch.optimum.NAdam", {}, UnknownOptimizer, ["cannot be imported", "torch.optimum"]),
        ("torch.optim.", {}, UnknownOptimizer, ["optim='torch.optim.' cannot be imported"]),
        ("no_such_package.optim.Best", {}, MissingDependency, ["no package 'no_such_package'", "lightning-optim list"]),
        (".NAdam", {}, MissingDependency, ["optim='.NAdam'", "no package ''"]),
    ],
)
def test_dotted_paths_that_cannot_work_are_refused(
    path: str, arguments: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        build_optimizer(nn.Linear(2, 2), path, **arguments)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("path", ["torch.optim.Rprop", "torch.optim.LBFGS"])
def test_classes_without_weight_decay_get_one_group_and_train(path: str) -> None:
    model = LitTokens(optim=path, **({"optim_args": "max_iter=2"} if "LBFGS" in path else {"lr": 1e-3}))
    fit = trainer(max_steps=20)
    fit.fit(model, loader())
    (group,) = fit.optimizers[0].param_groups
    assert "weight_decay" not in group
    assert len(group["params"]) == len(list(model.parameters()))
    assert model.losses[-1] < 0.8 * model.losses[0]


def test_a_class_of_the_running_script_is_found(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, lightning_optim\n"
        "class Mine(torch.optim.SGD):\n    pass\n"
        "print(type(lightning_optim.build_optimizer(torch.nn.Linear(2, 2), '__main__.Mine')).__qualname__)\n"
    )
    done = run_fresh(str(script))
    assert done.stdout.strip() == "Mine", done.stderr
