"""A converted file trains as Hugging Face's Trainer does: OptimCLI, and the Trainer's own optimizer and schedule."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from lightning_optim import OptimCLI, command
from tests.hugging_face import Arguments, trainer_of
from tests.models import LitTokens, TokenModel, loader

BATCHES = 12


class Watched(LitTokens):
    """Remembers where it began, and the learning rate of each step."""

    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        self.start = copy.deepcopy(self.model)
        self.rates: list[float] = []

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        super().optimizer_step(*args, **kwargs)


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader(BATCHES)

    def val_dataloader(self) -> Any:
        return loader(batches=2, seed=1)


def converted(given: dict[str, Any], folder: Path, *more: str) -> OptimCLI:
    """Trains by the file that the command writes from a file of arguments."""
    (folder / "args.yaml").write_text(yaml.safe_dump(given))
    assert command.main(["convert", str(folder / "args.yaml"), "--output", str(folder / "run.yaml")]) == 0
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    arguments = ["fit", "--config", str(folder / "run.yaml"), "--trainer.default_root_dir", str(folder), *more]
    return OptimCLI(Watched, Data, args=arguments, trainer_defaults=quiet)


def hugging_face(model: TokenModel, args: Arguments) -> tuple[list[float], list[float]]:
    """Trains by the Trainer's own methods for optimizer and schedule; a whole Trainer wants accelerate.

    Returns:
        The losses of the batches and the learning rates of the steps.
    """
    trainer = trainer_of(model, args)
    batches = [batch for _ in range(int(args.num_train_epochs)) for batch in loader(BATCHES)]
    trainer.create_optimizer_and_scheduler(len(batches) // args.gradient_accumulation_steps)
    losses, rates = [], []
    for index, (tokens, targets) in enumerate(batches, start=1):
        loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())
        losses.append(loss.item())
        (loss / args.gradient_accumulation_steps).backward()
        if index % args.gradient_accumulation_steps == 0:
            clip_grad_norm_(model.parameters(), args.max_grad_norm)
            rates.append(trainer.lr_scheduler.get_last_lr()[0])
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
            trainer.optimizer.zero_grad()
    return losses, rates


@pytest.fixture(autouse=True)
def _without_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(tmp_path)
    # OptimCLI seeds by the file, and leaves these behind.
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")


RUNS: dict[str, dict[str, Any]] = {
    "defaults": {"save_strategy": "no", "report_to": "none"},
    "warm-up, clipping, accumulation": {
        **{"optim": "adamw_torch", "learning_rate": 0.01, "weight_decay": 0.1, "warmup_steps": 0.25},
        **{"adam_beta2": 0.95, "max_grad_norm": 0.05, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"},
        **{"num_train_epochs": 2, "save_strategy": "no", "report_to": "none"},
    },
    "nesterov": {
        **{"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true", "learning_rate": 0.1, "warmup_steps": 3},
        **{"lr_scheduler_type": "polynomial", "save_strategy": "no", "report_to": "none", "num_train_epochs": 1},
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_it_trains_as_hugging_faces_trainer(name: str, tmp_path: Path) -> None:
    given = RUNS[name]
    cli = converted(given, tmp_path)
    losses, rates = hugging_face(cli.model.start, Arguments(**given))
    assert len(rates) == cli.trainer.global_step
    assert cli.model.rates == rates
    # But for rounding: the norm of the gradients is summed in the order of the groups here, of the model there.
    assert cli.model.losses == pytest.approx(losses, rel=1e-6)
    for ours, theirs in zip(cli.model.model.parameters(), cli.model.start.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_every_part_of_the_file_is_understood(tmp_path: Path) -> None:
    given = {
        **{"max_steps": 4, "bf16": True, "use_cpu": True, "full_determinism": False, "seed": 7, "disable_tqdm": True},
        **{"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2, "logging_steps": 1},
        **{"save_steps": 2, "save_total_limit": 1, "report_to": "none", "optim": "lion_8bit", "learning_rate": 1e-4},
    }
    cli = converted(given, tmp_path)
    assert (cli.trainer.global_step, cli.trainer.precision, cli.config.fit.seed_everything) == (4, "bf16-mixed", 7)
    assert (cli.trainer.val_check_batch, cli.trainer.check_val_every_n_epoch) == (4, None)
    assert type(cli.trainer.optimizers[0]).__name__ == "Lion"
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert "step=4" in checkpoint.name


def test_a_metric_to_watch(tmp_path: Path) -> None:
    given = {
        **{"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0}},
        **{"num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True},
        **{"optim": "galore_adamw_layerwise", "optim_args": "rank=4", "optim_target_modules": ["linear"]},
        **{"learning_rate": 0.01, "report_to": "none"},
    }
    cli = converted(given, tmp_path)
    assert cli.trainer.checkpoint_callback.monitor == "val_loss"
    assert cli.model.rates[0] == 0.01
    # Nothing is ever ten times better.
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0001)
