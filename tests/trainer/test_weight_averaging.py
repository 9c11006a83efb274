"""StochasticWeightAveraging puts a schedule of its own in the place of the requested one, also when a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_optim import InvalidOption
from tests.models import LitTokens, loader, trainer

SCHEDULES: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {"lr_scheduler": "linear"},
    "plateau": {
        "lr_scheduler": "reduce_lr_on_plateau",
        # Nothing is better by so much: the rate is reduced at every question but the first.
        "lr_scheduler_args": {"monitor": "val_loss", "patience": 0, "threshold": 0.9999, "factor": 0.5},
    },
}


class Asked(LitTokens):
    """Notes the kinds of schedule that are stepped, and the rate of every epoch."""

    def __init__(self, **optim: Any) -> None:
        super().__init__(**{"optim": "sgd", "lr": 0.1, **optim})
        self.stepped: list[str] = []
        self.rates: list[float] = []

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.stepped.append(type(scheduler).__name__)
        super().lr_scheduler_step(scheduler, metric)

    def on_train_batch_start(self, *_: Any) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])


def fit(model: LitTokens, checkpoint: Path | None = None, **flags: Any) -> L.Trainer:
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=2)
    run = trainer(max_epochs=5, callbacks=[averaging, *flags.pop("callbacks", [])], **flags)
    run.fit(model, loader(batches=2), loader(batches=1), ckpt_path=checkpoint)
    return run


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_a_run_that_goes_on_is_the_same(tmp_path: Path, schedule: str, epoch: int) -> None:
    """Before the averaging began, as it begins, and later."""
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, resumed = Asked(**SCHEDULES[schedule]), Asked(**SCHEDULES[schedule])
    fit(whole, callbacks=[saving], enable_checkpointing=True)
    fit(resumed, tmp_path / f"epoch={epoch}.ckpt")
    assert resumed.rates == whole.rates[-len(resumed.rates) :]
    assert len(resumed.rates) == 2 * (4 - epoch)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_plateau_schedule_is_not_asked_any_more() -> None:
    model = Asked(**SCHEDULES["plateau"])
    run = fit(model, val_check_interval=1)
    assert not any(isinstance(config.scheduler, ReduceLROnPlateau) for config in run.lr_scheduler_configs)
    # Two validations in the only epoch before the averaging.
    assert model.stepped == ["Plateau"] * 2 + ["SWALR"] * 4


def test_its_checkpoint_without_the_callback_is_refused(tmp_path: Path) -> None:
    run = fit(Asked())
    file = tmp_path / "averaged.ckpt"
    run.save_checkpoint(file)
    for name in (None, "linear"):
        with pytest.raises(InvalidOption, match=r"with another package.s schedule .*Resume with what makes"):
            trainer(max_epochs=6).fit(Asked(lr_scheduler=name), loader(batches=2), ckpt_path=file)
