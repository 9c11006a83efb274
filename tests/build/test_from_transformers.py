"""From Hugging Face's arguments: every one has a row, what is written builds the optimizer that is built there."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.optim import Optimizer
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames

from lightning_optim import (
    Conversion,
    InvalidOption,
    OptimConfig,
    UnknownOptimizer,
    build_optimizer,
    convert_training_arguments,
)
from lightning_optim.build import DIALECTS, PLACES, TRAINING_ARGUMENTS
from tests.hugging_face import Arguments, trainer_of
from tests.models import TokenModel

FIELDS = {field.name: field for field in dataclasses.fields(transformers.TrainingArguments)}


def remarks(conversion: Conversion, kind: str = "") -> dict[str, str]:
    found = [remark for remark in conversion.remarks if kind in ("", remark.kind)]
    return {name: remark.text for remark in found for name in remark.values}


# --- the rows --------------------------------------------------------------------------------------------------------


def test_every_argument_has_a_row() -> None:
    missing = FIELDS.keys() - TRAINING_ARGUMENTS.keys()
    assert not missing, (
        f"transformers {transformers.__version__} has arguments without a row: {', '.join(sorted(missing))}. Add them "
        "to lightning_optim/build/_training_arguments.py, each with its counterpart, or with 'none' and what there is "
        "instead."
    )
    dropped = {name for name, row in TRAINING_ARGUMENTS.items() if not row.former} - FIELDS.keys()
    assert not dropped, (
        f"transformers {transformers.__version__} has dropped {', '.join(sorted(dropped))}: mark the rows as former."
    )
    back = {name for name, row in TRAINING_ARGUMENTS.items() if row.former} & FIELDS.keys()
    assert not back, f"rows that are no longer former: {', '.join(sorted(back))}"


def test_defaults_are_those_of_the_installed_transformers() -> None:
    wrong = {}
    for name, field in FIELDS.items():
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        default = getattr(default, "value", default)
        if TRAINING_ARGUMENTS[name].default != default:
            wrong[name] = (TRAINING_ARGUMENTS[name].default, default)
    assert not wrong, f"(row, transformers {transformers.__version__}): {wrong}"


def test_what_post_init_puts_in_asks_for_nothing() -> None:
    # With accelerate it makes such an object, and to_dict() a mapping of it.
    made = Arguments().to_dict() | {"accelerator_config": AcceleratorConfig().to_dict()}
    assert [name for name, value in made.items() if not TRAINING_ARGUMENTS[name].is_quiet(value)] == []


def test_rows_say_where_and_what() -> None:
    for row in TRAINING_ARGUMENTS.values():
        assert row.place in PLACES
        assert row.here
        assert row.is_quiet(row.default)


#: Values of arguments that are read, other than their defaults. Those of others do not matter.
VALUES: dict[str, Any] = {
    "optim": "sgd",
    "optim_args": "momentum=0.5",
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 0.25},
    "report_to": "wandb",
    "eval_strategy": "steps",
    "evaluation_strategy": "epoch",
    "disable_tqdm": True,
    "save_strategy": "epoch",
    "logging_strategy": "epoch",
    "metric_for_best_model": "accuracy",
}


@pytest.mark.parametrize("name", TRAINING_ARGUMENTS)
def test_no_argument_is_lost(name: str) -> None:
    row = TRAINING_ARGUMENTS[name]
    number = (row.default or 0) + 3 if isinstance(row.default, (int, float)) else 3
    value = VALUES.get(name, not row.default if isinstance(row.default, bool) else number)
    assert not row.is_quiet(value)
    given = {"lr_scheduler_type": "cosine"} if name == "lr_scheduler_kwargs" else {}
    if name == "optim_args":
        given = {"optim": "sgd"}
    conversion = convert_training_arguments(given | {name: value})
    assert name in conversion.written or name in remarks(conversion)
    assert name not in conversion.silent
    # At the default it is written or asks for nothing, but for what shapes the training.
    if row.default is not None:
        conversion = convert_training_arguments({name: row.default})
        assert (name in conversion.written) + (name in conversion.silent) + (name in remarks(conversion)) == 1


# --- what is written builds the same optimizer -----------------------------------------------------------------------

# Packages or devices that are not here.
NOT_HERE = {"adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision"}
NEEDS_CUDA = {"adalomo": (RuntimeError, AssertionError)}
OPTIM_ARGS = {
    "sgd": "momentum=0.5,nesterov=true,weight_decay=0.5",
    "adagrad": "lr_decay=0.25,eps=1e-5",
    "rmsprop": "momentum=0.25,alpha=0.75,centered=true",
    "ademamix": "beta1=0.7,beta3=0.99,alpha=4.0,t_alpha=7",
    "galore_adamw": "rank=4,scale=0.5,update_proj_gap=3,proj_type=reverse_std",
    "galore_adafactor": "rank=4",
    "apollo_adamw": "rank=4,scale=2.0,proj=svd,scale_type=tensor",
    "grokadamw": "lamb=3.0,gamma=0.25",
    "stable_adamw": "decouple_lr=true,max_lr=0.5",
    "schedule_free_adamw": "r=0.5,weight_lr_power=1.0",
    "adamw_torch_8bit": "",
    "adamw_torch": "betas=0.1",
}
HYPERPARAMETERS = (
    *("lr", "weight_decay", "betas", "eps", "momentum", "nesterov", "dampening", "lr_decay", "alpha", "centered"),
    *("rank", "scale", "update_proj_gap", "proj_type", "proj", "scale_type", "max_lr", "decouple_lr", "r"),
    *(
        "weight_lr_power",
        "warmup_steps",
        "t_alpha",
        "t_beta3",
        "scale_parameter",
        "relative_step",
        "alpha_init",
        "lamb",
    ),
    *("gamma", "clip_threshold", "decay_rate", "beta1", "warmup_init", "use_kahan_summation"),
)


def by_parameter(model: torch.nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    return {name: groups[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("optim", [one.value for one in OptimizerNames if not one.value.endswith("layerwise")])
def test_every_optimizer_gets_what_it_gets_there(optim: str) -> None:
    args = Arguments(
        optim=optim,
        learning_rate=0.003,
        weight_decay=0.125,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-5,
        optim_args=OPTIM_ARGS.get(optim),
        optim_target_modules=["linear"],
    )
    conversion = convert_training_arguments(args)
    OptimConfig(**conversion.optim)
    if optim in NOT_HERE:
        return
    model, other = TokenModel(), TokenModel()
    try:
        reference = trainer_of(other, copy.copy(args)).create_optimizer()
    except NEEDS_CUDA.get(optim, ()):
        return
    if optim in ("lomo", "adalomo"):
        assert (conversion.optim["lr"], conversion.optim.get("weight_decay")) == (0.003, None)
        assert (reference.lr, getattr(reference, "weight_decay", 0.0) or 0.0) == (0.003, 0.0)
        return
    arguments = {
        name: value for name, value in conversion.optim.items() if name not in ("lr_scheduler", "warmup_steps")
    }
    optimizer = build_optimizer(model, **arguments)
    ours, compared = by_parameter(model, optimizer), set()
    for name, group in by_parameter(other, reference).items():
        # APOLLO's betas and epsilon do not reach other parameters there, which the remark says.
        keys = {"betas", "eps"} if optim == "apollo_adamw" and "rank" not in group else set()
        if optim == "galore_adamw_8bit" and name.endswith(("bias", "norm.weight")):
            keys = {"weight_decay"}  # So does its remark.
        for key in set(HYPERPARAMETERS) & group.keys() & ours[name].keys() - keys:
            expected, found = group[key], ours[name][key]
            if key == "eps" and found is None:  # That of the class, by match_galore_torch.
                found = 1e-6 if ours[name]["match_galore_torch"] else 1e-8
            assert found == (tuple(expected) if isinstance(expected, list) else expected), (name, key)
            compared.add(key)
        assert ("rank" in group) <= ("rank" in ours[name])
    assert compared >= {"lr", "weight_decay"}
    for attribute in ("block_size", "bf16_stochastic_round"):
        assert getattr(optimizer, attribute, None) == getattr(reference, attribute, None)


@pytest.mark.parametrize("optim", [one.value for one in OptimizerNames if one.value.endswith("layerwise")])
def test_layerwise_optimizers_are_not_clipped_as_there(optim: str) -> None:
    conversion = convert_training_arguments({"optim": optim, "optim_target_modules": ["linear"]})
    assert conversion.optim["optim"] == optim
    assert "gradient_clip_val" not in conversion.trainer
    assert "is not clipped there" in remarks(conversion, "unused")["max_grad_norm"]


# --- what it writes --------------------------------------------------------------------------------------------------


def test_hugging_faces_defaults_are_written_out() -> None:
    conversion = convert_training_arguments({"do_train": True})
    assert conversion.config == {
        "seed_everything": 42,
        "optim": "adamw_torch_fused",
        "lr": 5e-5,
        "weight_decay": 0.0,
        "lr_scheduler": "linear",
        "trainer": {"max_epochs": 3, "gradient_clip_val": 1.0},
    }
    assert remarks(conversion, "yours")["per_device_train_batch_size"] == "DataLoader(batch_size=...) of your data"


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "numbers as texts": ({"learning_rate": "2e-5", "warmup_steps": "10"}, {"lr": 2e-5, "warmup_steps": 10}, {}),
    "fraction": ({"warmup_steps": 0.1}, {"warmup_steps": 0.1}, {}),
    "ratio": ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}, {}),
    "steps before ratio": ({"warmup_ratio": 0.1, "warmup_steps": 7.0}, {"warmup_steps": 7}, {}),
    "no warm-up there": ({"lr_scheduler_type": "constant", "warmup_steps": 7}, {"lr_scheduler": "constant"}, {}),
    "kwargs as JSON": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'},
        {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": {"min_lr_rate": 0.1}},
        {},
    ),
    "plateau": (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "metric_for_best_model": "eval_f1"},
        {"lr_scheduler": "reduce_lr_on_plateau", "lr_scheduler_args": {"monitor": "f1"}},
        {},
    ),
    "betas": ({"adam_beta2": 0.95, "adam_epsilon": 1e-6}, {"optim_args": {"betas": (0.9, 0.95), "eps": 1e-6}}, {}),
    "steps": ({"max_steps": 100, "num_train_epochs": 9}, {}, {"max_steps": 100}),
    "no clipping": ({"max_grad_norm": 0}, {}, {"max_epochs": 3}),
    "adafactor": ({"adafactor": True}, {"optim": "adafactor"}, {}),
    "dropped": ({"optim": "adamw_hf"}, {"optim": "adamw_torch"}, {}),
    "bf16": ({"bf16": True}, {}, {"precision": "bf16-mixed"}),
    "fp16": ({"fp16": True, "no_cuda": True}, {}, {"precision": "16-mixed", "accelerator": "cpu"}),
    "determinism": ({"full_determinism": True, "disable_tqdm": True}, {}, {"deterministic": True}),
    "validation": (
        {"eval_strategy": "steps", "eval_steps": 50, "gradient_accumulation_steps": 4},
        {},
        {"accumulate_grad_batches": 4, "val_check_interval": 200, "check_val_every_n_epoch": None},
    ),
    "validation as often as logs": (
        {"evaluation_strategy": "steps", "logging_steps": 20},
        {},
        {"val_check_interval": 20, "check_val_every_n_epoch": None, "log_every_n_steps": 20},
    ),
    "parts": ({"max_steps": 90, "logging_steps": 0.25}, {}, {"max_steps": 90, "log_every_n_steps": 23}),
    "nothing else": (
        {"eval_strategy": "no", "save_strategy": "no", "report_to": "none", "output_dir": "out"},
        {},
        {"limit_val_batches": 0, "enable_checkpointing": False, "logger": False, "default_root_dir": "out"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_arguments_and_their_counterparts(case: str) -> None:
    given, optim, trainer = CASES[case]
    conversion = convert_training_arguments(given)
    assert {name: conversion.optim.get(name) for name in optim} == optim
    assert {name: conversion.trainer.get(name) for name in trainer} == trainer
    assert ("warmup_steps" in conversion.optim) == ("warmup_steps" in optim)
    assert OptimConfig(**conversion.optim).lr == conversion.optim["lr"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"save_steps": 100}, {"every_n_train_steps": 100, "save_top_k": -1}),
        (
            {"save_steps": 100, "save_total_limit": 2, "save_only_model": True},
            {
                **{"every_n_train_steps": 100, "save_top_k": 2, "monitor": "step", "mode": "max"},
                "save_weights_only": True,
            },
        ),
        (
            {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True, "save_total_limit": 1},
            {"every_n_epochs": 1, "save_top_k": 1, "monitor": "val_loss", "mode": "min"},
        ),
        (
            {"save_strategy": "best", "metric_for_best_model": "accuracy"},
            {"save_top_k": 1, "monitor": "accuracy", "mode": "max"},
        ),
    ],
)
def test_checkpoints(given: dict[str, Any], expected: dict[str, Any]) -> None:
    conversion = convert_training_arguments(given)
    assert conversion.checkpoint == expected
    (callback,) = conversion.config["trainer"]["callbacks"]
    assert callback == {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": expected}


@pytest.mark.parametrize(
    ("given", "kind", "name", "text"),
    [
        ({"num_train_epochs": 2.5}, "differs", "num_train_epochs", "2.5 times the optimizer steps of an epoch"),
        ({"gradient_accumulation_steps": 2}, "differs", "gradient_accumulation_steps", "num_items_in_batch"),
        ({"lr_scheduler_type": "greedy"}, "none", "lr_scheduler_type", "no such schedule here"),
        ({"optim": "schedule_free_adamw"}, "differs", "lr_scheduler_type", "here, it has no schedule"),
        ({"optim": "adamw_torch", "optim_args": "rank=4"}, "unused", "optim_args", "does not read rank there"),
        ({"optim": "sgd", "optim_args": "weight_decay=0.1"}, "unused", "optim_args", "weight_decay overrules"),
        ({"optim": "grokadamw", "optim_args": "gradient_clipping=2"}, "none", "optim_args", "no gradient_clipping"),
        ({"optim": "stable_adamw", "optim_args": "kahan_sum=False"}, "differs", "optim_args", "true there"),
        ({"optim": "sgd", "adam_beta1": 0.5}, "unused", "adam_beta1", "does not reach sgd"),
        ({"optim": "galore_adamw", "weight_decay": 0.5}, "unused", "weight_decay", "does not reach galore_adamw"),
        ({"optim": "galore_adamw"}, "differs", "optim", "1e-6 added to the uncorrected denominator"),
        ({"save_steps": 0.1}, "yours", "save_steps", "write a number of steps"),
        ({"deepspeed": "ds.json"}, "yours", "deepspeed", "deepspeed_stage_2"),
        ({"base_model": "x", "bf16": True, "bfloat16": True}, "unused", "bfloat16", "written twice"),
        ({"optim": "adamw_torch", "learnig_rate": 1}, "unknown", "learnig_rate", "did you mean learning_rate?"),
    ],
)
def test_what_differs_is_said(given: dict[str, Any], kind: str, name: str, text: str) -> None:
    assert text in remarks(convert_training_arguments(given), kind)[name]


def test_secrets_are_not_shown() -> None:
    secrets = {"hub_token": "secret!", "wandb": {"api_key": "secret!"}, "hf_hub_token": "secret!"}
    conversion = convert_training_arguments({"optim": "sgd", **secrets})
    assert "secret!" not in repr(conversion)
    assert secrets.keys() <= remarks(conversion).keys()


# --- whose arguments -------------------------------------------------------------------------------------------------


def test_an_object_is_read_by_its_attributes() -> None:
    args = Arguments(learning_rate=1e-3, lr_scheduler_type="cosine", save_steps=10, warmup_steps=0.1)
    conversion = convert_training_arguments(args)
    assert (
        conversion.config
        == convert_training_arguments(
            {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "save_steps": 10, "warmup_steps": 0.1}
        ).config
    )
    # What nobody has chosen is no remark, whatever __post_init__ makes of it.
    assert {name for remark in conversion.remarks for name in remark.values} == {"per_device_train_batch_size"}
    assert set(conversion.written) | set(conversion.silent) | {"per_device_train_batch_size"} >= FIELDS.keys() - {
        name for name, field in FIELDS.items() if field.default is None
    }
    assert torch.typename(conversion.optim["optim"]) == "str"


@dataclasses.dataclass
class Subclass(Arguments):
    """As those of TRL: other defaults, and arguments of its own."""

    learning_rate: float = 2e-5
    packing: bool = False
    max_length: int = 1024


def test_subclasses_have_defaults_of_their_own() -> None:
    conversion = convert_training_arguments(Subclass(max_length=99))
    assert conversion.optim["lr"] == 2e-5
    assert remarks(conversion, "unknown") == {"max_length": ""}


def test_optim_config_from_transformers() -> None:
    args = Arguments(optim="lion_8bit", learning_rate=1e-4, weight_decay=0.1, lr_scheduler_type="cosine")
    expected = OptimConfig(
        "lion_8bit", lr=1e-4, weight_decay=0.1, optim_args={"betas": (0.9, 0.999)}, lr_scheduler="cosine"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert OptimConfig.from_transformers(args) == expected
        assert OptimConfig.from_transformers(args.to_dict()) == expected
    with pytest.warns(UserWarning, match="no such schedule here"):
        OptimConfig.from_transformers({"lr_scheduler_type": "greedy"})


AXOLOTL = """
base_model: NousResearch/Meta-Llama-3-8B
datasets:
  - path: mhenrichsen/alpaca_2k_test
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
learning_rate: 2e-4
bf16: auto
tf32: false
resume_from_checkpoint:
evals_per_epoch: 4
cosine_min_lr_ratio: 0.1
"""
LLAMA_FACTORY = """
finetuning_type: full
do_train: true
pure_bf16: true
use_galore: true
galore_rank: 128
per_device_train_batch_size: 1
learning_rate: 1.0e-5
lr_scheduler_type: cosine
warmup_ratio: 0.1
eval_strategy: steps
eval_steps: 500
"""


def test_axolotl(tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(AXOLOTL)
    conversion = convert_training_arguments(tmp_path / "config.yml")
    assert conversion.dialect == "axolotl"
    assert conversion.config == {
        "seed_everything": 42,
        "optim": "adamw_bnb_8bit",
        "lr": 2e-4,
        "weight_decay": 0.0,
        "lr_scheduler": "cosine",
        "warmup_steps": 0.03,
        "trainer": {
            **{"max_epochs": 4, "gradient_clip_val": 1.0, "accumulate_grad_batches": 4, "precision": "bf16-mixed"},
        },
    }
    assert set(remarks(conversion, "yours")) == {"micro_batch_size", "tf32", "evals_per_epoch", "cosine_min_lr_ratio"}
    assert set(remarks(conversion, "unknown")) == {"base_model", "datasets"}


def test_llama_factory(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text(LLAMA_FACTORY)
    conversion = convert_training_arguments(str(tmp_path / "sft.yaml"))
    assert (conversion.dialect, conversion.optim["lr_scheduler"]) == ("LLaMA-Factory", "cosine")
    said = remarks(conversion, "yours")
    assert said["pure_bf16"] == "trainer.precision: bf16-true"
    assert "galore_adamw" in said["use_galore"]
    assert "rank in optim_args" in said["galore_rank"]


def test_hints_name_what_there_is() -> None:
    for dialect in DIALECTS:
        assert set(dialect.renamed.values()) | dialect.defaults.keys() <= TRAINING_ARGUMENTS.keys()
        assert not dialect.hints.keys() & TRAINING_ARGUMENTS.keys()


# --- mistakes, and files that nobody should trust --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"learning_rate": "fast"}, "learning_rate='fast' is no float"),
        ({"max_steps": 1.5}, "max_steps=1.5 is no int"),
        ({"bf16": "maybe"}, "bf16='maybe' is no bool"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are both set"),
        ({"lr_scheduler_kwargs": "num_cycles"}, "lr_scheduler_kwargs='num_cycles' is no mapping"),
        ({"optim": "sophia"}, "no optimizer 'sophia'"),
        ({"optim": "sgd", "optim_args": "momentum=high"}, "momentum='high'"),
        ({"base_model": "x", "num_epochs": 1, "num_train_epochs": 2}, "'num_train_epochs' and 'num_epochs'"),
        ({"model": "x"}, "no key of TrainingArguments"),
        ({"compute_environment": "LOCAL_MACHINE", "use_cpu": True}, "is a configuration of accelerate"),
        ({}, "It is empty"),
        (3, "no TrainingArguments, no mapping and no path"),
    ],
)
def test_mistakes(given: Any, text: str) -> None:
    with pytest.raises((InvalidOption, UnknownOptimizer)) as caught:
        convert_training_arguments(given)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("tag.yaml", "optim: !!python/object/apply:os.mkdir [made]\n", "no plain YAML"),
        ("module.yaml", "optim: made.by.a.file.Best\n", "what a file names is not imported"),
        ("layerwise.yaml", "optim: made.Best_layerwise\n", "what a file names is not imported"),
        ("training_args.bin", "", "is a pickle"),
        ("list.yaml", "- optim\n", "holds no mapping"),
        ("broken.json", "{", "no JSON"),
        ("deep.json", '{"optim": ' + "[" * 100_000, "no JSON"),
        ("binary.yaml", "\x00", "no plain YAML"),
        ("endless.yaml", "optim: &a [*a]\n", "no plain YAML"),
    ],
)
def test_a_file_is_only_read(
    name: str, content: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "made.py").write_text("open('made', 'w')\n")
    Path(name).write_text(content)
    with pytest.raises(InvalidOption, match=text):
        convert_training_arguments(name)
    assert not Path("made").exists()
    assert "made" not in sys.modules


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(InvalidOption, match=r"cannot read nowhere\.yaml: No such file"):
        convert_training_arguments("nowhere.yaml")


def test_json_of_transformers_is_read(tmp_path: Path) -> None:
    args = Arguments(learning_rate=1e-3, fp16=True, hub_token="hf_secret")
    (tmp_path / "args.json").write_text(args.to_json_string())
    conversion = convert_training_arguments(tmp_path / "args.json")
    assert (conversion.optim["lr"], conversion.trainer["precision"]) == (1e-3, "16-mixed")
    # There it validates never and saves every 500 steps.
    assert conversion.trainer["limit_val_batches"] == 0
    assert conversion.checkpoint == {"every_n_train_steps": 500, "save_top_k": -1}
    assert json.loads(json.dumps(conversion.config)) == conversion.config
