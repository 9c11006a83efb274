"""OptimCLI and plain LightningCLI: arguments parsed, runs made, files written for real."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from lightning_optim import FSDP2Strategy, LayerwiseDDPStrategy, LayerwiseFSDP2Strategy, LayerwiseStrategy, OptimCLI
from tests.models import ForeignTokens, LitTokens, loader
from tests.processes import run_fresh


class WithoutOptimizer(ForeignTokens):
    configure_optimizers = L.LightningModule.configure_optimizers


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(batches=2, seed=1)

    test_dataloader = predict_dataloader = val_dataloader


class Overrides(OptimCLI):
    """A user's own CLI, which does not call super()."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--note", default="", type=str)


class OwnDefaults(LitTokens):
    """A module with OptimMixin and other defaults than the mixin's."""

    def __init__(self, lr: float = 0.125, warmup_steps: int = 0, **kwargs: Any) -> None:
        super().__init__(lr=lr, warmup_steps=warmup_steps, **kwargs)


class OwnRate(ForeignTokens):
    """A module without OptimMixin that happens to have arguments of the same names."""

    def __init__(self, lr: float = 0.125, optim: str = "mine") -> None:
        super().__init__()


KINDS: dict[str, tuple[type[LightningCLI], Any]] = {
    "mixin": (OptimCLI, LitTokens),
    "foreign": (OptimCLI, ForeignTokens),
    "bare": (OptimCLI, WithoutOptimizer),
    "any": (OptimCLI, None),
    "overrides": (Overrides, LitTokens),
    "plain": (LightningCLI, LitTokens),
    "own defaults": (OptimCLI, OwnDefaults),
    "own rate": (OptimCLI, OwnRate),
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])


def run(kind: str, *arguments: str) -> LightningCLI:
    cli_class, model = KINDS[kind]
    defaults = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return cli_class(model, Data, args=list(arguments), trainer_defaults=defaults, seed_everything_default=1)


def optimizer_of(cli: LightningCLI) -> str:
    return type(cli.trainer.optimizers[0]).__name__


def groups_of(cli: LightningCLI) -> dict[str, dict[str, Any]]:
    keys = ("lr", "initial_lr", "weight_decay", "betas", "eps")
    groups = cli.trainer.optimizers[0].param_groups
    return {group["name"]: {key: group[key] for key in keys if key in group} for group in groups}


def weights_of(cli: LightningCLI) -> float:
    return sum(parameter.double().sum().item() for parameter in cli.model.parameters())


FAST = ("--trainer.max_steps", "4", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false")


@pytest.mark.parametrize("kind", ["mixin", "foreign", "bare", "overrides"])
def test_optim_and_its_options_reach_any_module(kind: str) -> None:
    cli = run(
        *(kind, "fit", "--optim", "lion_8bit", "--lr", "1e-4", "--optim_args.betas", "[0.9, 0.95]"),
        *("--weight_decay", "0.1", "--param_groups", "{'model.head.*': {'lr': 1e-5}}", *FAST),
    )
    assert optimizer_of(cli) == "Lion"
    groups = groups_of(cli)
    assert {group["betas"] for group in groups.values()} == {(0.9, 0.95)}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "decay/32bit": (1e-4, 0.1),
        "decay": (1e-4, 0.1),
        "model.head.*/decay": (1e-5, 0.1),
        "no_decay": (1e-4, 0.0),
        "model.head.*/no_decay": (1e-5, 0.0),
    }


