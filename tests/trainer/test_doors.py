"""What comes in by the names and values of other libraries: kept, made plain, or answered with what to write here."""

from __future__ import annotations

import copy
import pickle
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_optim import (
    InvalidOption,
    OptimCallback,
    OptimCLI,
    OptimConfig,
    OptimMixin,
    build_optimizer,
)
from tests.models import LitTokens, loader, trainer

DATA = torch.utils.data.DataLoader(torch.ones(4, 2))


class Theirs(L.LightningModule):
    """As published packages write it: arguments of its own, kept as attributes."""

    def __init__(self, width: int, lr: float = 0.5, weight_decay: float = 0.25) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.decay = weight_decay
        self.net = nn.Linear(2, width)

    def forward(self, batch: Tensor) -> Tensor:
        return self.net(batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Mine(OptimMixin, Theirs):
    pass


class OfTheHead(OptimMixin, L.LightningModule):
    """Has an ``lr`` of another meaning."""

    def __init__(self, lr_head: float = 0.5, **optim: Any) -> None:
        super().__init__(**optim)
        self.net = nn.Linear(2, 1)
        self.lr = lr_head

    def forward(self, batch: Tensor) -> Tensor:
        return self.net(batch)


class InTheClass(OptimMixin, L.LightningModule):
    lr = 0.5

    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        self.net = nn.Linear(2, 1)


class TestALearningRateOfTheModulesOwn:
    def test_the_users_rate_wins_and_the_module_sees_it(self) -> None:
        model = Mine(3, optim="lion_32bit", lr=1e-4, weight_decay=0.125)
        assert (model.lr, model.decay, model.optim_config.lr) == (1e-4, 0.125, 1e-4)
        model.lr = 1e-5  # what a finder does
        assert (model.lr, model.optim_config.lr) == (1e-5, 1e-5)

    @pytest.mark.parametrize(
        ("model", "asked"),
        [
            (lambda: Mine(3, optim="lion_32bit"), None),
            (lambda: OfTheHead(optim="sgd", lr=1e-3), 1e-3),
            (lambda: InTheClass(optim="sgd", lr=1e-3), 1e-3),
        ],
        ids=["default", "assigned", "class attribute"],
    )
    def test_it_never_becomes_the_optimizers_in_silence(self, model: Any, asked: float | None) -> None:
        lit = model()
        assert (lit.lr, lit.optim_config.lr) == (0.5, asked)
        lit.lr = 0.75
        assert (lit.lr, lit.optim_config.lr) == (0.75, asked)

    def test_a_checkpoint_gives_back_the_optimizer(self, tmp_path: Path) -> None:
        run = trainer(max_steps=1)
        run.fit(Mine(3, optim="lion_32bit", lr=1e-4), DATA)
        run.save_checkpoint(tmp_path / "mine.ckpt")
        loaded = Mine.load_from_checkpoint(tmp_path / "mine.ckpt", weights_only=True)
        assert loaded.optim_config == OptimConfig("lion_32bit", lr=1e-4)

    @pytest.mark.filterwarnings("ignore")
    def test_scripting_copying_and_pickling_are_as_without_the_mixin(self) -> None:
        model = OfTheHead(optim="sgd", lr=1e-3)
        batch = torch.ones(2, 2)
        for other in (
            model.to_torchscript(),
            model.to_torchscript(method="trace", example_inputs=batch),
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
        ):
            assert torch.equal(other(batch), model(batch))


class TestNamesOfOthers:
    @pytest.mark.parametrize(
        ("given", "remedy"),
        [
            ({"learning_rate": 1e-3}, "write lr=0.001"),
            ({"optimizer": "lion_8bit"}, "write optim='lion_8bit'"),
            ({"warmup_ratio": 0.1}, "write warmup_steps=0.1, a fraction of the training"),
            ({"lr_scheduler_type": "cosine"}, "write lr_scheduler='cosine'"),
            ({"adam_beta1": 0.8}, "write optim_args={'beta1': 0.8}"),
            ({"betas": (0.9, 0.95)}, r"write optim_args={'betas': (0.9, 0.95)}"),
            ({"max_grad_norm": 1.0}, "set Trainer(gradient_clip_val=...)"),
            ({"weight_deacy": 0.1}, "did you mean 'weight_decay'"),
        ],
    )
    def test_an_argument_is_answered_with_what_to_write(self, given: dict[str, Any], remedy: str) -> None:
        for door in (LitTokens, OptimCallback):
            with pytest.raises(InvalidOption) as caught:
                door(optim="adamw_torch", **given)
            assert remedy in str(caught.value)

    def test_so_is_one_where_no_schedule_is_made(self) -> None:
        with pytest.raises(InvalidOption, match=r"learning_rate=0[.]1: write lr=0[.]1"):
            build_optimizer(nn.Linear(2, 2), "sgd", learning_rate=0.1)  # type: ignore[arg-type]
        with pytest.raises(InvalidOption, match=r"lr_scheduler_type='cosine': build_schedule\(optimizer"):
            LitTokens(optim="sgd").build_optimizer(None, lr_scheduler_type="cosine")  # type: ignore[arg-type]

    def test_arguments_that_a_next_class_takes_reach_it(self) -> None:
        class Cooperative(L.LightningModule):
            def __init__(self, *, learning_rate: float, **others: Any) -> None:
                super().__init__()
                self.taken = learning_rate, others

        class Model(OptimMixin, Cooperative):
            pass

        assert Model(optim="sgd", learning_rate=0.1, depth=2).taken == (0.1, {"depth": 2})

    @pytest.mark.parametrize(
        ("name", "text", "remedy"),
        [
            ("adamw_torch", "lr=1e-4", "a separate argument: write lr='1e-4' next to optim_args"),
            ("schedule_free_adamw", "warmup_steps=10", "write warmup_steps='10' next to optim_args"),
            ("adamw_torch", "adam_beta1=0.9,adam_epsilon=1e-6", "Write beta1='0.9'"),
            ("adamw_torch", "fused=True", "use optim='adamw_torch_fused'"),
            ("adamw_8bit", "percentile_clipping=95", r"set Trainer(gradient_clip_val=...)"),
            ("adamw_torch", "betas=0.9,0.95", "'betas=(0.9, 0.95)'"),
            ("adafactor", "scale_parameter=False relative_step=False", "separate them by commas"),
            ("sgd", "momentum=0.9;nesterov=True", "separate them by commas"),
            ("ademamix", "t_alpha=0", "None: at once"),
        ],
    )
    def test_an_option_is_answered_with_what_to_write(self, name: str, text: str, remedy: str) -> None:
        with pytest.raises(InvalidOption) as caught:
            OptimConfig(name, optim_args=text)
        assert remedy in str(caught.value)


class Names(str, Enum):
    """As Hugging Face's ``OptimizerNames`` and ``SchedulerType``."""

    SGD = "sgd"
    COSINE = "cosine"


class TestPlainValues:
    def test_what_is_stored_can_be_read_everywhere(self, tmp_path: Path) -> None:
        options = {"momentum": np.float32(0.5), "nesterov": np.bool_(True)}
        model = LitTokens(
            optim=Names.SGD, lr_scheduler=Names.COSINE, lr=torch.tensor(0.125), optim_args=options, param_groups=None
        )
        run = trainer(max_steps=1, logger=CSVLogger(tmp_path))
        run.fit(model, loader())
        run.save_checkpoint(tmp_path / "plain.ckpt")
        saved = torch.load(tmp_path / "plain.ckpt", weights_only=True)["hyper_parameters"]
        assert saved == {
            **{"width": 64, "optim": "sgd", "lr": 0.125, "lr_scheduler": "cosine", "param_groups": None},
            "optim_args": {"momentum": 0.5, "nesterov": True},
        }
        assert {type(saved[name]) for name in ("optim", "lr_scheduler")} == {str}

        # hparams.yaml holds the report, too: tuples are lists there, and it is no argument.
        file = Path(run.logger.log_dir) / "hparams.yaml"
        assert yaml.safe_load(file.read_text())["optimizer"]["identifier"] == "sgd"
        loaded = LitTokens.load_from_checkpoint(tmp_path / "plain.ckpt", "cpu", file, None, True)
        assert loaded.optim_config == model.optim_config
        assert "optimizer" not in loaded.hparams

    def test_tuples_are_lists_in_files(self, tmp_path: Path) -> None:
        run = trainer(max_steps=1, logger=CSVLogger(tmp_path))
        run.fit(LitTokens(optim="adamw_torch", optim_args={"betas": (0.5, 0.75)}), loader())
        stored = yaml.safe_load((Path(run.logger.log_dir) / "hparams.yaml").read_text())
        assert stored["optim_args"] == {"betas": [0.5, 0.75]}
        assert stored["optimizer"]["betas"] == [0.5, 0.75]


class TestCommandLine:
    QUIET: ClassVar = {"accelerator": "cpu", "logger": False, "max_steps": 1, "enable_checkpointing": False}

    class Model(OptimMixin, L.LightningModule):
        def __init__(self, optim: str = "adamw_torch", lr: float = 0.1) -> None:
            super().__init__(optim=optim, lr=lr)
            self.net = nn.Linear(2, 1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch).square().mean()

        def train_dataloader(self) -> Any:
            return DATA

    class WithClasses(OptimCLI):
        """As Lightning's documentation subclasses its CLI."""

        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_optimizer_args(torch.optim.Adam)
            parser.add_lr_scheduler_args(torch.optim.lr_scheduler.StepLR)

    def run(self, *arguments: str, cli: type[OptimCLI] = OptimCLI) -> OptimCLI:
        return cli(self.Model, args=["fit", *arguments], trainer_defaults=self.QUIET, save_config_callback=None)

    def test_single_options_join_those_of_a_string(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text("optim: adamw_torch\noptim_args: betas=(0.5, 0.75)\n")
        for given in (("--optim", "adamw_torch", "--optim_args", "betas=(0.5, 0.75)"), ("--config", str(file))):
            optimizer = self.run(*given, "--optim_args.eps", "1e-5").trainer.optimizers[0]
            assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.5, 0.75), 1e-5)

    def test_a_subclass_may_add_classes_of_torch(self, capsys: pytest.CaptureFixture[str]) -> None:
        trained = self.run("--optim", "sgd", "--lr", "0.25", cli=self.WithClasses).trainer.optimizers[0]
        assert (type(trained).__name__, trained.defaults["lr"]) == ("SGD", 0.25)
        given = ("--optimizer.lr", "0.5", "--torch_lr_scheduler.step_size", "3")
        trained = self.run(*given, cli=self.WithClasses).trainer.optimizers[0]
        assert (type(trained).__name__, trained.defaults["lr"]) == ("Adam", 0.5)
        for wrong, remedy in (
            (("--optim", "sgd", "--optimizer.lr", "0.5"), "one of them would be ignored"),
            ((), "--optim NAME is required, or --torch_lr_scheduler.step_size"),
        ):
            with pytest.raises(SystemExit):
                self.run(*wrong, cli=self.WithClasses)
            assert remedy in capsys.readouterr().err

    def test_names_in_the_wrong_place_are_answered(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "old.yaml"
        file.write_text("lr_scheduler:\n  class_path: torch.optim.lr_scheduler.StepLR\n")
        for given, remedy in (
            (("--optimizer", "lion_8bit"), "Write --optim lion_8bit"),
            (("--config", str(file)), "A class of torch goes to --torch_lr_scheduler"),
        ):
            with pytest.raises(SystemExit):
                self.run(*given)
            assert remedy in capsys.readouterr().err


class TestDottedPaths:
    @pytest.mark.parametrize(("default", "betas"), [("", (0.9, 0.95)), ("=None", None), ("=0.9", 0.8)])
    def test_betas_of_any_signature(self, default: str, betas: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        namespace: dict[str, Any] = {"torch": torch}
        exec(
            f"class Odd(torch.optim.AdamW):\n    def __init__(self, params, *, betas{default}, lr=1e-3):\n"
            "        super().__init__(params, lr=lr)\n        self.given = betas\n",
            namespace,
        )
        monkeypatch.setitem(globals(), "Odd", namespace["Odd"])
        namespace["Odd"].__module__ = __name__
        options = {} if betas is None else {"betas": betas}
        optimizer: Any = build_optimizer(nn.Linear(2, 2), f"{__name__}.Odd", optim_args=options)
        assert optimizer.given == betas

    def test_the_row_of_the_same_algorithm_is_named(self) -> None:
        assert OptimConfig("bitsandbytes.optim.Lion", lr=1e-4).spec.note.startswith("optim='lion_32bit' is this")
