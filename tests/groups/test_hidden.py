"""Which matrices are hidden, what is taken for the output layer, and what steps everything else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_optim import (
    IncompatibleTrainer,
    InvalidOption,
    InvalidParamGroups,
    OptimConfig,
    UnknownOptimizer,
    build_optimizer,
)
from lightning_optim.build import resolve
from lightning_optim.groups import all_matrices, every_parameter, hidden_matrices, named_parameters
from lightning_optim.trainer import _report as report


def hidden(model: nn.Module, target: Any = None) -> tuple[set[str], str]:
    """Returns the names of the hidden matrices, and the remark."""
    parameters = named_parameters(model)
    found = hidden_matrices(parameters, target, every_parameter(model))
    return {p.name for p in parameters if id(p.parameter) in found.stack_dims}, found.remark


class Classifier(nn.Module):
    """A convolutional stem, experts, a norm, and layers of the given names at the end."""

    def __init__(self, *ends: str, tables: tuple[int, ...] = (), outputs: int = 10) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, 8) for rows in tables)
        self.stem = nn.Conv2d(3, 8, 3)
        self.experts = nn.ParameterList([nn.Parameter(torch.zeros(4, 8, 8))])
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}) for _ in range(2))
        for name in ends:
            self.add_module(name, nn.Linear(8, outputs))


BODY = {"stem.weight", "experts.0", "blocks.0.fc.weight", "blocks.1.fc.weight"}


@pytest.mark.parametrize(
    ("model", "output", "says"),
    [
        (Classifier("head"), {"head.weight"}, "it has an output layer's name"),
        (Classifier("head", "aux"), {"head.weight"}, "it has an output layer's name"),
        (Classifier("fc", "score"), {"score.weight"}, "'fc.weight', which are taken for hidden"),
        (Classifier("last"), {"last.weight"}, "it is the last linear layer"),
        # Of two tables the larger one is the vocabulary.
        (Classifier("head", "words", tables=(6, 50), outputs=50), {"words.weight"}, "as many outputs as the embedding"),
    ],
)
def test_the_output_layer_is_found(model: nn.Module, output: set[str], says: str) -> None:
    found, remark = hidden(model)
    linear = {f"{name}.weight" for name, one in model.named_modules() if isinstance(one, nn.Linear) and "." not in name}
    assert found == BODY | (linear - output)
    assert says in remark
    assert "optim_target_modules settles it" in remark


def test_huggingface_models_say_it_and_tied_ones_have_none() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
    found, remark = hidden(nn.ModuleDict({"model": llama}))
    assert len(found) == 2 * 7
    assert "says get_output_embeddings()" in remark
    tied = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8))
    found, remark = hidden(tied)
    assert len(found) == 2 * 4, "Conv1D is a linear layer"
    assert not any("wte" in name or "wpe" in name for name in found)
    assert "tied" in remark or "get_output_embeddings" in remark


FROZEN = {
    # Name of a layer that is frozen, or several; the output layer, the remark.
    "named": (Classifier("head"), ["head"], None, "'head.weight' is taken for the output layer: it has an output"),
    "last": (Classifier("last"), ["last"], None, "it is the last linear layer, and it is frozen"),
    "vocabulary": (Classifier("words", tables=(20,), outputs=20), ["words"], None, "rows (20), and it is frozen"),
    "table": (Classifier("head", "words", tables=(20,), outputs=20), ["tables"], "words", "as many outputs"),
    "body": (Classifier("last"), ["blocks"], "last", "it is the last linear layer"),
    "teacher": (
        nn.ModuleDict({"student": Classifier("head"), "teacher": Classifier("head")}),
        ["teacher"],
        "student.head",
        "'student.head.weight' is taken for the output layer: it has an output layer's name",
    ),
}


@pytest.mark.parametrize("what", FROZEN)
def test_a_frozen_output_layer_makes_no_other_layer_one(what: str) -> None:
    model, frozen, output, says = FROZEN[what]
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] not in frozen)
    found, remark = hidden(model)
    trained = {p.name for p in named_parameters(model) if p.is_matrix and not p.is_embedding}
    assert found == trained - {f"{output}.weight"}
    assert says in remark
    parts = {name: group["part"] for group in build_optimizer(model, "muon").param_groups for name in group["members"]}
    assert {name for name, part in parts.items() if part == "muon"} == found


def test_adapters_of_a_frozen_language_model_are_hidden() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes)).requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.adapter = nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False))
    found, remark = hidden(model)
    assert found == {p.name for p in named_parameters(model)}
    assert remark.startswith("'lm_head.weight' is taken for the output layer: get_output_embeddings() says so, and")
    # A classifier beside it is one.
    whole = nn.ModuleDict({"backbone": model, "classifier": nn.Linear(16, 3)})
    assert hidden(whole)[0] == {f"backbone.{name}" for name in found}
    # What is unfrozen later is what it would have been: the output layer is for the others.
    resolved = resolve(whole, OptimConfig("muon", lr=0.02))
    model.lm_head.requires_grad_(True)
    groups = resolved.regroup(whole, 0.02)
    assert {group["part"] for group in groups if any(p is model.lm_head.weight for p in group["params"])} == {"adamw"}


def test_target_modules_settle_it() -> None:
    model = Classifier("head")
    assert hidden(model, ["head"]) == ({"head.weight"}, "the matrices that optim_target_modules names")
    optimizer = build_optimizer(model, "muon", optim_target_modules=["blocks"])
    members = {group["name"]: group["members"] for group in optimizer.param_groups}
    assert members["decay"] == ["blocks.0.fc.weight", "blocks.1.fc.weight"]
    assert {"stem.weight", "head.weight"} <= set(members["adamw/decay"])


def test_what_is_unfrozen_later_needs_its_optimizer() -> None:
    model = Classifier("head")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in BODY)
    resolved = resolve(model, OptimConfig("muon", optim_target_modules=["blocks", "stem", "experts.0"]))
    assert not resolved.parts
    model.requires_grad_(True)
    with pytest.raises(InvalidParamGroups, match="belongs to optim='adamw', which had nothing to train"):
        resolved.regroup(model, 0.1)


def test_stacks_are_stepped_matrix_by_matrix() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 8, 6))

    model = nn.ModuleDict({"experts": Experts(), "head": nn.Linear(6, 2)})
    optimizer = build_optimizer(model, "muon", lr=0.02, weight_decay=0.0)
    assert optimizer.param_groups[0]["stack_dims"] == 1
    before = model["experts"].up.detach().clone()
    model["experts"].up.grad = torch.randn(4, 8, 6)
    optimizer.step()
    for moved in (before - model["experts"].up.detach()) / 0.02:
        assert 0.5 < torch.linalg.svdvals(moved).median() < 1.5


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({}, 1e-3),
        ({"others_lr": 3e-4}, 3e-4),
        ({"others_lr": "0.1x"}, 2e-3),
        ({"lr_scale": "match_rms_adamw"}, 2e-2),
        ({"others": "lion_8bit"}, 1e-4),
        ({"others": "schedule_free_adamw"}, 0.0025),
    ],
)
def test_the_rate_of_the_others(options: dict[str, Any], rate: float) -> None:
    resolved = resolve(Classifier("head"), OptimConfig("muon", lr=0.02, optim_args=options, weight_decay=0.3))
    groups = resolved.optimizer.param_groups
    assert {group["lr"] for group in groups if group["part"] == "muon"} == {0.02}
    (others,) = {group["lr"] for group in groups if group["part"] != "muon"}
    assert others == pytest.approx(rate)
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
    # After a finder: a factor follows, a rate of its own stays.
    factor = {"0.1x": 0.1}.get(str(options.get("others_lr")), 1.0 if "lr_scale" in options else None)
    expected = rate if factor is None else 0.5 * factor
    assert resolved.rates(0.5)[-1] == pytest.approx(expected)
    text = report.describe(resolved, "muon", "none")
    assert "muon: 'head.weight' is taken for the output layer" in text


def test_what_cannot_be_hidden_or_stepped_is_refused() -> None:
    for options, error, says in (
        ({"others": "adamx"}, UnknownOptimizer, "adamx"),
        ({"others": "normuon"}, IncompatibleTrainer, "not for these parameters"),
        ({"others": "adamw_torch_layerwise"}, IncompatibleTrainer, "not for these parameters"),
        ({"others_lr": "half"}, InvalidOption, "nor a factor, such as '0.1x'"),
        ({"others_lr": -1.0}, InvalidOption, "out of range"),
    ):
        with pytest.raises(error, match=says):
            OptimConfig("muon", optim_args=options)
    with pytest.raises(IncompatibleTrainer, match="adamw_torch_npu_fused_layerwise"):
        OptimConfig("muon_layerwise", optim_args={"others": "adamw_torch_npu_fused"})
    with pytest.raises(InvalidParamGroups, match="no hidden matrix"):
        build_optimizer(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), "muon")
    with pytest.raises(InvalidParamGroups, match="sets 'betas', which 'muon' cannot vary"):
        build_optimizer(Classifier("head"), "muon", param_groups={"blocks.*": {"betas": (0.8, 0.9)}})


class Tied(nn.Module):
    """Its output layer is the embedding's transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize(
    ("model", "roles"),
    [
        (
            Classifier("head", tables=(6,)),
            {"tables.0.weight": "embedding", "head.weight": "output", **dict.fromkeys(BODY)},
        ),
        (Tied(), {"embed.weight": "output", "hidden.weight": None}),
    ],
)
def test_all_matrices_know_the_ends_of_a_model(model: nn.Module, roles: dict[str, str | None]) -> None:
    parameters = named_parameters(model)
    found = all_matrices(parameters)
    names = {id(p.parameter): p.name for p in parameters}
    assert {names[identity]: found.roles.get(identity) for identity in found.stack_dims} == roles
    optimizer = build_optimizer(model, "scale", lr=0.01, optim_args={"output_momentum": 0.8})
    settings = {
        name: (group["momentum"], group["outputs"])
        for group in optimizer.param_groups
        for name in (group["members"] if group["part"] == "scale" else ())
    }
    of_role = {None: (0.0, "rows"), "embedding": (0.0, "columns"), "output": (0.8, "rows")}
    assert settings == {name: of_role[role] for name, role in roles.items()}
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


