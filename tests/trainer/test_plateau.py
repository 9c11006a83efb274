"""``reduce_lr_on_plateau`` under a Trainer: asked after every validation, exact on resume, a missing metric named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateMonitor, ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_optim import InvalidOption
from tests.models import LitTokens, loader, trainer


class Flat(LitTokens):
    """A metric that never improves: the rate halves at every question but the first."""

    def __init__(self, monitor: str = "val_loss") -> None:
        args = {"patience": 0, "factor": 0.5, "monitor": monitor}
        super().__init__(optim="sgd", lr=2**-6, lr_scheduler="reduce_lr_on_plateau", lr_scheduler_args=args)
        self.by_epoch: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("flat_train", 1.0, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 1.0)

    def on_train_epoch_start(self) -> None:
        self.by_epoch.append(self.trainer.optimizers[0].param_groups[0]["lr"] * 2**6)


class FlatAtTheEnd(Flat):
    def on_train_epoch_end(self) -> None:
        self.log("flat_end", 1.0)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield from loader(batches=2).dataset


@pytest.mark.parametrize("every", [1, None])
def test_it_is_asked_after_every_validation_of_an_endless_epoch(every: int | None) -> None:
    run = trainer(max_steps=20, val_check_interval=4, check_val_every_n_epoch=every)
    run.fit(Flat(), DataLoader(Stream(), batch_size=16), loader(batches=1))
    assert run.optimizers[0].param_groups[0]["lr"] == 0.5**10
    assert [config.scheduler.num_bad_epochs for config in run.lr_scheduler_configs] == [0]


@pytest.mark.parametrize(("model", "monitor"), [(Flat, "flat_train"), (FlatAtTheEnd, "flat_end"), (Flat, "val_loss")])
def test_training_s_own_metric_is_asked_for_at_the_end_of_every_epoch(model: type[Flat], monitor: str) -> None:
    for validation in ([loader(batches=1)], []) if monitor != "val_loss" else ([loader(batches=1)],):
        flat = model(monitor)
        trainer(max_epochs=4).fit(flat, loader(batches=2), *validation)
        assert flat.by_epoch == [1.0, 1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("monitor", "saving"),
    [
        ("val_loss", {}),
        ("val_loss", {"monitor": "val_loss"}),
        *[(monitor, {"save_on_train_epoch_end": True}) for monitor in ("val_loss", "flat_train", "flat_end")],
    ],
)
def test_resuming_from_any_file_is_exact(tmp_path: Path, saving: dict[str, Any], monitor: str) -> None:
    whole = FlatAtTheEnd(monitor)
    data = loader(batches=2), loader(batches=1)
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, **saving)
    trainer(max_epochs=5, callbacks=[checkpoint], enable_checkpointing=True).fit(whole, *data)
    resumed = FlatAtTheEnd(monitor)
    trainer(max_epochs=5).fit(resumed, *data, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert resumed.by_epoch == whole.by_epoch[-len(resumed.by_epoch) :] == [0.25, 0.125]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_training_metric_that_the_file_lacks_is_said(tmp_path: Path) -> None:
    data = loader(batches=2), loader(batches=1)
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    trainer(max_epochs=3, callbacks=[checkpoint], enable_checkpointing=True).fit(Flat("flat_train"), *data)
    with pytest.warns(UserWarning, match="not asked at the end of epoch 1: .*'flat_train'"):
        trainer(max_epochs=3).fit(Flat("flat_train"), *data, ckpt_path=tmp_path / "epoch=1.ckpt")


def test_a_metric_that_nobody_logs_is_refused_at_the_first_validation() -> None:
    model = Flat("acc")
    with pytest.raises(InvalidOption) as caught:
        trainer(max_steps=20, val_check_interval=4).fit(model, DataLoader(Stream(), batch_size=16), loader(batches=1))
    assert "watches 'acc', which nobody logs; logged is 'flat_train', 'train_loss', 'val_loss'" in str(caught.value)
    assert len(model.losses) == 4
    with pytest.raises(InvalidOption, match="watches 'acc'"):
        trainer(max_epochs=2).fit(FlatAtTheEnd("acc"), loader(batches=2))


def test_lightning_knows_the_schedule(tmp_path: Path) -> None:
    asked: list[float] = []

    class Own(Flat):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            assert scheduler is self.lr_schedulers()
            asked.append(float(metric))
            super().lr_scheduler_step(scheduler, metric)

    monitor = LearningRateMonitor()
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    run = trainer(max_epochs=3, callbacks=[monitor], logger=logger, log_every_n_steps=1)
    run.fit(Own(), loader(batches=2), loader(batches=1))
    assert asked == [1.0, 1.0, 1.0]
    assert len(monitor.lrs) == 2
    # Nothing of it stays behind.
    assert not any("Plateau" in type(callback).__name__ for callback in run.callbacks)  # type: ignore[attr-defined]


class Sized(Flat):
    batch_size = 2

    def train_dataloader(self) -> Any:
        return DataLoader(loader(batches=4).dataset, batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(batches=1)


def test_a_finder_of_batch_sizes_does_not_ask_it(tmp_path: Path) -> None:
    """Its trials have no validation, and count their first batch as one that any schedule is due at."""
    found = BatchSizeFinder(init_val=2, max_trials=2, steps_per_trial=1)
    model = Sized()
    trainer(max_epochs=3, callbacks=[found], default_root_dir=tmp_path).fit(model)
    assert model.batch_size == 4
    assert model.by_epoch[-3:] == [1.0, 1.0, 0.5]
