"""Loading runs nothing: a module that only a checkpoint names is not imported (contract C13)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor, nn

from lightning_optim import OptimCLI, OptimConfig, OptimMixin, UntrustedOptimizer
from tests.models import trainer

PATH = "named_by_a_file.Descent"
MODULE = "import torch\nprint('ran')\nclass Descent(torch.optim.SGD): pass\n"
DATA = torch.utils.data.DataLoader(torch.ones(4, 2))


class Model(OptimMixin, L.LightningModule):
    def __init__(self, width: int = 1, **optim: Any) -> None:
        super().__init__(**optim)
        self.save_hyperparameters()
        self.net = nn.Linear(2, width)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()


class Nested(Model):
    """Takes its optimizer out of an argument of its own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(**settings["training"])
        self.save_hyperparameters("settings")


class WithDefault(Model):
    def __init__(self, optim: str = PATH) -> None:
        super().__init__(optim=optim, lr=0.1)
        self.save_hyperparameters()


class Fixed(Model):
    """Names its optimizer in its code."""

    def __init__(self, width: int = 1) -> None:
        super().__init__(width, optim=PATH, lr=0.1)
        self.save_hyperparameters()


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a checkpoint whose hyperparameters name a class that is not imported."""
    tmp_path.joinpath("named_by_a_file.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "named_by_a_file", raising=False)

    def write(**hyperparameters: Any) -> Path:
        run = trainer(max_steps=0)
        run.strategy.connect(Model())
        file = tmp_path / "model.ckpt"
        run.save_checkpoint(file)
        saved = torch.load(file, weights_only=True)
        saved["hyper_parameters"] = hyperparameters or {"optim": PATH, "lr": 0.1}
        torch.save(saved, file)
        return file

    return write


def fit(model: L.LightningModule) -> str:
    run = trainer(max_steps=1)
    run.fit(model, DATA)
    return type(run.optimizers[0]).__name__


@pytest.mark.parametrize("suffix", ["", "_layerwise"])
def test_what_only_a_checkpoint_names_is_not_imported(checkpoint: Any, suffix: str) -> None:
    file = checkpoint(optim=PATH + suffix, lr=0.1)
    model = Model.load_from_checkpoint(file, weights_only=True)
    model.optim_config = model.optim_config.replace(lr=0.2)
    assert "named_by_a_file" not in sys.modules
    assert model.optim_config.optim == PATH + suffix
    with pytest.raises(UntrustedOptimizer, match=rf"load_from_checkpoint\(path, optim='{PATH}"):
        fit(model)
    assert "named_by_a_file" not in sys.modules

    # What the caller's own code says, or has imported.
    assert fit(Model.load_from_checkpoint(file, weights_only=True, optim=PATH)) == "Descent"
    assert fit(model) == "Descent"


def test_what_code_names_is_imported(checkpoint: Any) -> None:
    assert fit(Fixed.load_from_checkpoint(checkpoint(width=1), weights_only=True)) == "Descent"


@pytest.mark.parametrize(
    "optim", ["torch.optim.NAdam", "lightning_optim.optimizers.AdaLomo", "lion_8bit", "adamw_layerwise"]
)
def test_what_the_table_names_or_is_imported_already_is_taken(checkpoint: Any, optim: str) -> None:
    model = Model.load_from_checkpoint(checkpoint(optim=optim, optim_args={"weight_decay": 0.1}), weights_only=True)
    assert model.optim_config == OptimConfig(optim=optim, optim_args={"weight_decay": 0.1})


def test_every_way_out_of_a_file_is_guarded(checkpoint: Any, tmp_path: Path) -> None:
    Nested.load_from_checkpoint(checkpoint(settings={"training": {"optim": PATH, "lr": 0.1}}), weights_only=True)
    tmp_path.joinpath("hparams.yaml").write_text(yaml.safe_dump({"optim": PATH, "lr": 0.1}))
    Model.load_from_checkpoint(checkpoint(width=1), weights_only=True, hparams_file=tmp_path / "hparams.yaml")
    assert "named_by_a_file" not in sys.modules
    assert fit(WithDefault.load_from_checkpoint(checkpoint(optim=PATH), weights_only=True)) == "Descent"


def test_the_command_line_takes_nothing_out_of_a_checkpoint_that_it_would_run(
    checkpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    class CLIModel(Model):
        def __init__(self, optim: str = "sgd", lr: float = 0.1) -> None:
            super().__init__(optim=optim, lr=lr)

        def train_dataloader(self) -> Any:
            return DATA

    quiet = {"accelerator": "cpu", "logger": False, "max_steps": 1, "enable_checkpointing": False}

    def run(*arguments: str) -> None:
        OptimCLI(CLIModel, args=["fit", "--ckpt_path", str(checkpoint()), *arguments], trainer_defaults=quiet)

    with pytest.raises(SystemExit):
        run()
    assert f"--model.optim {PATH}, or import" in capsys.readouterr().err
    assert "named_by_a_file" not in sys.modules
