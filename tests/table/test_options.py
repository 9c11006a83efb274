"""Typed options: Hugging Face's string grammar, every type, ranges, and agreement with the upstream constructors."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch

from lightning_optim import REGISTRY, InvalidOption, OptimConfig
from lightning_optim.build._curves import SCHEDULES
from lightning_optim.table._options import (
    AT_LEAST_ONE,
    NON_NEGATIVE,
    OPEN_UNIT,
    POSITIVE,
    UNIT,
    Options,
    Range,
    as_number,
    describe,
    option,
    parse,
    required,
    split,
)
from tests.cases import BY_NAME, CASES, NAMES


@dataclass(frozen=True)
class Probe(Options):
    """One option of every type."""

    flag: bool = option(False, "a switch")
    count: int = option(1, "a count", AT_LEAST_ONE)
    rate: float = option(0.5, "a rate", UNIT)
    free: float = option(0.0, "any number")
    limit: float | None = option(None, "a limit", POSITIVE)
    either: int | float = option(0, "a number of either type")
    choice: bool | None = option(None, "a switch or not", scope="constructor")
    betas: tuple[float, float] = option((0.9, 0.99), "two rates", UNIT)
    mode: Literal["min", "max"] = option("min", "a word")
    name: str = option("loss", "a text", scope="policy")
    anything: Any = option(None, "whatever")


@dataclass(frozen=True)
class Needy(Options):
    """An option without default."""

    steps: int = required("a count", AT_LEAST_ONE)


def refusal(raw: Any, options: type[Options] = Probe) -> str:
    """Returns the text with which ``raw`` is refused."""
    with pytest.raises(InvalidOption) as caught:
        parse(options, raw, "probe")
    return caught.value.text


# --- the string ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("  ", {}),
        (" , ,", {}),
        ("count=3", {"count": "3"}),
        (" count = 3 , rate = 0.25 ,", {"count": "3", "rate": "0.25"}),
        ("betas=(0.8, 0.95),count=3", {"betas": "(0.8, 0.95)", "count": "3"}),
        ("count=3,betas=[0.8,0.95]", {"count": "3", "betas": "[0.8,0.95]"}),
        ("anything={'a': (1, 2), 'b': [3]},count=3", {"anything": "{'a': (1, 2), 'b': [3]}", "count": "3"}),
        ("name='a, b = (',count=3", {"name": "a, b = (", "count": "3"}),
        ('name="it\'s",mode=max', {"name": "it's", "mode": "max"}),
        ("name=a=b", {"name": "a=b"}),
    ],
)
def test_split(text: str, expected: dict[str, str]) -> None:
    assert split(text, "probe") == expected


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("count", ["cannot read 'count'", "'name=value,name=value'"]),
        ("count=1,rate", ["cannot read 'rate'"]),
        ("=1", ["cannot read '=1'"]),
        ("count=1,count=2", ["'count' is given twice"]),
        ("betas=(0.9, 0.95", ["unbalanced brackets", "betas=(0.9, 0.95"]),
        ("betas=0.9, 0.95)", ["unbalanced brackets"]),
        ("name=a),mode=(min", ["unbalanced brackets"]),
        ("name='a,mode=min", ["unbalanced quotes"]),
        ("betas=(0.9, 0.95]", ["betas='(0.9, 0.95]'", "betas: (float, float)"]),
        ("count=", ["count=''", "count: int"]),
        ("betas=0.9,0.95", ["cannot read '0.95'"]),
    ],
)
def test_malformed_strings_are_refused(text: str, parts: list[str]) -> None:
    message = refusal(text)
    assert all(part in message for part in [*parts, "'probe'"]), message


def test_string_and_mapping_mean_the_same() -> None:
    text = "flag=True,count=3,rate=1e-3,limit=None,betas=(0.8, 0.95),mode='max',name=val_loss,anything=[1, 2]"
    mapping = {
        "flag": "True",
        "count": "3",
        "rate": "1e-3",
        "limit": "None",
        "betas": "(0.8, 0.95)",
        "mode": "max",
        "name": "val_loss",
        "anything": "[1, 2]",
    }
    values = {
        "flag": True,
        "count": 3,
        "rate": 1e-3,
        "limit": None,
        "betas": (0.8, 0.95),
        "mode": "max",
        "name": "val_loss",
        "anything": [1, 2],
    }
    assert parse(Probe, text, "probe") == parse(Probe, mapping, "probe") == Probe(**values)


@pytest.mark.parametrize("raw", [None, "", {}])
def test_nothing_given_means_the_defaults(raw: Any) -> None:
    assert parse(Probe, raw, "probe") == Probe()


@pytest.mark.parametrize("raw", [5, ["count=3"], [("count", 3)], True])
def test_what_is_neither_string_nor_mapping_is_refused(raw: Any) -> None:
    message = refusal(raw)
    assert f"optim_args={raw!r}" in message
    assert "neither a mapping nor a string 'name=value,...'" in message


# --- types -----------------------------------------------------------------------------------------------------------

ACCEPTED = {
    "flag": [
        *[(word, True) for word in (True, "True", "true", "TRUE", "1", "yes", "y", "on", "t", " True ")],
        *[(word, False) for word in (False, "False", "false", "FALSE", "0", "no", "n", "off", "f")],
    ],
    "count": [(64, 64), ("64", 64), (" 64 ", 64), (64.0, 64), ("64.0", 64), ("6.4e1", 64)],
    "rate": [(0, 0.0), (0.25, 0.25), ("0.25", 0.25), (".25", 0.25), ("1e-3", 1e-3), ("0", 0.0)],
    "limit": [(None, None), ("None", None), ("null", None), ("NULL", None), (" none ", None), ("2", 2.0), (3, 3.0)],
    "either": [("3", 3), ("3.5", 3.5), (4, 4), (4.5, 4.5)],
    "choice": [(None, None), ("None", None), ("False", False), ("True", True), (False, False)],
    "betas": [
        ((0.8, 0.95), (0.8, 0.95)),
        ([0.8, 0.95], (0.8, 0.95)),
        ("(0.8, 0.95)", (0.8, 0.95)),
        (" [0.8,0.95] ", (0.8, 0.95)),
        (("0.8", "0"), (0.8, 0.0)),
    ],
    "mode": [("min", "min"), ("max", "max")],
    "name": [("val_loss", "val_loss"), ("1", "1"), ("None", "None")],
    "anything": [("1", 1), ("1e-3", 1e-3), ("-inf", -math.inf), ("word", "word"), ([1], [1]), ("(1, 2)", (1, 2))],
}


@pytest.mark.parametrize(("name", "raw", "expected"), [(n, *pair) for n, pairs in ACCEPTED.items() for pair in pairs])
def test_values_become_the_declared_type(name: str, raw: Any, expected: Any) -> None:
    value = getattr(parse(Probe, {name: raw}, "probe"), name)
    assert value == expected
    assert type(value) is type(expected)


REFUSED = {
    "flag": [1, 0, 1.0, None, "maybe", "", "2", [True]],
    "count": [1.5, "1.5", True, False, "True", None, "None", "many", "", [1], math.inf, math.nan, "1e400", "inf"],
    "rate": [True, "False", None, "fast", "", [0.1], (0.1,), math.nan, "nan", 10**400, 1j],
    "free": [math.nan, "nan"],
    "limit": [True, "maybe", [1.0]],
    "either": [True, None, "x"],
    "choice": [1, "maybe"],
    "betas": [
        0.9,
        "0.9",
        (0.9,),
        (0.9, 0.95, 0.99),
        "(0.9, 0.95, 0.99)",
        (0.9, "x"),
        (0.9, True),
        (0.9, None),
        "x",
        "",
    ],
    "mode": ["MIN", "median", None, 1, "", ["min"]],
    "name": [1, None, True],
}


@pytest.mark.parametrize(("name", "raw"), [(name, raw) for name, raws in REFUSED.items() for raw in raws])
def test_values_that_do_not_fit_are_refused(name: str, raw: Any) -> None:
    message = refusal({name: raw})
    info = next(info for info in describe(Probe) if info.name == name)
    assert message == f"{name}={raw!r} ({type(raw).__name__}) does not fit the option of 'probe': {info}"


@dataclass(frozen=True)
class Precise(Options):
    """A dtype by name."""

    dtype: Literal["float32", "bfloat16"] = option("float32", "a dtype")


@pytest.mark.parametrize("raw", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtypes_become_their_names(raw: Any) -> None:
    assert parse(Precise, {"dtype": raw}, "probe").dtype == "bfloat16"
    if isinstance(raw, str):
        assert parse(Precise, f"dtype={raw}", "probe").dtype == "bfloat16"


@pytest.mark.parametrize("raw", ["torch.float16", torch.float16, "torch.", "torch.torch.float32", "bf16", float, None])
def test_other_dtypes_are_refused(raw: Any) -> None:
    assert "dtype: 'float32' | 'bfloat16' (default 'float32')" in refusal({"dtype": raw}, Precise)


def test_descriptions_show_type_default_and_range() -> None:
    assert [str(info) for info in describe(Probe)] == [
        "flag: bool (default False)",
        "count: int (default 1, 1 <= value)",
        "rate: float (default 0.5, 0 <= value < 1)",
        "free: float (default 0.0)",
        "limit: float | None (default None, 0 < value)",
        "either: int | float (default 0)",
        "choice: bool | None (default None)",
        "betas: (float, float) (default (0.9, 0.99), 0 <= value < 1)",
        "mode: 'min' | 'max' (default 'min')",
        "name: str (default 'loss')",
        "anything: Any (default None)",
    ]
    assert [str(info) for info in describe(Needy)] == ["steps: int (required, 1 <= value)"]


def test_scopes_select_what_the_constructor_gets() -> None:
    options = parse(Probe, "choice=True,count=2", "probe")
    assert options.select("constructor") == {"choice": True}
    assert options.select("policy") == {"name": "loss"}
    everything = {**options.select("group"), **options.select("constructor", "policy")}
    assert everything == dataclasses.asdict(options)
    assert options.select("group")["count"] == 2


# --- ranges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "text"),
    [
        (NON_NEGATIVE, [0.0, 0, 1e300, 10**400], [-1e-300, -1], "0 <= value"),
        (POSITIVE, [1e-300, 1], [0.0, -1.0], "0 < value"),
        (AT_LEAST_ONE, [1, 2], [0, 0.999], "1 <= value"),
        (UNIT, [0.0, 0.999], [1.0, -0.1, 2], "0 <= value < 1"),
        (OPEN_UNIT, [1e-300, 0.999], [0.0, 1.0], "0 < value < 1"),
        (Range(high=1.0), [-1e300, 1.0], [1.1], "value <= 1"),
        (Range(), [-1e300, 0], [], "value"),
    ],
)
def test_ranges(interval: Range, inside: list[float], outside: list[float], text: str) -> None:
    assert all(value in interval for value in inside)
    assert not any(value in interval for value in [*outside, math.nan, math.inf, -math.inf])
    assert str(interval) == text


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        ({"rate": 1.0}, ["rate=1.0", "0 <= value < 1"]),
        ({"rate": "-0.1"}, ["rate='-0.1'", "0 <= value < 1"]),
        ({"count": 0}, ["count=0", "1 <= value"]),
        ({"limit": 0}, ["limit=0", "0 < value"]),
        ({"limit": "inf"}, ["limit='inf'", "0 < value (finite)"]),
        ({"betas": (0.9, 1.0)}, ["betas=(0.9, 1.0)", "0 <= value < 1"]),
        ({"betas": "(-0.1, 0.9)"}, ["betas='(-0.1, 0.9)'", "0 <= value < 1"]),
    ],
)
def test_values_out_of_range_are_refused(raw: dict[str, Any], parts: list[str]) -> None:
    message = refusal(raw)
    assert all(part in message for part in [*parts, "'probe'", "out of range"]), message


@pytest.mark.parametrize("value", [0, 0.0, "1e-3", 3])
def test_as_number_accepts(value: Any) -> None:
    number = as_number("lr", value, NON_NEGATIVE)
    assert isinstance(number, float)
    assert number == float(value)


def test_as_number_keeps_none_only_where_it_may() -> None:
    assert as_number("lr", None, NON_NEGATIVE) is None
    with pytest.raises(InvalidOption, match="lr=None"):
        as_number("lr", None, NON_NEGATIVE, optional=False)


@pytest.mark.parametrize("value", [-1e-3, "-1", math.inf, math.nan, "fast", True, [1e-3], 10**400])
def test_as_number_refuses(value: Any) -> None:
    with pytest.raises(InvalidOption) as caught:
        as_number("lr", value, NON_NEGATIVE)
    assert str(caught.value).startswith(f"lr={value!r}")
    assert "0 <= value" in str(caught.value)


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "near"), [("beta", "'betas'"), ("rat", "'rate'"), ("mod", "'mode'")])
def test_unknown_keys_name_what_is_close_and_what_is_allowed(key: str, near: str) -> None:
    message = refusal({key: 1})
    assert f"'probe' has no option {key!r}. Did you mean {near}" in message
    assert all(str(info) in message for info in describe(Probe)), message


@pytest.mark.parametrize("key", [1, None, True])
def test_keys_that_are_no_strings_are_refused(key: Any) -> None:
    assert f"has no option {key!r}" in refusal({key: 1})


def test_a_row_without_options_says_so() -> None:
    @dataclass(frozen=True)
    class Empty(Options):
        pass

    assert refusal("a=1", Empty) == "'probe' has no option 'a'. It takes no options."


def test_required_options_are_demanded() -> None:
    message = refusal({}, Needy)
    assert "'probe' needs 'steps' in optim_args" in message
    assert "steps: int (required, 1 <= value)" in message
    assert parse(Needy, "steps=3", "probe").steps == 3


@pytest.mark.parametrize("name", NAMES)
def test_every_row_refuses_unknown_options_and_lists_its_own(name: str) -> None:
    with pytest.raises(InvalidOption) as caught:
        OptimConfig(name, optim_args="kahn_sum=1")
    message = str(caught.value)
    spec = REGISTRY[name]
    assert f"{name!r} has no option 'kahn_sum'" in message
    assert all(str(info) in message for info in describe(spec.options))


# --- betas -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "raw", "betas"),
    [
        ("adamw_torch", "beta1=0.8", (0.8, 0.999)),
        ("adamw_torch", "beta2=0.95", (0.9, 0.95)),
        ("adamw_torch", {"beta1": "0.8", "beta2": 0.95}, (0.8, 0.95)),
        ("lion_8bit", "beta2=0.95", (0.9, 0.95)),
        ("ademamix", "beta3=0.99", (0.9, 0.999, 0.99)),
        ("ademamix_8bit", "beta1=0.7,beta2=0.8,beta3=0.99", (0.7, 0.8, 0.99)),
        ("stable_adamw", "beta1=0.8", (0.8, 0.99)),
        ("schedule_free_adamw", "beta1=0.8", (0.8, 0.999)),
    ],
)
def test_single_betas_are_folded(name: str, raw: Any, betas: tuple[float, ...]) -> None:
    assert parse(REGISTRY[name].options, raw, name).betas == betas  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "raw", "parts"),
    [
        ("adamw_torch", "betas=(0.9, 0.95),beta1=0.8", ["both 'betas' and 'beta1'"]),
        ("ademamix", {"betas": (0.9, 0.95, 0.99), "beta2": 0.8, "beta3": 0.9}, ["both 'betas' and 'beta2', 'beta3'"]),
        ("adamw_torch", "beta3=0.99", ["no option 'beta3'", "'betas'"]),
        ("adamw_torch", "beta1=1.0", ["beta1='1.0'", "0 <= value < 1"]),
        ("adamw_torch", "beta1=None", ["beta1='None'"]),
        ("schedule_free_adamw", "beta1=0", ["betas=(0.0, 0.999)", "0 < value < 1"]),
        ("sgd", "beta1=0.9", ["no option 'beta1'", "momentum"]),
    ],
)
def test_wrong_single_betas_are_refused(name: str, raw: Any, parts: list[str]) -> None:
    with pytest.raises(InvalidOption) as caught:
        parse(REGISTRY[name].options, raw, name)
    assert all(part in str(caught.value) for part in parts), caught.value


# --- values that cannot work together --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "raw", "parts"),
    [
        ("sgd", "nesterov=True", ["nesterov=True", "momentum > 0"]),
        ("sgd", "nesterov=True,momentum=0.9,dampening=0.1", ["nesterov=True", "dampening = 0"]),
        ("rmsprop_bnb", "momentum=0.9", ["momentum=0.9", "optim='rmsprop'"]),
        ("rmsprop_bnb_8bit", "momentum=0.9", ["momentum=0.9", "optim='rmsprop'"]),
        ("rmsprop_bnb_32bit", "centered=True", ["centered=True", "optim='rmsprop'"]),
        ("ademamix", "t_beta3=10,beta1=0", ["t_beta3", "beta1", "0"]),
        ("paged_ademamix_8bit", "t_beta3=10,beta3=0", ["t_beta3", "beta3", "0"]),
        ("stable_adamw", "foreach=True,triton=True", ["foreach=True", "triton=True", "one of them"]),
        ("adafactor", "warmup_init=True", ["warmup_init=True", "add relative_step=True"]),
        ("galore_adafactor", "warmup_init=True", ["warmup_init=True", "add relative_step=True"]),
        ("grokadamw", "gradient_clipping=1.0", ["gradient_clipping=1", "Trainer(gradient_clip_val=1)"]),
        ("adamw_anyprecision", "variance_dtype=float16", ["eps=1e-08", "variance_dtype='bfloat16'"]),
        ("adamw_torch_4bit", "block_size=127", ["block_size=127", "even"]),
        ("adamw_torch_8bit", "block_size=255", ["block_size=255", "even"]),
        ("adamw_torch_4bit", "amsgrad=True", ["amsgrad=True", "'adamw_torch'"]),
        ("adamw_torch_8bit", "amsgrad=True", ["amsgrad=True", "'adamw_torch'"]),
    ],
)
def test_values_that_exclude_each_other_are_refused(name: str, raw: str, parts: list[str]) -> None:
    with pytest.raises(InvalidOption) as caught:
        OptimConfig(name, optim_args=raw)
    expected = [f"optim_args of {name!r}", *parts]
    assert all(part in str(caught.value) for part in expected), caught.value


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("sgd", "nesterov=True,momentum=0.9"),
        ("sgd", "dampening=0.1"),
        ("rmsprop_bnb", "momentum=0,centered=False"),
        ("ademamix", "beta1=0"),
        ("ademamix", "t_beta3=10"),
        ("adafactor", "warmup_init=True,relative_step=True"),
        ("grokadamw", "gradient_clipping=0"),
        ("adamw_anyprecision", "variance_dtype=float16,eps=1e-4"),
        ("stable_adamw", "foreach=True,triton=False"),
    ],
)
def test_their_permitted_neighbours_are_accepted(name: str, raw: str) -> None:
    parse(REGISTRY[name].options, raw, name)


# --- agreement with Hugging Face and with upstream -------------------------------------------------------------------

_KAHAN = {"max_lr": 1e-2, "decouple_lr": True, "kahan_sum": False}
_SCHEDULE_FREE = {"r": 1.0, "weight_lr_power": 1.0}
_ADEMAMIX = {"betas": (0.8, 0.95, 0.99), "alpha": 2.0, "t_alpha": 100, "t_beta3": 200, "eps": 1e-6}
_GALORE = {"rank": 64, "update_proj_gap": 100, "scale": 0.1, "proj_type": "reverse_std"}
_APOLLO_MINI = {"proj": "random", "rank": 1, "scale": 128.0, "scale_type": "tensor", "update_proj_gap": 200}
_GROKADAMW = {"alpha_init": 0.9, "lamb": 1.0, "gamma": 0.2, "grokking_signal_decay_rate": 0.3}
HF_STRINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": (
        "momentum=0.9, dampening=0, weight_decay=0.1, nesterov=yes",
        {"momentum": 0.9, "dampening": 0.0, "nesterov": True},
    ),
    "adagrad": ("lr_decay=0.1,weight_decay=0.1,eps=1e-6", {"lr_decay": 0.1, "eps": 1e-6}),
    "rmsprop": (
        "momentum=0.9,alpha=0.8,eps=1e-6,weight_decay=0.1,centered=True",
        {"momentum": 0.9, "alpha": 0.8, "eps": 1e-6, "centered": True},
    ),
    "adamw_torch_4bit": (
        "block_size=64,bf16_stochastic_round=True",
        {"block_size": 64, "bf16_stochastic_round": True},
    ),
    "adamw_torch_8bit": (
        "block_size=128,bf16_stochastic_round=False",
        {"block_size": 128, "bf16_stochastic_round": False},
    ),
    **dict.fromkeys(
        ("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
        ("beta1=0.8,beta2=0.95,beta3=0.99,alpha=2,t_alpha=100,t_beta3=200,eps=1e-6", _ADEMAMIX),
    ),
    **dict.fromkeys(
        ("rmsprop_bnb", "rmsprop_bnb_32bit", "rmsprop_bnb_8bit"),
        ("alpha=0.8,eps=1e-6,momentum=0,centered=False,weight_decay=0.1", {"alpha": 0.8, "eps": 1e-6}),
    ),
    "adamw_anyprecision": (
        "use_kahan_summation=True,momentum_dtype=bfloat16,variance_dtype=torch.bfloat16",
        {"use_kahan_summation": True, "momentum_dtype": "bfloat16", "variance_dtype": "bfloat16"},
    ),
    **dict.fromkeys(
        ("galore_adamw", "galore_adamw_8bit", "galore_adafactor"),
        ("rank=64, update_proj_gap=100, scale=0.10, proj_type=reverse_std", _GALORE),
    ),
    "apollo_adamw": ("proj=random,rank=1,scale=128.0,scale_type=tensor,update_proj_gap=200", _APOLLO_MINI),
    "grokadamw": ("alpha_init=0.9,lamb=1,gamma=0.2,grokking_signal_decay_rate=0.3", _GROKADAMW),
    "stable_adamw": ("max_lr=1e-2,decouple_lr=True,kahan_sum=False", _KAHAN),
    **dict.fromkeys(
        ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), ("r=1.0,weight_lr_power=1", _SCHEDULE_FREE)
    ),
}


@pytest.mark.parametrize("name", HF_STRINGS)
def test_hugging_face_strings_move_over_unchanged(name: str) -> None:
    text, expected = HF_STRINGS[name]
    config = OptimConfig(name, optim_args=text)
    options = parse(REGISTRY[name].options, config.optim_args, name)
    assert {key: getattr(options, key) for key in expected} == expected
    assert config.weight_decay == (0.1 if "weight_decay" in text else None)


def test_block_size_defaults_to_torchao_s_own() -> None:
    for name in ("adamw_torch_4bit", "adamw_torch_8bit", "adamw_torch_fp8"):
        upstream = inspect.signature(BY_NAME[name].load()).parameters["block_size"].default
        assert parse(REGISTRY[name].options, None, name).block_size == upstream  # type: ignore[attr-defined]
    assert inspect.signature(BY_NAME["adamw_torch_4bit"].load()).parameters["block_size"].default == 128


# Arguments of upstream constructors that no row offers, and why.
NOT_OFFERED = {
    "params": "the groups",
    "lr": "a separate argument",
    "weight_decay": "a separate argument",
    "warmup_steps": "a separate argument",
    "differentiable": "autograd through the step; Lightning steps under no_grad",
    "fused": "a row of its own: adamw_torch_fused",
    "args": "bitsandbytes: a namespace in place of keyword arguments",
    "optim_bits": "what param groups say",
    "stack_dims": "what param groups say: which parameters are stacks of matrices",
    "gradient_release": "optimi: stepping in backward, incompatible with a closure and so with Lightning",
}
# bitsandbytes ignores amsgrad, and min_8bit_size where states have 32 bits; torch refuses foreach beside fused.
# NorMuon is a row of its own.
NOT_OFFERED_BY = {
    "bitsandbytes.optim:AdamW": {"amsgrad"},
    "adamw_torch_fused": {"foreach"},
    "adamw": {"foreach"},
    "muon": {"normalize", "beta2"},
}
# stable_adamw: optimi has no default. Adafactor's is 1e-3 or, with relative_step, 1.
OWN_LR = {"stable_adamw": 1e-3, "adafactor": 1e-3, "galore_adafactor": 1e-3}

# What the paper fixes for one form of an algorithm.
OWN_DEFAULTS = {"apollo_mini": {"rank": 1, "scale": 128.0, "scale_type": "tensor"}}


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_options_and_defaults_are_upstream_s(case: Any) -> None:
    spec = REGISTRY[case.name]
    upstream = inspect.signature(case.load()).parameters
    ours = {info.name: info.default for info in describe(spec.options) if info.scope in ("group", "constructor")}
    # The class projects what has a rank, the row gives the target modules one.
    others = OWN_DEFAULTS.get(case.name, {"rank": 128} if spec.projects else {})
    assert ours == {name: upstream[name].default for name in ours} | others
    assert not spec.projects or upstream["rank"].default is None

    exempt = NOT_OFFERED_BY.get(case.upstream, set()) | NOT_OFFERED_BY.get(case.name, set())
    if spec.fixed.get("optim_bits") == 32:
        exempt = exempt | {"min_8bit_size"}
    assert set(upstream) - set(ours) - set(spec.fixed) <= set(NOT_OFFERED) | exempt

    empty = inspect.Parameter.empty
    default_lr = upstream["lr"].default
    assert spec.default_lr == (OWN_LR[case.name] if default_lr in (empty, None) else default_lr)
    assert spec.default_weight_decay == upstream["weight_decay"].default
    assert (spec.warmup == "optimizer") == ("warmup_steps" in upstream)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_call_their_options_lr_scheduler_args(name: str) -> None:
    with pytest.raises(InvalidOption, match="no option 'speed'"):
        parse(SCHEDULES[name].options, "speed=1", name)
    with pytest.raises(InvalidOption, match="lr_scheduler_args=3"):
        parse(SCHEDULES[name].options, 3, name)  # type: ignore[arg-type]


def test_numbers_of_numpy_and_any_sequence_are_welcome() -> None:
    from collections import UserList

    import numpy as np

    config = OptimConfig("adamw_torch", lr=np.float32(0.5), optim_args={"betas": UserList([np.float64(0.5), 0.25])})
    assert config.lr == 0.5
    assert parse(REGISTRY["adamw_torch"].options, config.optim_args, "x").betas == (0.5, 0.25)
    assert OptimConfig("adamw_torch", lr_scheduler="linear", warmup_steps=np.int64(3)).warmup_steps == 3
    assert parse(REGISTRY["adamw_torch_8bit"].options, {"block_size": np.int32(128)}, "x").block_size == 128
