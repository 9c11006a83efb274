"""A checkpoint from between the micro-batches of an accumulation goes on exactly, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, OnExceptionCheckpoint

from lightning_optim import IncompatibleTrainer, OptimCallback
from tests.models import ForeignTokens, fp16_mixed, loader, trainer
from tests.processes import run_fresh
from tests.trainer.accumulated_worker import FORMS, ByIndex, SaveAt

#: Seven batches an epoch: the last window is short.
BATCHES, ACCUMULATED = 7, 3


class Interrupts(Callback):
    """Raises in a batch: in ``training_step``, in backward, or in the optimizer's step."""

    def __init__(self, batch: int, where: str, kind: type[BaseException] = RuntimeError) -> None:
        self.batch, self.where, self.kind = batch, where, kind

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        if index != self.batch:
            return
        if self.where == "start":
            raise self.kind("interrupted")
        if self.where == "backward":
            parameter = pl_module.model.linear.weight  # type: ignore[union-attr]
            parameter.register_hook(self._raise)
        if self.where == "step":
            (optimizer,) = trainer.optimizers
            optimizer.register_step_post_hook(lambda *_: self._raise(None))

    def _raise(self, _: Any) -> None:
        raise self.kind("interrupted")


def fit(
    optim: str,
    *callbacks: Callback,
    checkpoint: Path | None = None,
    accumulate: int = ACCUMULATED,
    kind: Callable[..., L.LightningModule] = ByIndex,
    **flags: Any,
) -> tuple[L.LightningModule, L.Trainer]:
    torch.manual_seed(0)
    model = kind(optim=optim, lr=1e-2, lr_scheduler=None if optim.startswith("schedule_free") else "cosine")
    settings = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5, **flags}
    saves = any(isinstance(each, Checkpoint) for each in callbacks)
    run = trainer(callbacks=list(callbacks), enable_checkpointing=saves, **settings)
    run.fit(model, loader(BATCHES), ckpt_path=checkpoint)
    return model, run


def equal(one: L.LightningModule, other: L.LightningModule) -> bool:
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize(
    ("optim", "kind"),
    [
        ("adamw_torch", RuntimeError),
        ("adamw_torch_layerwise", KeyboardInterrupt),
        ("lomo", RuntimeError),
        ("schedule_free_adamw", KeyboardInterrupt),
        ("galore_adamw_layerwise", RuntimeError),
    ],
)
def test_saved_between_micro_batches(optim: str, kind: type[BaseException], tmp_path: Path) -> None:
    files = {batch: tmp_path / f"{batch}.ckpt" for batch in (1, 3)}
    whole, _ = fit(optim, *(SaveAt(batch, file) for batch, file in files.items()))
    with pytest.raises((kind, SystemExit)):
        fit(optim, Interrupts(5, "start", kind), OnExceptionCheckpoint(tmp_path))
    files[4] = tmp_path / "on_exception.ckpt"
    for batch, file in files.items():
        saved = torch.load(file, weights_only=True)["accumulated_gradients"]
        assert (saved["micro_batches"], saved["accumulate_grad_batches"]) == (batch % ACCUMULATED + 1, ACCUMULATED)
        resumed, run = fit(optim, checkpoint=file)
        assert run.global_step == 6
        assert equal(whole, resumed), batch


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_layerwise"])
def test_what_lightning_saves_after_a_resume(optim: str, tmp_path: Path) -> None:
    saver = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    whole, _ = fit(optim, ModelCheckpoint(tmp_path / "first", **saver))
    fit(optim, ModelCheckpoint(tmp_path / "second", **saver), checkpoint=tmp_path / "first" / "step=1.ckpt")
    # It has forgotten that it saved this step, and does so again after the next micro-batch.
    again = tmp_path / "second" / "step=1.ckpt"
    assert torch.load(again, weights_only=True)["accumulated_gradients"]["micro_batches"] == 1
    resumed, _ = fit(optim, checkpoint=again)
    assert equal(whole, resumed)


def test_with_loss_scaling(tmp_path: Path) -> None:
    scaled: Any = {"plugins": [fp16_mixed()]}
    whole, _ = fit("adamw_torch", SaveAt(4, tmp_path / "it.ckpt"), **scaled)
    resumed, _ = fit("adamw_torch", checkpoint=tmp_path / "it.ckpt", plugins=[fp16_mixed()])
    assert equal(whole, resumed)


