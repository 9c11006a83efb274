"""Param groups: every trainable parameter in exactly one, decay by type and shape, overrides, layer-wise decay."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim import REGISTRY, InvalidOption, InvalidParamGroups, build_optimizer
from lightning_optim.groups._parameters import named_parameters
from tests.cases import NAMES
from tests.models import LitTokens, TokenModel, loader, trainer

QUANTIZED = [name for name in REGISTRY.plain if REGISTRY[name].bits]


class LlamaRMSNorm(nn.Module):
    """A norm layer of a model's own, its weight of two dimensions so that only the name tells."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, width))


class LayerNorm2d(LlamaRMSNorm):
    pass


class T5LayerNorm(LlamaRMSNorm):
    pass


class Normalizer(LlamaRMSNorm):
    """Not a norm layer by name: its matrix decays."""


class Scaled(nn.Module):
    """0-dim, 1-dim and matrix parameters of its own, and biases of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.scale = nn.Parameter(torch.ones(4))
        self.matrix = nn.Parameter(torch.ones(4, 4))
        self.bias = nn.Parameter(torch.ones(1, 4))
        self.gate_up_proj_bias = nn.Parameter(torch.ones(2, 4))
        self.bias_table = nn.Parameter(torch.ones(2, 4))
        self.biased = nn.Parameter(torch.ones(2, 4))
        self.register_parameter("absent", None)


def tied() -> nn.Module:
    model = TokenModel(8)
    model.head.weight = model.embedding.weight
    return model


def shared() -> nn.Module:
    linear = nn.Linear(4, 4)
    return nn.Sequential(linear, nn.ReLU(), linear)


def frozen() -> nn.Module:
    model = TokenModel(8)
    model.embedding.requires_grad_(False)
    model.linear.bias.requires_grad_(False)
    return model


def norm_tied_to_linear() -> nn.Module:
    model = nn.Sequential(LlamaRMSNorm(4), nn.Linear(4, 1, bias=False))
    model[1].weight = model[0].weight
    return model


# Each model with the names of the parameters that decay; all others do not.
MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "tokens": (lambda: TokenModel(8), {"embedding.weight", "linear.weight", "head.weight"}),
    "tied": (tied, {"embedding.weight", "linear.weight"}),
    "frozen": (frozen, {"linear.weight", "head.weight"}),
    "shared": (shared, {"0.weight"}),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.ConvTranspose1d(4, 4, 2)),
        {"0.weight", "3.weight"},
    ),
    "norms": (
        lambda: nn.Sequential(
            nn.LayerNorm((2, 4)), nn.RMSNorm((2, 4)), nn.InstanceNorm1d(4, affine=True), nn.SyncBatchNorm(4)
        ),
        set(),
    ),
    "own norms": (
        lambda: nn.Sequential(LlamaRMSNorm(4), LayerNorm2d(4), T5LayerNorm(4), Normalizer(4)),
        {"3.weight"},
    ),
    "norm tied to linear": (norm_tied_to_linear, set()),
    "attention": (lambda: nn.MultiheadAttention(8, 2), {"in_proj_weight", "out_proj.weight"}),
    "attention, three inputs": (
        lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=4, add_bias_kv=True),
        {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"},
    ),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"},
    ),
    "lstm": (lambda: nn.LSTM(4, 4), {"weight_ih_l0", "weight_hh_l0"}),
    "parameters": (Scaled, {"matrix", "biased"}),
    "list": (lambda: nn.ParameterList([torch.ones(2, 2), torch.ones(2)]), {"0"}),
    "bag": (lambda: nn.EmbeddingBag(4, 4), {"weight"}),
}


def names_by_group(optimizer: Optimizer, model: nn.Module) -> dict[str, list[str]]:
    """Returns each group's parameter names, the first name of tied ones."""
    names = {id(parameter): name for name, parameter in reversed(list(model.named_parameters(remove_duplicate=False)))}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in optimizer.param_groups}


def group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    (group,) = [group for group in optimizer.param_groups if any(p is parameter for p in group["params"])]
    return group


@pytest.mark.parametrize("name", ["adamw_torch", "lion_8bit", "stable_adamw", "schedule_free_sgd", "torch.optim.Rprop"])
@pytest.mark.parametrize("model_name", MODELS)
def test_every_trainable_parameter_is_in_exactly_one_group(model_name: str, name: str) -> None:
    model = MODELS[model_name][0]()
    optimizer = build_optimizer(model, name)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == trainable
    assert all(group["params"] for group in optimizer.param_groups)


