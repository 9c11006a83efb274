"""``optim_target_modules``: which matrices GaLore projects, by every kind of match, and how the setting gets there."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import Optimizer

from lightning_optim import (
    REGISTRY,
    IncompatibleTrainer,
    InvalidOption,
    InvalidParamGroups,
    OptimCallback,
    OptimConfig,
    build_optimizer,
)
from lightning_optim.build._factory import resolve
from lightning_optim.build._memory import measured_bytes, state_bytes
from lightning_optim.groups._parameters import named_parameters
from lightning_optim.groups._target_modules import left_out
from lightning_optim.layerwise._engine import Layerwise
from lightning_optim.table._options import Options
from lightning_optim.trainer import _report as report
from tests.models import ForeignTokens, LitTokens, TokenModel, loader, trainer
from tests.trainer.test_resume import assert_equal

NAME = "galore_adamw"
PROJECTING = sorted(name for name in REGISTRY.plain if REGISTRY[name].projects)


class OwnLinear(nn.Linear):
    """A subclass, as adapters bring them."""


class Attention(nn.Module):
    """A container with a parameter of its own beside its Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.k = OwnLinear(8, 8, bias=False)
        self.table = nn.Parameter(torch.ones(8, 8))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.stem = nn.Conv2d(3, 8, 3)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 16)


class Conv1D(nn.Module):
    """As GPT-2's, a linear layer whose weight is ``[in, out]``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))
        self.bias = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Experts(nn.Module):
    """As those of Hugging Face's mixtures, with the biases of gpt-oss."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(4, 16, 12))
        self.up_proj_bias = nn.Parameter(torch.zeros(4, 12))
        self.down_proj = nn.Parameter(torch.randn(4, 12, 16))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bd,edh->ebh", x, self.up_proj) + self.up_proj_bias.unsqueeze(1)
        return torch.einsum("ebh,ehd->bd", hidden.relu(), self.down_proj)