def test_by_callback_and_after_a_step_nothing_is_kept(tmp_path: Path) -> None:
    def plain(**_: Any) -> L.LightningModule:
        return ForeignTokens()

    for batch, kept in ((1, True), (2, False), (6, False)):
        file = tmp_path / f"{batch}.ckpt"
        fit("", OptimCallback("sgd", lr=0.1), SaveAt(batch, file), kind=plain, max_epochs=1)
        assert ("accumulated_gradients" in torch.load(file, weights_only=True)) is kept


def refusal(checkpoint: Path, optim: str = "adamw_torch", **setting: Any) -> str:
    with pytest.raises(IncompatibleTrainer) as refused:
        fit(optim, checkpoint=checkpoint, **setting)
    return str(refused.value)


def test_another_accumulation_is_refused(tmp_path: Path) -> None:
    fit("adamw_torch", SaveAt(1, tmp_path / "it.ckpt"))
    text = refusal(tmp_path / "it.ckpt", accumulate=4)
    assert "after 2 of accumulate_grad_batches=3 micro-batches" in text
    assert "Use Trainer(accumulate_grad_batches=3)" in text


def test_half_a_micro_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="interrupted"):
        fit("adamw_torch", Interrupts(4, "backward"), OnExceptionCheckpoint(tmp_path))
    assert "the backward of the next one had begun" in refusal(tmp_path / "on_exception.ckpt")


def test_what_is_saved_on_an_exception_is_written_whole(tmp_path: Path) -> None:
    class Sees(Callback):
        def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
            self.writer = type(trainer.strategy.checkpoint_io).__name__

    sees = Sees()
    with pytest.raises(RuntimeError, match="interrupted"):
        fit("adamw_torch", Interrupts(1, "start"), sees)
    assert sees.writer == "_WholeFiles"


def test_an_interrupted_first_micro_batch_is_taken_again(tmp_path: Path) -> None:
    whole, _ = fit("adamw_torch")
    with pytest.raises(RuntimeError, match="interrupted"):
        fit("adamw_torch", Interrupts(3, "backward"), OnExceptionCheckpoint(tmp_path))
    resumed, _ = fit("adamw_torch", checkpoint=tmp_path / "on_exception.ckpt")
    assert equal(whole, resumed)


@pytest.mark.parametrize(
    ("optim", "where", "flags"),
    [
        ("adamw_torch", "step", {}),
        ("adamw_torch_layerwise", "backward", {"gradient_clip_val": None}),
        ("adamw_torch", "backward", {"gradient_clip_val": None, "strategy": "layerwise"}),
    ],
)
def test_half_a_step_is_refused(optim: str, where: str, flags: dict[str, Any], tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="interrupted"),
        pytest.warns(UserWarning, match="it cannot be resumed from"),
    ):
        fit(optim, Interrupts(5, where), OnExceptionCheckpoint(tmp_path), **flags)
    text = refusal(tmp_path / "on_exception.ckpt", optim, **flags)
    assert "interrupted within an optimizer step" in text
    assert "Resume from an earlier file" in text


def test_files_of_plain_lightning_are_told_of(tmp_path: Path) -> None:
    class Plain(L.LightningModule):
        training_step, configure_optimizers = ForeignTokens.training_step, ForeignTokens.configure_optimizers

        def __init__(self, **_: Any) -> None:
            super().__init__()
            self.model = ForeignTokens().model

    fit("", SaveAt(1, tmp_path / "it.ckpt"), kind=Plain, max_epochs=1)
    saved = torch.load(tmp_path / "it.ckpt", weights_only=True)
    assert "accumulated_gradients" not in saved
    with pytest.warns(UserWarning, match="the first step is made of fewer micro-batches"):
        fit("", OptimCallback(), checkpoint=tmp_path / "it.ckpt", kind=Plain, max_epochs=1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("accumulated")
    done = run_fresh("-m", "tests.trainer.accumulated_worker", str(directory), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("form", FORMS)
def test_in_two_processes(ranks: list[dict[str, Any]], form: str) -> None:
    for rank in ranks:
        found = rank[form]
        if form == "layerwise_fsdp2":
            assert "layerwise_fsdp2 leaves them to FSDP2" in found["refused"]
        else:
            assert found["apart"] <= 1e-6, "up to the order of a sum"
            assert found["moved"] > 1e-3