def test_a_pattern_settles_what_an_end_of_a_model_is() -> None:
    optimizer = build_optimizer(
        Classifier("head", "aux"), "scale", param_groups={"(head|aux)[.]weight": {"momentum": 0.7}}
    )
    momenta = {name: group["momentum"] for group in optimizer.param_groups[:-1] for name in group["members"]}
    assert {name for name, momentum in momenta.items() if momentum} == {"head.weight", "aux.weight"}
    with pytest.raises(IncompatibleTrainer, match=r"optim_target_modules=.* together with optim='scale'"):
        OptimConfig("scale", optim_target_modules=["head"])
    with pytest.raises(InvalidParamGroups, match="no matrix"):
        build_optimizer(nn.LayerNorm(4), "scale")


@pytest.mark.parametrize("name", ["muon", "scale"])
def test_where_a_pattern_takes_the_output_layer_no_other_is_taken_for_it(name: str) -> None:
    body, head = {"optim": "adamw_torch"}, {"optim": "sgd", "lr": 0.1}
    optimizer = build_optimizer(Classifier("fc", "score"), name, param_groups={"score[.].*": head})
    parts = {member: group["part"] for group in optimizer.param_groups for member in group["members"]}
    assert {member for member, part in parts.items() if part == name} == BODY | {"fc.weight"}
    if name == "scale":
        momenta = {member: group.get("momentum") for group in optimizer.param_groups for member in group["members"]}
        assert momenta["fc.weight"] == 0
    with pytest.raises(InvalidParamGroups, match=f"leave no matrix to optim='{name}'"):
        build_optimizer(Classifier("head"), name, param_groups={"(?!.*norm).*": body})