class Tokens(nn.Module):
    """Parameters of three dimensions that are no stacks of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(torch.zeros(1, 5, 8))


class PositionTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 8))


class OwnConv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4, 3))


class Mixed(nn.Module):
    """A stack beside a vector that is no bias: what it is cannot be told."""

    def __init__(self) -> None:
        super().__init__()
        self.relative = nn.Parameter(torch.zeros(4, 5, 6))
        self.scale = nn.Parameter(torch.ones(4))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.table, self.conv, self.mixed = Tokens(), PositionTable(), OwnConv1d(), Mixed()
        self.c_attn, self.experts, self.head = Conv1D(), Experts(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.experts(self.c_attn(x)))
        return out


STACKS = {"experts.up_proj", "experts.down_proj"}
MATRICES = {"c_attn.weight", "head.weight"}


def tied() -> Model:
    model = Model()
    model.head.weight = model.embedding.weight
    return model


def frozen() -> Model:
    model = Model()
    model.layers[0].requires_grad_(False)
    return model


def shared() -> nn.Module:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    model["second"] = model["first"]
    return model


LINEAR = {f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("attn.q", "attn.k", "mlp.0", "mlp.2")}
ALL_LINEAR = LINEAR | {"head.weight"}
ATTENTION = {name for name in LINEAR if "attn" in name}
FIRST = {name for name in LINEAR if "layers.0" in name}


def targets_of(optimizer: Optimizer, model: nn.Module) -> set[str]:
    """The names of the projected parameters, which are the ones of groups that say so."""
    names = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    for group in optimizer.param_groups:
        assert (group["rank"] is not None) == ("low_rank" in group["name"].split("/"))
    return {names[id(p)] for group in optimizer.param_groups if group["rank"] is not None for p in group["params"]}


def group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    (group,) = [group for group in optimizer.param_groups if any(p is parameter for p in group["params"])]
    return group


# --- what matches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("create", "setting", "expected"),
    [
        pytest.param(Model, None, ALL_LINEAR, id="default"),
        pytest.param(Model, "all-linear", ALL_LINEAR, id="all-linear"),
        pytest.param(Model, "all_linear", ALL_LINEAR, id="all_linear"),
        pytest.param(Model, ["all-linear"], ALL_LINEAR, id="all-linear as a list"),
        pytest.param(Model, r"layers[.]\d+[.]attn[.]q", {n for n in LINEAR if "attn.q" in n}, id="expression"),
        pytest.param(Model, ".*", ALL_LINEAR | {"stem.weight"}, id="everything"),
        pytest.param(Model, ["layers.0.attn.q"], {"layers.0.attn.q.weight"}, id="name"),
        pytest.param(Model, ["attn"], ATTENTION, id="part of a name"),
        pytest.param(Model, ["layers.0"], FIRST, id="container"),
        pytest.param(Model, ["attn", "head"], ATTENTION | {"head.weight"}, id="several"),
        pytest.param(Model, ("attn", "head"), ATTENTION | {"head.weight"}, id="tuple"),
        pytest.param(Model, [r"layers[.]0[.].*"], FIRST, id="expression in a list"),
        pytest.param(Model, ["stem", "head"], {"stem.weight", "head.weight"}, id="convolution"),
        pytest.param(tied, None, LINEAR, id="tied to an embedding"),
        pytest.param(tied, ["head", "attn"], ATTENTION, id="tied to an embedding, by name"),
        pytest.param(frozen, None, (LINEAR - FIRST) | {"head.weight"}, id="frozen"),
        pytest.param(frozen, ["attn"], ATTENTION - FIRST, id="frozen, by name"),
        pytest.param(shared, ["second"], {"first.weight"}, id="shared, by its other name"),
        pytest.param(lambda: nn.Linear(4, 4), None, {"weight"}, id="the model itself"),
        pytest.param(lambda: nn.Linear(4, 4), ".*", {"weight"}, id="the model itself, by expression"),
        pytest.param(lambda: nn.MultiheadAttention(8, 2), None, {"out_proj.weight"}, id="attention of torch"),
        pytest.param(
            lambda: nn.Sequential(nn.Conv1d(2, 2, 3), nn.ConvTranspose2d(2, 2, 3), nn.Conv3d(2, 2, 3)),
            ["0", "1", "2"],
            {"0.weight", "1.weight", "2.weight"},
            id="convolutions of every dimension",
        ),
        pytest.param(Mixture, None, MATRICES | STACKS, id="experts and Conv1D"),
        pytest.param(Mixture, ".*", MATRICES | STACKS, id="experts and Conv1D, by expression"),
        pytest.param(Mixture, ["c_attn"], {"c_attn.weight"}, id="Conv1D"),
        pytest.param(Mixture, ["experts"], STACKS, id="experts"),
        pytest.param(Mixture, ["up_proj"], {"experts.up_proj"}, id="part of a parameter's name"),
        pytest.param(Mixture, r".*[.]down_proj|head", {"experts.down_proj", "head.weight"}, id="names of both kinds"),
        pytest.param(Model, ["attn.table"], {f"layers.{i}.attn.table" for i in (0, 1)}, id="a container's parameter"),
        pytest.param(Mixture, ["mixed.relative", "table.weight"], {"mixed.relative", "table.weight"}, id="as asked"),
        pytest.param(
            lambda: nn.Sequential(nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4))),
            None,
            {"0.weight"},
            id="a parametrized Linear owns no weight",
        ),
    ],
)
def test_modules_are_named_by_what_matches(create: Callable[[], nn.Module], setting: Any, expected: set[str]) -> None:
    model = create()
    optimizer = build_optimizer(model, NAME, optim_target_modules=setting)
    assert targets_of(optimizer, model) == expected
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("create", "setting", "parts"),
    [
        (
            Model,
            ["attn", "ffn", "conv"],
            ["optim_target_modules: 'ffn', 'conv' matches no module", "'stem', 'layers.0.attn.q'", "'all-linear'"],
        ),
        (Model, "attn", ["'attn' matches no module that owns trainable parameters", "Write the list ['attn'] to"]),
        (Model, "attn, mlp", ["'attn, mlp' matches no module", "Write the list ['attn', 'mlp'] to match parts"]),
        (Model, ["attn,mlp"], ["'attn,mlp' matches no module", "Write parts of names such as ['attn', 'mlp']"]),
        (Model, "layers[.]0", ["'layers[.]0' matches no module that owns trainable parameters"]),
        (frozen, ["layers.0"], ["'layers.0' matches no module that owns trainable parameters"]),
        (Model, ["attn", "("], ["'(' matches no module"]),
        (Model, "(", ["optim_target_modules='(' is not a regular expression", "Write a list such as ['attn', 'mlp']"]),
        (Model, ["attn", "all-linear"], ["['attn', 'all-linear']: 'all-linear' together with other entries", "alone"]),
        (
            Model,
            ["norm"],
            [
                "=['norm'] projects nothing: it names 'layers.0.norm' (LayerNorm), 'layers.1.norm' (LayerNorm). ",
                "Modules here: 'stem', 'layers.0.attn.q'",
            ],
        ),
        (tied, ["head"], ["it names 'head' (Linear tied to an embedding)", "Modules here: 'stem', 'layers.0.attn.q'"]),
        (Mixture, ["tokens", "conv"], ["it names 'tokens' (Tokens), 'conv' (OwnConv1d). It can project"]),
        (Mixture, ["conv.weight"], ["it names 'conv' (OwnConv1d)"]),
        (lambda: nn.LayerNorm(4), None, ["=None, every linear layer and stack of matrices, projects nothing. "]),
        (lambda: nn.Conv2d(2, 2, 2), "all-linear", ["'all-linear', every linear layer", "optim='adamw_torch'"]),
        (
            lambda: nn.Sequential(nn.Linear(2, 2), nn.Embedding(2, 2)).requires_grad_(False).append(nn.LayerNorm(2)),
            "all_linear",
            ["optim_target_modules='all_linear', every linear layer and", "projects nothing", "Modules here: '2'."],
        ),
    ],
)
def test_what_has_no_effect_is_refused(create: Callable[[], nn.Module], setting: Any, parts: list[str]) -> None:
    with pytest.raises(InvalidParamGroups) as caught:
        build_optimizer(create(), NAME, optim_target_modules=setting)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_pairs_are_known_by_their_names() -> None:
    model = Model()

    def targets(setting: Any) -> set[str]:
        return targets_of(build_optimizer(model.named_parameters(), NAME, optim_target_modules=setting), model)

    # Nothing tells an embedding or a convolution from a Linear.
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("bias")}
    assert targets(None) == matrices > ALL_LINEAR
    assert targets(["layers.0"]) == FIRST | {"layers.0.attn.table"}
    assert targets(r"layers[.]0[.]attn") == {"layers.0.attn.table"}
    assert targets(["stem.weight", "table"]) == {"stem.weight", *(f"layers.{i}.attn.table" for i in (0, 1))}
    # Layers call their kernels weight, which tells them from stacks.
    mixture = Mixture()
    optimizer = build_optimizer(mixture.named_parameters(), NAME, optim_target_modules=["conv", "experts"])
    assert group_of(optimizer, mixture.conv.weight)["stack_dims"] == 0
    assert group_of(optimizer, mixture.experts.up_proj)["stack_dims"] == 1


def test_bare_parameters_are_projected_all_or_refused() -> None:
    model = Model()
    optimizer = build_optimizer(model.parameters(), NAME, optim_target_modules="all-linear")
    assert targets_of(optimizer, model) == {name for name, p in model.named_parameters() if p.ndim > 1}
    with pytest.raises(InvalidParamGroups, match=r"=\['attn'\] needs names to match; pass the module or"):
        build_optimizer(model.parameters(), NAME, optim_target_modules=["attn"])


# --- groups ----------------------------------------------------------------------------------------------------------


def test_the_decay_split_stays() -> None:
    model = Model()
    optimizer = build_optimizer(model, NAME, weight_decay=0.1, optim_args="rank=4")
    values = {
        group["name"]: (len(group["params"]), group["weight_decay"], group["rank"]) for group in optimizer.param_groups
    }
    assert values == {"decay": (4, 0.1, None), "decay/low_rank": (9, 0.1, 4), "no_decay": (12, 0.0, None)}


def test_layer_decay_and_targets_do_not_disturb_each_other() -> None:
    model = Model()
    optimizer = build_optimizer(model, NAME, lr=1.0, layer_decay=0.5, optim_target_modules=["attn"])
    assert targets_of(optimizer, model) == ATTENTION
    group = group_of(optimizer, model.layers[0].attn.q.weight)
    assert (group["name"], group["lr"], group["weight_decay"]) == ("layer_1/decay/low_rank", 0.25, 0.0)
    assert group_of(optimizer, model.layers[0].attn.table)["name"] == "layer_1/decay"
    assert group_of(optimizer, model.layers[1].mlp[0].weight)["lr"] == 0.5


def test_patterns_set_the_rank_of_targets() -> None:
    model = Model()
    optimizer = build_optimizer(
        model, NAME, param_groups={"head.*": {"rank": 2, "scale": 1.0, "lr": 0.5}, ".*mlp.*": {"weight_decay": 0.5}}
    )
    head = group_of(optimizer, model.head.weight)
    assert (head["name"], head["rank"], head["scale"], head["lr"]) == ("head.*/decay/low_rank", 2, 1.0, 0.5)
    # The pattern matches the bias, too, which no rank can reach.
    bias = group_of(optimizer, model.head.bias)
    assert (bias["name"], bias["rank"], bias["lr"]) == ("head.*/no_decay", None, 0.5)
    mlp = group_of(optimizer, model.layers[0].mlp[0].weight)
    assert (mlp["name"], mlp["rank"], mlp["weight_decay"]) == (".*mlp.*/low_rank", 128, 0.5)
    assert targets_of(optimizer, model) == ALL_LINEAR


@pytest.mark.parametrize(
    ("setting", "pattern", "name"),
    [
        (["attn"], "head.*", "head.weight"),
        (None, "embedding.*", "embedding.weight"),
        (None, "stem.*", "stem.weight"),
        (["attn"], r"layers[.].*", "layers.0.attn.table"),
    ],
)
def test_a_rank_for_what_is_not_projected_is_refused(setting: Any, pattern: str, name: str) -> None:
    with pytest.raises(InvalidParamGroups) as caught:
        build_optimizer(Model(), NAME, optim_target_modules=setting, param_groups={pattern: {"rank": 2}})
    expected = f"param_groups[{pattern!r}] sets rank=2 for {name!r}, which is not projected. Name its module, or the"
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", PROJECTING)
def test_every_projecting_row_steps_and_stores_what_it_says(name: str) -> None:
    """The estimate knows which parameters are projected."""
    spec, sizes = REGISTRY[name], {}
    for setting in ("all-linear", ["linear"]):
        model = TokenModel()
        optimizer = build_optimizer(model, name, lr=1e-2, optim_args="rank=4", optim_target_modules=setting)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model(torch.arange(16).reshape(2, 8)).square().mean().backward()
        optimizer.step()
        assert not any(torch.equal(before[key], value) for key, value in model.state_dict().items())
        options: Options = spec.options(rank=4)  # type: ignore[call-arg]
        sizes[str(setting)] = measured_bytes(optimizer.state_dict())
        assert state_bytes(spec, options, optimizer.param_groups) == sizes[str(setting)]
    if name != "galore_adafactor":  # Adafactor's moments of a whole matrix are smaller than a basis.
        assert sizes["all-linear"] < sizes["['linear']"]


def test_stacks_are_a_group_of_their_own() -> None:
    model = Mixture()
    optimizer = build_optimizer(model, NAME, optim_args="rank=3", param_groups={".*down_proj": {"rank": 2}})
    assert {group["name"]: (group["rank"], group["stack_dims"]) for group in optimizer.param_groups} == {
        "decay": (None, 0),
        "decay/low_rank": (3, 0),
        "decay/low_rank/stacked": (3, 1),
        ".*down_proj/decay/low_rank/stacked": (2, 1),
        "no_decay": (None, 0),
    }


@pytest.mark.parametrize("name", PROJECTING)
def test_experts_are_stepped_in_backward_as_after_it(name: str) -> None:
    plain, layerwise = Mixture(), Mixture()
    layerwise.load_state_dict(plain.state_dict())
    options = {"rank": 3, "update_proj_gap": 2, **({"min_8bit_size": 64} if REGISTRY[name].bits else {})}
    optimizer = build_optimizer(plain, name, lr=1e-2, optim_args=options)
    in_backward = build_optimizer(layerwise, f"{name}_layerwise", lr=1e-2, optim_args={**options, "bucket_mb": 0})
    for step in range(4):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
        plain(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        engine = Layerwise.of(in_backward)
        assert engine is not None
        engine.backward(layerwise(x).square().mean())
    for one, other in zip(plain.parameters(), layerwise.parameters(), strict=True):
        assert torch.equal(one, other)
    assert_equal(in_backward.state_dict()["state"], optimizer.state_dict()["state"], name)


@pytest.mark.parametrize("name", [name for name in PROJECTING if REGISTRY[name].bits])
def test_embeddings_keep_32_bits(name: str) -> None:
    model = TokenModel()
    optimizer = build_optimizer(model, name)
    found = {group["name"]: (group["rank"], group["optim_bits"]) for group in optimizer.param_groups}
    bits = REGISTRY[name].bits
    assert found == {"decay/32bit": (None, 32), "decay/low_rank": (128, bits), "no_decay": (None, bits)}


# --- the report ------------------------------------------------------------------------------------------------------


def test_what_is_named_in_vain_is_one_line_of_the_report(caplog: pytest.LogCaptureFixture) -> None:
    def report(**optim: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            trainer(max_steps=1).fit(LitTokens(optim=NAME, **optim), loader())
        (text,) = (record.getMessage() for record in caplog.records if "optim=" in record.getMessage())
        return [line.strip() for line in text.splitlines() if "not projected" in line]

    (line,) = report(optim_target_modules=["norm", "embed", "linear"])
    expected = "(2): model.embedding: Embedding, model.norm: LayerNorm"
    assert line == f"named by optim_target_modules, but not projected {expected}"
    assert not report(optim_target_modules=["linear"])
    assert not report()


def test_the_report_names_a_few_of_many(caplog: pytest.LogCaptureFixture) -> None:
    class Deep(LitTokens):
        def __init__(self, **optim: Any) -> None:
            super().__init__(**optim)
            self.norms = nn.ModuleList(nn.LayerNorm(2) for _ in range(300))

    with caplog.at_level(logging.INFO):
        trainer(max_steps=1).fit(Deep(optim=NAME, optim_target_modules=".*"), loader())
    (text,) = (record.getMessage() for record in caplog.records if "optim=" in record.getMessage())
    (line,) = (line for line in text.splitlines() if "not projected" in line)
    assert (
        "(302): model.embedding: Embedding, model.norm: LayerNorm, norms.0: LayerNorm, norms.1: LayerNorm, ..." in line
    )


@pytest.mark.parametrize(
    ("create", "setting", "expected"),
    [
        (
            Model,
            ["0.attn", "norm"],
            {"layers.0.norm": "LayerNorm", "layers.0.attn": "Attention", "layers.1.norm": "LayerNorm"},
        ),
        (tied, ["head", "attn.q"], {"head": "Linear tied to an embedding"}),
        (tied, None, {}),
        (Model, "all-linear", {}),
        (lambda: nn.MultiheadAttention(8, 2), ".*", {"": "MultiheadAttention"}),
    ],
)
def test_what_is_left_out(create: Callable[[], nn.Module], setting: Any, expected: dict[str, str]) -> None:
    assert left_out(named_parameters(create()), setting) == expected


# --- the ways in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["all-linear", ["linear", "head"], r"model[.]linear"])
def test_the_setting_survives_saving_and_loading(setting: Any, tmp_path: Path) -> None:
    model = LitTokens(optim=NAME, optim_args={"rank": 4}, optim_target_modules=setting)
    run = trainer(max_steps=2)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "model.ckpt")
    assert torch.load(tmp_path / "model.ckpt", weights_only=True)["hyper_parameters"]["optim_target_modules"] == setting
    loaded = LitTokens.load_from_checkpoint(tmp_path / "model.ckpt")
    assert loaded.optim_config == model.optim_config
    again = trainer(max_steps=4)
    again.fit(loaded, loader(), ckpt_path=tmp_path / "model.ckpt")
    assert again.global_step == 4


def test_own_targets_are_build_optimizers_defaults() -> None:
    model = LitTokens(optim=NAME, optim_target_modules=["linear"])
    assert targets_of(model.build_optimizer(), model) == {"model.linear.weight"}
    head = model.build_optimizer(optim_target_modules=["head"])
    assert targets_of(head, model) == {"model.head.weight"}
    # Another optimizer has its own arguments.
    assert model.build_optimizer(model.model, "sgd").param_groups


def test_the_callback_projects_in_any_module() -> None:
    model = ForeignTokens()
    run = trainer(max_steps=2, callbacks=[OptimCallback(NAME, optim_target_modules="model[.]linear")])
    run.fit(model, loader())
    assert targets_of(run.optimizers[0], model) == {"model.linear.weight"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--optim_target_modules", "all-linear"], "all-linear"),
        (["--optim_target_modules", "[linear, head]"], ["linear", "head"]),
        (["--optim_target_modules+=linear", "--optim_target_modules+=head"], ["linear", "head"]),
        (["--optim_target_modules", "model[.](linear|head)"], "model[.](linear|head)"),
    ],
)
@pytest.mark.parametrize("kind", ["mixin", "foreign", "plain"])
def test_the_command_line_and_its_saved_config(
    kind: str, arguments: list[str], expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.trainer.test_cli import FAST, run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    if kind == "plain":
        arguments = [argument.replace("--optim", "--model.optim") for argument in arguments]
    optim = "--model.optim" if kind == "plain" else "--optim"
    logged = ("--trainer.default_root_dir", "first", *FAST[:2])
    first = run(kind, "fit", optim, NAME, *arguments, *logged)
    (config,) = tmp_path.rglob("config.yaml")
    section = yaml.safe_load(config.read_text())
    assert (section["model"] if kind == "plain" else section)["optim_target_modules"] == expected
    second = run(kind, "fit", "--config", str(config), *FAST)
    for cli in (first, second):
        assert targets_of(cli.trainer.optimizers[0], cli.model) == {"model.linear.weight", "model.head.weight"}


def test_a_setting_that_nothing_reads_is_refused() -> None:
    with pytest.raises(IncompatibleTrainer, match=r"\['attn'\] together with optim='adamw_torch', which projects"):
        LitTokens(optim="adamw_torch", optim_target_modules=["attn"])
    with pytest.raises(InvalidOption, match=r"optim_target_modules=1 \(int\)"):
        OptimCallback(NAME, optim_target_modules=1)  # type: ignore[arg-type]
    assert OptimConfig(NAME, optim_target_modules=["attn"]).replace(lr=1.0).optim_target_modules == ["attn"]


@pytest.mark.parametrize(("name", "rank", "told"), [("galore_adamw", 128, 1), ("galore_adamw", 8, 0)])
def test_the_report_tells_where_a_rank_costs_more_than_it_saves(name: str, rank: int, told: int) -> None:
    model = LitTokens(optim=name, optim_args={"rank": rank})
    text = report.describe(resolve(model, model.optim_config), name, "none")
    # 64x64 and 16x64 in float32: three matrices of the shorter side's rank instead of two of their own.
    line = (
        "2 projected matrices keep more state than they would unprojected (57 KiB, 40 KiB): use a smaller rank, or "
        "leave them out of optim_target_modules"
    )
    assert text.count(line) == text.count("unprojected") == told


@pytest.mark.parametrize(
    ("pattern", "override"),
    [("model.norm.*", {"rank": 2}), (".*bias", {"scale": 1.0}), ("model.embedding.weight", {"update_proj_gap": 5})],
)
def test_options_of_the_projection_for_what_is_not_projected_are_refused(pattern: str, override: Any) -> None:
    with pytest.raises(InvalidParamGroups, match="Name its module, or the parameter itself, in optim"):
        build_optimizer(LitTokens(), "galore_adamw", param_groups={pattern: override})


def test_options_of_the_projection_leave_a_layers_bias_alone() -> None:
    optimizer = build_optimizer(LitTokens(), "galore_adamw", param_groups={"model.head.*": {"scale": 1.0, "eps": 1e-6}})
    weight, bias = (group for group in optimizer.param_groups if group["name"].startswith("model.head"))
    assert (weight["scale"], weight["rank"], weight["eps"]) == (1.0, 128, 1e-6)
    assert (bias["scale"], bias["rank"], bias["eps"]) == (0.25, None, 1e-6)


def test_parameters_that_a_callback_adds_are_not_projected() -> None:
    """Nothing is known of their modules; unfreezing an embedding must not project it."""
    model = LitTokens()
    model.model.embedding.requires_grad_(False)
    optimizer = build_optimizer(model, "galore_adamw")
    model.model.embedding.requires_grad_(True)
    optimizer.add_param_group({"params": [model.model.embedding.weight]})
    assert optimizer.param_groups[-1]["rank"] is None


def test_the_dotted_path_of_a_class_that_projects_is_its_row() -> None:
    assert REGISTRY.find("lightning_optim.optimizers.GaLoreAdamW") is REGISTRY["galore_adamw"]
    optimizer = build_optimizer(LitTokens(), "lightning_optim.optimizers.ApolloAdamW", optim_target_modules=["head"])
    assert [group["rank"] for group in optimizer.param_groups] == [None, 128, None]


class TestResume:
    """A state is found by its parameter's position in the groups, which the target modules change."""

    def checkpoint(self, tmp_path: Path, **optim: Any) -> Path:
        run = trainer(max_steps=2)
        run.fit(LitTokens(optim="galore_adamw", **optim), loader())
        run.save_checkpoint(tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt"

    def test_with_other_target_modules_is_refused(self, tmp_path: Path) -> None:
        path = self.checkpoint(tmp_path, optim_target_modules=["linear"])
        model = LitTokens(optim="galore_adamw", optim_target_modules=["head"])
        with pytest.raises(InvalidOption) as caught:
            trainer(max_steps=4).fit(model, loader(), ckpt_path=path, weights_only=True)
        assert "'model.linear.weight' stands where the checkpoint has 'model.head.weight'" in str(caught.value)
        assert "Resume with the optim_target_modules" in str(caught.value)
        assert not model.losses

    def test_with_parameters_frozen_since_is_refused(self, tmp_path: Path) -> None:
        path = self.checkpoint(tmp_path)
        model = LitTokens(optim="galore_adamw")
        model.model.norm.requires_grad_(False)
        with pytest.raises(InvalidOption, match=r"stands where the checkpoint has 'model\.norm\.weight'"):
            trainer(max_steps=4).fit(model, loader(), ckpt_path=path, weights_only=True)

    def test_with_another_rank_says_that_the_checkpoints_counts(self, tmp_path: Path) -> None:
        path = self.checkpoint(tmp_path, optim_args={"rank": 4})
        run = trainer(max_steps=4)
        with pytest.warns(UserWarning, match=r"resumes with the checkpoint's hyperparameters: rank=4 \(asked: 16\)\."):
            run.fit(
                LitTokens(optim="galore_adamw", optim_args={"rank": 16}), loader(), ckpt_path=path, weights_only=True
            )
        assert {group["rank"] for group in run.optimizers[0].param_groups} == {4, None}

    def test_of_a_compiled_model(self, tmp_path: Path) -> None:
        """torch.compile puts a word into the parameters' names."""
        plain, compiled = LitTokens(), LitTokens()
        compiled.model = torch.compile(compiled.model)  # type: ignore[assignment]
        saved = build_optimizer(plain, "galore_adamw").state_dict()
        build_optimizer(compiled, "galore_adamw").load_state_dict(saved)
