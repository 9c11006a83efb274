"""What was asked, what trains and what is reported after a resume (contract C11), and what wins over a checkpoint."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_optim import OptimCallback, OptimConfig, build_optimizer, build_schedule
from lightning_optim.errors import IncompatibleTrainer, InvalidOption
from tests.models import ForeignTokens, LitTokens, loader, trainer
from tests.trainer.test_resume import assert_equal

SCHEDULES: dict[str, dict[str, Any]] = {
    "none": {},
    "constant": {"lr_scheduler": "constant"},
    "linear": {"lr_scheduler": "linear"},
    "cosine": {"lr_scheduler": "cosine"},
    "plateau": {
        "lr_scheduler": "reduce_lr_on_plateau",
        "lr_scheduler_args": {"patience": 0, "factor": 0.5, "threshold": 10.0, "threshold_mode": "abs"},
    },
}
OVERRIDE = {"override_on_resume": ["lr_scheduler"]}


class Rates(L.Callback):
    """Notes the rates of a run's steps."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.rates.append(round(float(trainer.optimizers[0].param_groups[0]["lr"]), 7))


def fit(path: Path | None = None, epochs: int = 1, **optim: Any) -> tuple[L.Trainer, list[float]]:
    """Trains epochs of 4 steps, all of them together ``epochs``, from ``path`` on."""
    rates = Rates()
    run = trainer(max_epochs=epochs, callbacks=[rates], num_sanity_val_steps=0)
    model = LitTokens(width=8, **{"optim": "adamw_torch", "lr": 0.01, **optim})
    run.fit(model, loader(4), loader(1), ckpt_path=path)
    return run, rates.rates


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two of four epochs with every schedule."""
    folder = tmp_path_factory.mktemp("schedules")
    for name, schedule in SCHEDULES.items():
        run, _ = fit(epochs=2, **schedule)
        run.save_checkpoint(folder / f"{name}.ckpt")
    return {name: folder / f"{name}.ckpt" for name in SCHEDULES}


class TestReport:
    def test_it_says_what_trains_and_a_warning_what_was_asked(
        self, checkpoints: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        logger = CSVLogger(tmp_path)
        run = trainer(max_epochs=3, logger=logger)
        model = LitTokens(width=8, lr=1e-4, weight_decay=0.5, optim_args={"betas": (0.5, 0.6)}, lr_scheduler="linear")
        with (
            caplog.at_level("INFO"),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            run.fit(model, loader(4), ckpt_path=checkpoints["linear"])
        texts = [str(warning.message) for warning in caught if "resumes with" in str(warning.message)]
        assert len(texts) == 1
        for part in (
            "lr=0.01 (asked: 0.0001)",
            "weight_decay=0.01 (asked: 0.5)",
            "betas=(0.9, 0.999) (asked: (0.5, 0.6))",
        ):
            assert part in texts[0]
        assert "override_on_resume=('lr', 'weight_decay', 'betas')" in texts[0]
        # The file's lr is 0, the end of its schedule: what counts is the peak.
        logged = logger.experiment.hparams["optimizer"]
        assert (logged["lr"], logged["weight_decay"], logged["betas"]) == (0.01, 0.01, [0.9, 0.999])
        assert [group["lr"] for group in logged["groups"].values()] == [0.01, 0.01]
        reports = [record.message for record in caplog.records if record.message.startswith("optim='adamw_torch'")]
        assert len(reports) == 1
        assert "(lr=0.01, weight_decay=0.01, betas=(0.9, 0.999)" in reports[0]

    def test_nothing_is_said_where_nothing_differs(self, checkpoints: dict[str, Path]) -> None:
        for name, schedule in SCHEDULES.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fit(checkpoints[name], epochs=3, **schedule)
            assert not [warning for warning in caught if "resumes with" in str(warning.message)], name


class TestOverrides:
    @pytest.mark.parametrize("form", ["", "_layerwise"])
    def test_of_hyperparameters(self, form: str, checkpoints: dict[str, Path]) -> None:
        asked = {"lr": 0.02, "weight_decay": 0.5, "optim_args": {"betas": (0.5, 0.6)}}
        run, rates = fit(
            checkpoints["none"],
            epochs=3,
            optim="adamw_torch" + form,
            override_on_resume=["lr", "weight_decay", "betas"],
            **asked,
        )
        assert rates == [0.02] * 4
        assert [group["weight_decay"] for group in run.optimizers[0].param_groups] == [0.5, 0.0]
        assert {group["betas"] for group in run.optimizers[0].param_groups} == {(0.5, 0.6)}

    def test_of_the_peak_of_a_schedule_and_again(self, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        asked = {**SCHEDULES["linear"], "lr": 0.02, "override_on_resume": "lr"}
        _, rates = fit(checkpoints["linear"], epochs=4, **asked)
        assert rates == [0.02 * (16 - step) / 16 for step in range(8, 16)]
        # Preempted and resumed by the same script: nothing is overridden twice.
        half, _ = fit(checkpoints["linear"], epochs=3, **{**asked, "lr_scheduler": "constant", **OVERRIDE})
        half.save_checkpoint(tmp_path / "half.ckpt")
        _, rates = fit(tmp_path / "half.ckpt", epochs=4, **{**asked, "lr_scheduler": "constant", **OVERRIDE})
        assert rates == [0.01] * 4

    def test_of_the_peak_keeps_what_a_plateau_reduced(self, checkpoints: dict[str, Path]) -> None:
        _, before = fit(checkpoints["plateau"], epochs=4, **SCHEDULES["plateau"])
        _, after = fit(checkpoints["plateau"], epochs=4, lr=0.02, override_on_resume="lr", **SCHEDULES["plateau"])
        assert before[0] < 0.01
        assert after == [2 * rate for rate in before]

    @pytest.mark.parametrize("name", ["stable_adamw", "adafactor", "lion_8bit", "schedule_free_adamw", "rmsprop"])
    def test_in_plain_torch(self, name: str) -> None:
        """Whatever the class calls its options."""
        module = nn.Linear(8, 8)
        option = {"adafactor": {"decay_rate": -0.7}, "rmsprop": {"alpha": 0.5}}.get(name, {"betas": (0.7, 0.75)})
        writer = build_optimizer(module, name, lr=0.1)
        reader = build_optimizer(module, name, lr=0.2, optim_args=option, override_on_resume=["lr", *option])
        # Which kernel upstream takes is settled when a state is loaded.
        others = {"params": None, "triton": None}
        expected = copy.deepcopy([{**group, **others} for group in reader.param_groups])
        reader.load_state_dict(writer.state_dict())
        assert_equal([{**group, **others} for group in reader.param_groups], expected, name)

    def test_that_would_have_the_state_hold_something_else_are_refused(self) -> None:
        module = nn.Linear(8, 8)
        writer = build_optimizer(module, "adamw_torch")
        reader = build_optimizer(module, "adamw_torch", optim_args="amsgrad=True", override_on_resume="amsgrad")
        with pytest.raises(InvalidOption, match="amsgrad=True keeps another state than amsgrad=False"):
            reader.load_state_dict(writer.state_dict())

    @pytest.mark.parametrize(
        ("optim", "name", "text"),
        [
            ("adamw_torch", "learning_rate", "which a checkpoint does not hold"),
            ("adamw_8bit", "min_8bit_size", "which never comes from a checkpoint"),
            ("galore_adamw", "rank", "another value of which would not fit the saved state"),
        ],
    )
    def test_of_anything_else_are_refused_at_once(self, optim: str, name: str, text: str) -> None:
        with pytest.raises(IncompatibleTrainer, match=rf"{name!r}, {text}.*'lr', 'weight_decay'"):
            OptimConfig(optim=optim, override_on_resume=["lr", name])

    def test_of_the_callback(self, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        def run(lr: float, path: Path | None, epochs: int, **more: Any) -> L.Trainer:
            trained = trainer(max_epochs=epochs, callbacks=[OptimCallback("lion_32bit", lr=lr, **more)])
            trained.fit(ForeignTokens(width=8), loader(2), ckpt_path=path)
            return trained

        run(0.01, None, 1).save_checkpoint(tmp_path / "a.ckpt")
        resumed = run(0.02, tmp_path / "a.ckpt", 2, override_on_resume="lr")
        assert resumed.optimizers[0].param_groups[0]["lr"] == 0.02


class TestSchedules:
    @pytest.mark.parametrize("asked", SCHEDULES)
    @pytest.mark.parametrize("written", SCHEDULES)
    def test_another_one_is_refused_or_wins(self, written: str, asked: str, checkpoints: dict[str, Path]) -> None:
        if written == asked:
            return
        with pytest.raises(InvalidOption, match=r"override_on_resume=\['lr_scheduler'\]"):
            fit(checkpoints[written], epochs=4, **SCHEDULES[asked])
        _, rates = fit(checkpoints[written], epochs=4, **SCHEDULES[asked], **OVERRIDE)
        # As if it had been that one from the beginning; a plateau knows of no metric yet.
        _, expected = fit(epochs=4, **SCHEDULES[asked])
        assert rates == (expected[:8] if asked == "plateau" else expected[8:])

    def test_the_state_of_torchs_schedulers_is_not_taken_for_ours(self) -> None:
        optimizer = build_optimizer(nn.Linear(2, 2))
        state = CosineAnnealingLR(optimizer, 10).state_dict()
        with pytest.raises(InvalidOption, match="T_max"):
            build_schedule(optimizer, "cosine", 10).load_state_dict(state)

    def test_a_file_that_does_not_say_its_schedule_is_loaded(self) -> None:
        optimizer = build_optimizer(nn.Linear(2, 2))
        schedule = build_schedule(optimizer, "cosine", 10)
        state = {key: value for key, value in schedule.state_dict().items() if key != "name"}
        build_schedule(optimizer, "cosine", 10).load_state_dict(state)
        with pytest.raises(InvalidOption, match="reduce_lr_on_plateau"):
            build_schedule(optimizer, "reduce_lr_on_plateau").load_state_dict(state)

    def test_a_plateau_says_which_settings_go_on(self) -> None:
        optimizer = build_optimizer(nn.Linear(2, 2))
        state = build_schedule(optimizer, "reduce_lr_on_plateau", args="patience=3").state_dict()
        schedule: Any = build_schedule(optimizer, "reduce_lr_on_plateau", args="patience=5")
        with pytest.warns(UserWarning, match=r"patience=3 \(asked: 5\)"):
            schedule.load_state_dict(state)
        assert schedule.patience == 3
        schedule.patience, schedule.replaces = 5, True
        schedule.load_state_dict(state)
        assert schedule.patience == 5