@pytest.mark.parametrize("model_name", MODELS)
def test_weights_decay_and_biases_norms_and_vectors_do_not(model_name: str) -> None:
    create, expected = MODELS[model_name]
    model = create()
    optimizer = build_optimizer(model, "adamw_torch", weight_decay=0.1)
    names = names_by_group(optimizer, model)
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays.items() <= {"decay": 0.1, "no_decay": 0.0}.items()
    assert set(names.get("decay", [])) == expected


def test_decayed_groups_come_first() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    assert list(names_by_group(build_optimizer(model), model)) == ["decay", "no_decay"]


def test_the_order_of_groups_does_not_depend_on_the_run() -> None:
    patterns = {"linear.*": {"lr": 1e-3}, "head.*": {"lr": 1e-4}}
    orders = []
    for _ in range(2):
        model = TokenModel(8)
        orders.append(names_by_group(build_optimizer(model, "adamw_8bit", param_groups=patterns), model))
    assert list(orders[0].items()) == list(orders[1].items())


# --- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_set_hyperparameters_by_pattern() -> None:
    model = TokenModel(8)
    optimizer = build_optimizer(
        model,
        "adamw_torch",
        lr=1e-3,
        weight_decay=0.1,
        param_groups={
            r"embedding\..*": {"lr": "1e-4", "weight_decay": 0.5},
            ".*bias": {"betas": "(0.8, 0.9)", "amsgrad": True},
            "linear.*": {"weight_decay": 0},
        },
    )
    values = {
        name: tuple(group_of(optimizer, p)[key] for key in ("lr", "weight_decay", "betas", "amsgrad"))
        for name, p in model.named_parameters()
    }
    default = (0.9, 0.999)
    assert values == {
        "embedding.weight": (1e-4, 0.5, default, False),
        "linear.weight": (1e-3, 0.0, default, False),
        "linear.bias": (1e-3, 0.0, (0.8, 0.9), True),
        "norm.weight": (1e-3, 0.0, default, False),
        "norm.bias": (1e-3, 0.0, (0.8, 0.9), True),
        "head.weight": (1e-3, 0.1, default, False),
        "head.bias": (1e-3, 0.0, (0.8, 0.9), True),
    }


@pytest.mark.parametrize("name", NAMES)
def test_overridden_options_reach_every_class(name: str) -> None:
    model = TokenModel(64)
    values: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.25}
    betas = REGISTRY[name].options().select("group").get("betas")
    if betas is not None:
        values["betas"] = tuple(0.75 for _ in betas)
    optimizer = build_optimizer(model, name, param_groups={"linear.weight": values})
    group = group_of(optimizer, model.linear.weight)
    found = {**group, "betas": group.get("betas") or (group.get("beta1"), group.get("beta2"))}
    assert float(found["lr"]) == pytest.approx(1e-4)
    assert found["weight_decay"] == 0.25
    assert all(found[key] == value for key, value in values.items() if key != "lr")


def test_the_first_matching_pattern_wins() -> None:
    model = TokenModel(8)
    patterns = {"head.weight": {"lr": 1.0}, "head.*": {"lr": 2.0}, ".*": {"lr": 3.0}}
    optimizer = build_optimizer(model, "sgd", param_groups=patterns)
    assert group_of(optimizer, model.head.weight)["lr"] == 1.0
    assert group_of(optimizer, model.head.bias)["lr"] == 2.0
    assert group_of(optimizer, model.linear.weight)["lr"] == 3.0


def test_any_name_of_a_tied_parameter_matches() -> None:
    model = tied()
    for pattern in ("head.weight", "embedding.weight"):
        optimizer = build_optimizer(model, "sgd", param_groups={pattern: {"lr": 7.0}})
        assert group_of(optimizer, model.embedding.weight)["lr"] == 7.0


def test_any_name_of_a_shared_module_matches() -> None:
    model = shared()
    for pattern in ("0.weight", "2.weight"):
        optimizer = build_optimizer(model, "sgd", param_groups={pattern: {"lr": 7.0}})
        assert group_of(optimizer, model[0].weight)["lr"] == 7.0


def test_patterns_match_whole_names() -> None:
    with pytest.raises(InvalidParamGroups, match="matches no trainable parameter"):
        build_optimizer(TokenModel(8), param_groups={"linear": {"lr": 1.0}})