@pytest.mark.parametrize("kind", ["mixin", "foreign"])
def test_a_pattern_names_another_optimizer(kind: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    part = {"optim": "adamw_8bit", "lr": 0.01, "betas": [0.8, 0.95]}
    config.write_text(yaml.safe_dump({"optim": "sgd", "lr": 0.1, "param_groups": {"model.head.*": part}}))
    by_flag = run(kind, "fit", "--optim", "sgd", "--lr", "0.1", "--param_groups", str({"model.head.*": part}), *FAST)
    by_file = run(kind, "fit", "--config", str(config), *FAST, "--trainer.default_root_dir", str(tmp_path / "file"))
    assert optimizer_of(by_flag) == optimizer_of(by_file) == "Composite"
    assert groups_of(by_flag) == groups_of(by_file)
    assert groups_of(by_file)["model.head.*/decay"]["betas"] == (0.8, 0.95)
    assert weights_of(by_flag) == weights_of(by_file)


@pytest.mark.parametrize("options", [("--optim_args.eps", "1e-6"), ("--optim_args", "eps=1e-6,amsgrad=True")])
def test_options_one_by_one_or_as_a_string(options: tuple[str, ...]) -> None:
    cli = run("mixin", "fit", "--optim", "adamw_torch", *options, *FAST)
    assert {group["eps"] for group in groups_of(cli).values()} == {1e-6}


def test_the_saved_config_reproduces_the_run(tmp_path: Path) -> None:
    first = run(
        *("mixin", "fit", "--optim", "schedule_free_adamw", "--lr", "0.03", "--warmup_steps", "0.25"),
        *("--optim_args.weight_lr_power", "1.5", "--trainer.max_steps", "6", "--trainer.default_root_dir", "first"),
    )
    (config,) = (tmp_path / "first").rglob("config.yaml")
    saved = yaml.safe_load(config.read_text())
    expected = ("schedule_free_adamw", 0.03, {"weight_lr_power": 1.5}, 0.25)
    assert (saved["optim"], saved["lr"], saved["optim_args"], saved["warmup_steps"]) == expected
    second = run("mixin", "fit", "--config", str(config), "--trainer.default_root_dir", "second")
    assert weights_of(first) == weights_of(second)
    assert groups_of(first) == groups_of(second)
    # A later argument changes it, as everywhere in LightningCLI.
    third = run("mixin", "fit", "--config", str(config), "--lr", "0.5", "--trainer.default_root_dir", "third")
    assert {group["lr"] for group in groups_of(third).values()} == {0.5}


def test_a_checkpoint_remembers_what_trained_it(tmp_path: Path) -> None:
    arguments = ("mixin", "fit", "--optim", "lion_8bit", "--lr", "1e-4")
    run(*arguments, "--trainer.max_steps", "2", "--trainer.default_root_dir", "first")
    (path,) = tmp_path.rglob("*.ckpt")
    hyperparameters = torch.load(path, weights_only=True)["hyper_parameters"]
    assert (hyperparameters["optim"], hyperparameters["lr"]) == ("lion_8bit", 1e-4)
    assert LitTokens.load_from_checkpoint(path).optim_config.optim == "lion_8bit"
    again = run(*arguments, "--ckpt_path", str(path), "--trainer.max_steps", "4", *FAST[2:])
    assert optimizer_of(again) == "Lion"
    assert again.trainer.global_step == 4


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_a_config_serves_every_subcommand(tmp_path: Path, subcommand: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("optim: lion_8bit\nlr: 1e-4\noptim_args:\n  betas: [0.9, 0.95]\n")
    cli = run("mixin", subcommand, "--config", str(config), "--trainer.logger", "false")
    assert cli.model.optim_config.optim_args == {"betas": [0.9, 0.95]}


def test_model_chosen_by_name() -> None:
    model = ("--model", "tests.models.LitTokens", "--model.width", "32")
    cli = run("any", "fit", *model, "--optim", "sgd", *FAST)
    assert (optimizer_of(cli), cli.model.hparams.width) == ("SGD", 32)


@pytest.mark.parametrize("kind", ["own defaults", "own rate", "any"])
def test_defaults_of_the_model_are_no_obstacle(kind: str) -> None:
    model = ("--model", "tests.trainer.test_cli.OwnDefaults") if kind == "any" else ()
    cli = run(kind, "fit", *model, "--optim", "sgd", "--trainer.default_root_dir", "x", *FAST)
    assert optimizer_of(cli) == "SGD"
    # What is not given is the optimizer's default, not the one that the model has for its own optimizer.
    assert {group["lr"] for group in groups_of(cli).values()} == {1e-3}
    if kind != "own rate":
        assert (cli.model.hparams["optim"], cli.model.hparams["lr"]) == ("sgd", None)


def test_plain_lightning_cli_offers_the_models_arguments() -> None:
    cli = run(
        *("plain", "fit", "--model.optim", "rmsprop", "--model.lr", "0.02", "--model.optim_args", "{momentum: 0.5}"),
        *("--model.lr_scheduler", "linear", *FAST),
    )
    assert optimizer_of(cli) == "RMSprop"
    assert {group["initial_lr"] for group in groups_of(cli).values()} == {0.02}


def test_without_optim_the_module_decides() -> None:
    cli = run("foreign", "fit", "--trainer.default_root_dir", "first", *FAST)
    assert optimizer_of(cli) == "SGD"
    cli = run("mixin", "fit", "--model.optim", "adagrad", "--trainer.default_root_dir", "second", *FAST)
    assert optimizer_of(cli) == "Adagrad"


def test_lightnings_own_optimizer_arguments_still_work() -> None:
    cli = run(
        *("foreign", "fit", "--optimizer", "torch.optim.Adam", "--optimizer.lr", "0.25"),
        *("--torch_lr_scheduler", "StepLR", "--torch_lr_scheduler.step_size", "100", *FAST),
    )
    assert optimizer_of(cli) == "Adam"
    assert cli.trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.25


MISTAKES: dict[str, tuple[str, list[str], list[str]]] = {
    "name": ("mixin", ["--optim", "loin_8bit"], ["no optimizer 'loin_8bit'", "Close names: 'lion_8bit'"]),
    "no such name": ("mixin", ["--optim", "adamw_hf"], ["no optimizer 'adamw_hf'", "lightning-optim list"]),
    "option": ("foreign", ["--optim", "sgd", "--optim_args.momentun", "0.9"], ["no option 'momentun'", "'momentum'"]),
    "range": ("foreign", ["--optim", "sgd", "--optim_args.momentum", "-1"], ["momentum=-1", "0 <= value"]),
    "lr": ("foreign", ["--optim", "sgd", "--lr", "-1"], ["lr=-1", "out of range"]),
    "schedule": ("foreign", ["--optim", "sgd", "--lr_scheduler", "cosin"], ["no lr_scheduler 'cosin'", "'cosine'"]),
    "warmup": ("foreign", ["--optim", "sgd", "--warmup_steps", "5"], ["warmup_steps=5", "Add lr_scheduler="]),
    "lr alone": ("foreign", ["--lr", "0.1"], ["--lr needs --optim", "--optim adamw_torch"]),
    "lr of a mixin": ("mixin", ["--lr", "0.1"], ["--lr needs --optim", "--model.lr"]),
    "twice": (
        "mixin",
        ["--optim", "sgd", "--model.optim", "adagrad"],
        ["--optim sgd together with --model.optim adagrad", "Write --optim, or leave --optim out"],
    ),
    "half and half": (
        "mixin",
        ["--optim", "sgd", "--model.lr", "1e-2"],
        ["--optim sgd together with --model.lr 0.01: the latter would be ignored", "Write --lr"],
    ),
    "half and half by name": (
        "any",
        ["--model", "tests.trainer.test_cli.OwnDefaults", "--model.lr", "0.5", "--optim", "sgd"],
        ["--optim sgd together with --model.lr 0.5: the latter would be ignored", "Write --lr"],
    ),
    "optimizer": (
        "foreign",
        ["--optim", "sgd", "--optimizer", "torch.optim.Adam"],
        ["--optim sgd together with --optimizer torch.optim.Adam", "Keep --optim NAME"],
    ),
    "scheduler": (
        "foreign",
        ["--optim", "sgd", "--torch_lr_scheduler", "StepLR", "--torch_lr_scheduler.step_size", "1"],
        ["--optim sgd together with --torch_lr_scheduler", "--lr_scheduler NAME"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_exit_with_2_before_anything_is_built(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, arguments, parts = MISTAKES[mistake]
    built: list[str] = []
    monkeypatch.setattr(L.LightningModule, "__init__", lambda self, *_: built.append(type(self).__name__))
    with pytest.raises(SystemExit) as exit_info:
        run(kind, "fit", *arguments, *FAST)
    assert exit_info.value.code == 2
    printed = " ".join(capsys.readouterr().err.split())
    for part in parts:
        assert part in printed
    assert re.search(r"See: lightning-optim explain LO\d{3}$", printed), printed
    assert not built
    assert not list(tmp_path.iterdir())


def test_help_and_print_config_show_the_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("foreign", "fit", "--help")
    printed = capsys.readouterr().out
    for argument in (
        "--optim ",
        "--optim_target_modules",
        "--optim_args",
        "--lr_scheduler",
        "--warmup_steps",
        "--param_groups",
        "--layer_decay",
    ):
        assert argument in printed
    with pytest.raises(SystemExit):
        run("foreign", "fit", "--optim", "sgd", "--print_config")
    printed_config = yaml.safe_load(capsys.readouterr().out)
    assert (printed_config["optim"], printed_config["lr"]) == ("sgd", None)


def test_as_a_program(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "from lightning_optim import OptimCLI\n"
        "from tests.models import LitTokens\n"
        "from tests.trainer.test_cli import Data\n"
        "OptimCLI(LitTokens, Data)\n"
    )
    command = [str(script), "fit", "--trainer.accelerator", "cpu", *FAST, "--optim"]
    done = run_fresh(*command, "lion_8bit")
    assert done.returncode == 0, done.stderr
    assert "optim='lion_8bit': bitsandbytes.optim.Lion (lr=0.0001" in done.stderr
    done = run_fresh(*command, "lion_8bits")
    assert done.returncode == 2
    assert "Close names: 'lion_8bit'" in done.stderr


@pytest.mark.parametrize("argument", ["--optim", "--model.optim"])
@pytest.mark.parametrize(
    ("flags", "strategy"),
    [
        (("--trainer.devices", "1"), SingleDeviceStrategy),
        (("--trainer.devices", "2"), LayerwiseDDPStrategy),
        (("--trainer.devices", "2", "--trainer.strategy", "ddp"), DDPStrategy),
        (("--trainer.devices", "1", "--trainer.strategy", "layerwise"), LayerwiseStrategy),
    ],
)
def test_a_layerwise_identifier_gets_the_strategy_that_it_needs(
    argument: str, flags: tuple[str, ...], strategy: type[Strategy]
) -> None:
    arguments = [argument, "sgd_layerwise", "--trainer.accelerator", "cpu", *flags]
    cli = OptimCLI(LitTokens, Data, args=arguments, run=False)
    assert type(cli.trainer.strategy) is strategy
    plain = OptimCLI(LitTokens, Data, args=[argument, "sgd", "--trainer.accelerator", "cpu", *flags], run=False)
    assert type(plain.trainer.strategy) is (DDPStrategy if strategy is LayerwiseDDPStrategy else strategy)


@pytest.mark.parametrize("flags", [("--trainer.accelerator", "npu"), ("--trainer.strategy", "npu")])
def test_a_device_that_is_not_here_is_a_mistake_like_others(
    flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        OptimCLI(LitTokens, Data, args=["--optim", "adamw", "--trainer.accelerator", "cpu", *flags], run=False)
    assert caught.value.code == 2
    assert "npu" in capsys.readouterr().err


def test_two_processes_by_the_identifier_alone(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "from lightning_optim import OptimCLI\n"
        "from tests.models import ForeignTokens\n"
        "from tests.trainer.test_cli import Data\n"
        "OptimCLI(ForeignTokens, Data)\n"
    )
    flags = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.max_steps", "2")
    done = run_fresh(str(script), "fit", "--optim", "sgd_layerwise", *flags)
    assert done.returncode == 0, done.stderr
    assert "OptimCLI chose --trainer.strategy layerwise_ddp for optim='sgd_layerwise'" in done.stderr
    assert "MEMBER: 2/2" in done.stderr
    assert "layerwise: buckets of" in done.stderr


@pytest.mark.parametrize(
    ("strategy", "option", "value"),
    [
        (LayerwiseStrategy, "norm_clipping", "previous"),
        (LayerwiseDDPStrategy, "bucket_mb", 2.0),
        (LayerwiseFSDP2Strategy, "log_grad_norm", True),
        (LayerwiseFSDP2Strategy, "shard", "encoder"),
        (FSDP2Strategy, "shard", "encoder"),
    ],
)
def test_strategies_by_class_path_take_their_options(strategy: type[Strategy], option: str, value: Any) -> None:
    arguments = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    arguments += ["--trainer.strategy", f"lightning_optim.{strategy.__name__}"]
    cli = OptimCLI(LitTokens, Data, args=[*arguments, f"--trainer.strategy.{option}", str(value)], run=False)
    assert type(cli.trainer.strategy) is strategy
    taken = cli.trainer.strategy if option == "shard" else cli.trainer.strategy.layerwise_options
    assert getattr(taken, option) == value
    assert "device" not in cli.config.trainer.strategy.init_args or cli.config.trainer.strategy.init_args.device is None