@pytest.mark.parametrize(
    ("patterns", "error", "parts"),
    [
        ({"heads.*": {"lr": 1}}, InvalidParamGroups, ["'heads.*' matches no trainable parameter", "'head.bias'"]),
        ({"zzz": {"lr": 1}}, InvalidParamGroups, ["'zzz' matches no trainable parameter", "'embedding.weight'"]),
        (
            {"head.*": {"lr": 1}, "head.bias": {"lr": 2}},
            InvalidParamGroups,
            ["'head.bias' matches only parameters that an earlier pattern takes ('head.*'); put it first"],
        ),
        ({"*.bias": {"lr": 1}}, InvalidParamGroups, ["'*.bias' is not a regular expression", r"'.*[.]bias'"]),
        ({"head.(weight": {"lr": 1}}, InvalidParamGroups, ["'head.(weight' is not a regular expression"]),
        ({3: {"lr": 1}}, InvalidParamGroups, ["3 (int) is not a regular expression"]),
        (
            {"head.*": 1e-4},
            InvalidParamGroups,
            ["param_groups['head.*'] must be a mapping such as {'lr': 1e-4}", "0.0001"],
        ),
        (
            {"head.*": {"learning_rate": 1}},
            InvalidParamGroups,
            ["param_groups['head.*'] sets 'learning_rate'", "'adamw_torch'", "'lr'", "'weight_decay'", "'betas'"],
        ),
        ({"head.*": {"lr": -1}}, InvalidOption, ["param_groups['head.*']['lr']=-1 is out of range", "0 <= value"]),
        ({"head.*": {"lr": None}}, InvalidOption, ["param_groups['head.*']['lr']=None"]),
        ({"head.*": {"weight_decay": "much"}}, InvalidOption, ["param_groups['head.*']['weight_decay']='much'"]),
        ({"head.*": {"betas": (0.9, 1.0)}}, InvalidOption, ["betas=(0.9, 1.0) of 'adamw_torch' is out of range"]),
        ({"head.*": {"eps": "small"}}, InvalidOption, ["eps='small'", "'adamw_torch'", "eps: float"]),
        ({"head.*": {"optim_bits": 8}}, InvalidParamGroups, ["sets 'optim_bits'", "'adamw_torch'"]),
        ([{"lr": 1}], InvalidOption, ["param_groups=[{'lr': 1}]", "mapping of patterns"]),
    ],
)
def test_wrong_overrides_are_refused(patterns: Any, error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        build_optimizer(TokenModel(8), "adamw_torch", param_groups=patterns)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("name", "values", "parts"),
    [
        ("sgd", {"nesterov": True}, ["param_groups['head.*'] of 'sgd'", "nesterov=True needs momentum > 0"]),
        ("stable_adamw", {"foreach": True, "triton": True}, ["param_groups['head.*'] of 'stable_adamw'", "exclude"]),
        ("ademamix", {"t_beta3": 5, "betas": (0.0, 0.9, 0.9)}, ["param_groups['head.*'] of 'ademamix'", "t_beta3"]),
        ("adamw_8bit", {"min_8bit_size": 1}, ["sets 'min_8bit_size', which 'adamw_bnb_8bit' cannot vary"]),
        ("adamw_8bit", {"optim_bits": 4}, ["optim_bits=4", "'adamw_bnb_8bit' allows 8 or 32"]),
        ("adamw_torch_4bit", {"optim_bits": 8}, ["optim_bits=8", "'adamw_torch_4bit' allows 4 or 32"]),
        ("adamw_torch_8bit", {"block_size": 64}, ["sets 'block_size', which 'adamw_torch_8bit' cannot vary"]),
    ],
)
def test_overrides_are_checked_by_the_row(name: str, values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises((InvalidOption, InvalidParamGroups)) as caught:
        build_optimizer(TokenModel(8), name, param_groups={"head.*": values})
    assert all(part in str(caught.value) for part in parts), caught.value


def test_an_override_is_checked_together_with_the_options() -> None:
    arguments = {"optim_args": "momentum=0.9", "param_groups": {"head.*": {"nesterov": True}}}
    model = TokenModel(8)
    assert group_of(build_optimizer(model, "sgd", **arguments), model.head.weight)["nesterov"]


# --- layer-wise decay ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class ViT(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.patch_embed = nn.Conv2d(3, 4, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.pooler = nn.Linear(4, 2)


class EncoderDecoder(nn.Module):
    """Two stacks of different length, with modules before and after each, and parameters that the root owns."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(8, 4)
        self.encoder = nn.Module()
        self.encoder.block = nn.ModuleList(Block() for _ in range(3))
        self.encoder.norm = nn.LayerNorm(4)
        self.decoder = nn.Module()
        self.decoder.positions = nn.Embedding(8, 4)
        self.decoder.block = nn.ModuleList(Block() for _ in range(2))
        self.decoder.norm = nn.LayerNorm(4)
        self.decoder.temperature = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(4, 2)
        self.logit_scale = nn.Parameter(torch.ones(()))


class Stack(nn.Sequential):
    """Single layers in a row."""

    def __init__(self, depth: int) -> None:
        super().__init__(*(nn.Linear(8, 8) for _ in range(depth)))


@pytest.mark.parametrize(
    ("create", "pattern", "expected"),
    [
        (
            ViT,
            None,
            {"cls_token": 4, "patch_embed": 4, "blocks.0": 3, "blocks.1": 2, "blocks.2": 1, "norm": 0, "head": 0},
        ),
        (ViT, r"blocks\.(\d+)", {"patch_embed": 4, "blocks.0": 3, "blocks.2": 1, "head": 0}),
        (lambda: ViT(1), r"blocks\.(\d+)", {"patch_embed": 2, "blocks.0": 1, "head": 0}),
        (Classifier, None, {"embedding": 3, "encoder.layers.0": 2, "encoder.layers.1": 1, "pooler": 0}),
        (lambda: Stack(3), None, {"0": 3, "1": 2, "2": 1}),
        (
            EncoderDecoder,
            r"^(?:encoder|decoder)[.]block[.](\d+)",
            {
                "shared": 4,
                "encoder.block.0": 3,
                "encoder.block.2": 1,
                "encoder.norm": 0,
                "decoder.positions": 3,
                "decoder.block.0": 2,
                "decoder.block.1": 1,
                "decoder.norm": 0,
                "decoder.temperature": 0,
                "head": 0,
                "logit_scale": 0,
            },
        ),
        # One stack alone: what it does not hold lies before or after it.
        (EncoderDecoder, r"^decoder[.]block[.](\d+)", {"encoder": 3, "decoder.block.0": 2, "head": 0}),
        # A stem and a head of numbered layers are no rivals of the blocks between them.
        (
            lambda: nn.ModuleDict({"stem": Stack(3), "vit": ViT(), "top": Stack(2)}),
            None,
            {"stem": 4, "vit.cls_token": 4, "vit.blocks.0": 3, "vit.blocks.2": 1, "top": 0},
        ),
        (lambda: nn.ModuleDict({"wrapped": ViT()}), None, {"wrapped.cls_token": 4, "wrapped.blocks.1": 2}),
    ],
)
def test_layers_are_found_and_decayed_by_depth(
    create: Callable[[], nn.Module], pattern: str | None, expected: dict[str, int]
) -> None:
    model = create()
    optimizer = build_optimizer(model, "sgd", lr=1.0, layer_decay=0.5, layer_pattern=pattern)
    for name, parameter in model.named_parameters():
        power = next((power for prefix, power in expected.items() if f"{name}.".startswith(f"{prefix}.")), None)
        assert power is None or group_of(optimizer, parameter)["lr"] == 0.5**power, name
    assert all(any(f"{name}.".startswith(f"{prefix}.") for name, _ in model.named_parameters()) for prefix in expected)


def test_layer_decay_keeps_the_weight_decay_split_and_yields_to_overrides() -> None:
    model = ViT()
    optimizer = build_optimizer(
        model, "adamw_torch", lr=1.0, weight_decay=0.1, layer_decay=0.5, param_groups={"blocks.0.norm.*": {"lr": 7.0}}
    )
    assert group_of(optimizer, model.blocks[0].norm.weight)["lr"] == 7.0
    assert group_of(optimizer, model.blocks[0].norm.weight)["weight_decay"] == 0.0
    linear = model.blocks[0].mlp[0]
    values = [(group_of(optimizer, p)["lr"], group_of(optimizer, p)["weight_decay"]) for p in linear.parameters()]
    assert values == [(0.125, 0.1), (0.125, 0.0)]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_frozen_layers_do_not_shift_the_others() -> None:
    model = ViT()
    model.blocks[0].requires_grad_(False)
    optimizer = build_optimizer(model, "sgd", lr=1.0, layer_decay=0.5)
    assert group_of(optimizer, model.blocks[1].norm.weight)["lr"] == 0.25
    assert group_of(optimizer, model.head.weight)["lr"] == 1.0


def test_layer_decay_one_changes_no_learning_rate() -> None:
    optimizer = build_optimizer(ViT(), "sgd", lr=0.3, layer_decay=1.0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.3}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"layer_decay": 0.5}, ["layer_decay needs numbered layers", "layer_pattern"]),
        ({"layer_decay": 0.5, "layer_pattern": "linear"}, ["layer_pattern='linear' must have exactly one group"]),
        ({"layer_decay": 0.5, "layer_pattern": r"(l)(\d+)"}, ["must have exactly one group"]),
        (
            {"layer_decay": 0.5, "layer_pattern": r"block(\d+)"},
            ["matches no trainable parameter", "'embedding.weight'"],
        ),
        ({"layer_decay": 0.5, "layer_pattern": r"(\w+)\.weight"}, ["finds 'embedding'", "must match digits"]),
        ({"layer_decay": 0.5, "layer_pattern": r"linear(\d+)?"}, ["must match digits", "'linear.weight'"]),
        ({"layer_decay": 0.5, "layer_pattern": r"layer.(\d+"}, ["layer_pattern", "is not a regular expression"]),
        ({"layer_decay": 1.5}, ["layer_decay=1.5", "0 < value <= 1"]),
        ({"layer_decay": 0}, ["layer_decay=0", "0 < value <= 1"]),
        ({"layer_decay": "deep"}, ["layer_decay='deep'"]),
    ],
)
def test_layer_decay_that_cannot_work_is_refused(arguments: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises((InvalidParamGroups, InvalidOption)) as caught:
        build_optimizer(TokenModel(8), "sgd", **arguments)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_several_stacks_are_refused_with_patterns_that_work() -> None:
    """Grading the larger one alone would give the other, whole, the lowest rate."""
    model = EncoderDecoder()
    with pytest.raises(InvalidParamGroups, match=r"several stacks .*'encoder.block.', 'decoder.block.'") as caught:
        build_optimizer(model, "sgd", lr=1.0, layer_decay=0.5)
    each, alone = re.findall(r"r'(\S+)'", str(caught.value))
    optimizer = build_optimizer(model, "sgd", lr=1.0, layer_decay=0.5, layer_pattern=each)
    tops = [model.encoder.block[2].norm.weight, model.decoder.block[1].norm.weight]
    assert [group_of(optimizer, parameter)["lr"] for parameter in tops] == [0.5, 0.5]
    optimizer = build_optimizer(model, "sgd", lr=1.0, layer_decay=0.5, layer_pattern=alone)
    assert [group_of(optimizer, parameter)["lr"] for parameter in tops] == [0.5, 1.0]


# --- quantized states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZED)
def test_embeddings_keep_32_bits_unless_asked(name: str) -> None:
    model, bits = tied(), REGISTRY[name].bits
    default = build_optimizer(model, name)
    assert group_of(default, model.embedding.weight)["optim_bits"] == 32
    assert group_of(default, model.linear.weight)["optim_bits"] == bits
    assert group_of(default, model.linear.bias)["optim_bits"] == bits

    asked = build_optimizer(model, name, optim_args={"quantize_embeddings": True})
    assert {group["optim_bits"] for group in asked.param_groups} == {bits}

    patterns = {"embedding.*": {"optim_bits": bits}, "linear.*": {"optim_bits": 32}}
    by_pattern = build_optimizer(model, name, param_groups=patterns)
    assert group_of(by_pattern, model.embedding.weight)["optim_bits"] == bits
    assert group_of(by_pattern, model.linear.weight)["optim_bits"] == 32


@pytest.mark.parametrize(("args", "dtype"), [("", torch.float32), ("quantize_embeddings=True", torch.uint8)])
def test_bitsandbytes_stores_embeddings_as_the_group_says(args: str, dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(64, 64), "linear": nn.Linear(64, 64)})
    optimizer = build_optimizer(model, "lion_8bit", optim_args=args)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[model["embedding"].weight]["state1"].dtype is dtype
    assert optimizer.state[model["linear"].weight]["state1"].dtype is torch.uint8


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap", [list, iter, lambda items: (item for item in items)], ids=["list", "iterator", "generator"]
)
def test_parameters_and_pairs_are_targets(wrap: Callable[[Any], Iterable[Any]]) -> None:
    model = frozen()
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    for target in (wrap(list(model.parameters())), wrap(list(model.named_parameters()))):
        optimizer = build_optimizer(target, "adamw_torch", weight_decay=0.1)
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trainable
        for parameter in (p for p in model.parameters() if p.requires_grad):
            assert group_of(optimizer, parameter)["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)


def test_pairs_have_names_for_patterns_and_tied_parameters_count_once() -> None:
    model = tied()
    pairs = list(model.named_parameters(remove_duplicate=False))
    optimizer = build_optimizer(pairs, "sgd", param_groups={"head.weight": {"lr": 7.0}})
    assert group_of(optimizer, model.embedding.weight)["lr"] == 7.0
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ({"weight": nn.Parameter(torch.ones(2))}, ["expected a module, parameters or (name, parameter) pairs", "dict"]),
        (nn.Parameter(torch.ones(2)), ["expected a module", "got Parameter"]),
        ("model", ["expected a module", "got str"]),
        (3, ["expected a module", "got int"]),
        (None, ["expected a module", "got NoneType"]),
        ([{"params": [nn.Parameter(torch.ones(2))]}], ["item of type dict", "param_groups={pattern: {...}}"]),
        ([("a", "b")], ["item of type tuple"]),
        ([("a", nn.Parameter(torch.ones(2)), 3)], ["item of type tuple"]),
        ([nn.Linear(2, 2)], ["item of type Linear"]),
        ([], ["no parameter to optimize"]),
        (nn.ReLU(), ["no parameter to optimize", "frozen", "configure_model()"]),
        (nn.Linear(2, 2).requires_grad_(False), ["no parameter to optimize", "requires_grad=False"]),
        (nn.LazyLinear(2), ["'weight' is not initialized yet (a Lazy module)", "setup()"]),
        (list(nn.LazyLinear(2).parameters()), ["not initialized yet (a Lazy module)"]),
    ],
)
def test_targets_without_usable_parameters_are_refused(target: Any, parts: list[str]) -> None:
    with pytest.raises(InvalidParamGroups) as caught:
        build_optimizer(target, "sgd")
    assert all(part in str(caught.value) for part in parts), caught.value


def test_patterns_need_names() -> None:
    with pytest.raises(InvalidParamGroups, match=r"'head.\*' needs names to match; pass the module"):
        build_optimizer(TokenModel(8).parameters(), "sgd", param_groups={"head.*": {"lr": 1.0}})


def test_a_lazy_module_that_has_seen_a_batch_is_accepted() -> None:
    model = nn.LazyLinear(2)
    model(torch.ones(1, 3))
    assert len(build_optimizer(model, "sgd").param_groups) == 2


def test_names_of_a_tied_parameter_are_all_known() -> None:
    model = tied()
    (embedding,) = [p for p in named_parameters(model) if p.parameter is model.embedding.weight]
    assert embedding.names == ("embedding.weight", "head.weight")
    assert embedding.name == "embedding.weight"
    assert embedding.owners == (model.embedding, model.head)
    assert named_parameters([nn.Parameter(torch.ones(2, 3))])[0].name == "<unnamed (2, 3)>"


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_sparse_embeddings_train_beside_dense_parameters(name: str) -> None:
    class Sparse(LitTokens):
        def __init__(self, **optim: Any) -> None:
            super().__init__(**optim)
            self.model.embedding = nn.Embedding(16, 64, sparse=True)

    model = Sparse(optim=name, lr=0.3)
    before = model.model.embedding.weight.detach().clone()
    trainer(max_steps=10).fit(model, loader())
    gradient = model.model.embedding.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    assert not torch.equal(model.model.embedding.weight, before)
    assert model.losses[-1] < model.losses[0]


def test_a_pattern_may_be_called_like_a_group() -> None:
    model = nn.Linear(4, 4)
    model.register_parameter("decay", nn.Parameter(torch.zeros(2)))
    optimizer = build_optimizer(model, lr=0.1, param_groups={"decay": {"lr": 5.0, "weight_decay": 0.0}})
    groups = {group["name"]: (group["lr"], len(group["params"])) for group in optimizer.param_groups}
    assert groups == {"decay": (0.1, 1), "no_decay": (0.1, 1), "decay_2": (5.0, 1)}
