"""GrokAdamW against its package, and the callback that tells it the losses."""

from __future__ import annotations

import copy
import importlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_optim import IncompatibleTrainer, InvalidOption, Layerwise
from lightning_optim.optimizers._grokadamw import GrokAdamW, grokking_signal
from lightning_optim.table._options import parse
from lightning_optim.table.rows._adamw_variants import ROWS
from lightning_optim.trainer.callbacks._grokking import GrokkingSignal
from tests.models import TokenModel, loader, trainer
from tests.optimizers import references
from tests.optimizers.test_anyprecision import assert_same, make, set_gradients, train
from tests.processes import run_fresh

ROW = next(row for row in ROWS if row.name == "grokadamw")
LOSSES = {"train_loss": 0.5, "eval_loss": 2.0}


def package(parameters: Sequence[Tensor], **options: Any) -> torch.optim.Optimizer:
    """The package's optimizer without its own clipping."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("grokadamw")
    return module.GrokAdamW(parameters, **{"gradient_clipping": 0.0, **options})


@pytest.fixture(autouse=True)
def _no_cuda() -> None:
    warnings.filterwarnings("ignore", message=".*autocast.*")


def tell(optimizer: torch.optim.Optimizer, losses: dict[str, float]) -> None:
    for group in optimizer.param_groups:
        group.update(losses)


# --- the algorithm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("losses", [{}, LOSSES], ids=["no signal", "signal"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_the_package_where_that_is_right(dtype: torch.dtype, tolerance: float, losses: dict[str, float]) -> None:
    """With one decay rate for all and an epsilon that does not matter, within float64's and float32's rounding."""
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-30, "weight_decay": 0.1, "alpha_init": 0.9, "gamma": 0.0}
    reference, ours = package(make(dtype), **options), GrokAdamW(make(dtype), **options)
    tell(reference, losses)
    tell(ours, losses)
    for one, other in zip(train(reference, 20), train(ours, 20), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_a_missing_gradient_moves_no_other_parameter_s_decay_rate() -> None:
    """Different from the package, where later parameters move up by one."""
    parameters = make(torch.float64)
    ours = GrokAdamW(parameters, lr=1e-2, eps=1e-3, gamma=0.2)
    gradients: list[list[Tensor]] = [[] for _ in parameters]
    for step in range(10):
        set_gradients(parameters, step)
        parameters[1].grad = None if step % 2 else parameters[1].grad
        for parameter, given in zip(parameters, gradients, strict=True):
            given.extend([] if parameter.grad is None else [parameter.grad])
        ours.step()
    for position, start in enumerate(make(torch.float64)):
        group = SimpleNamespace(**ours.param_groups[0], position=position)
        expected = references.grokadamw(start.detach(), gradients[position], group)
        torch.testing.assert_close(parameters[position].detach(), expected, rtol=1e-12, atol=1e-12)

    def last(optimizer: torch.optim.Optimizer, without: int | None) -> Tensor:
        own = optimizer.param_groups[0]["params"]
        set_gradients(own, 0)
        if without is not None:
            own[without].grad = None
        optimizer.step()
        return own[-1].detach()

    assert torch.equal(last(GrokAdamW(make()), None), last(GrokAdamW(make()), 0))
    assert not torch.equal(last(package(make()), None), last(package(make()), 0))


def test_the_first_step_has_the_length_lr_everywhere() -> None:
    """Different from the package, which corrects every parameter's bias as the first one's: up to ten times lr."""

    def lengths(build: Any) -> list[float]:
        parameters = [nn.Parameter(torch.zeros(1)) for _ in range(40)]
        for parameter in parameters:
            parameter.grad = torch.ones(1)
        build(parameters, lr=1e-2).step()
        return [-parameter.item() for parameter in parameters]

    assert lengths(GrokAdamW) == pytest.approx([1e-2] * 40, rel=1e-5)
    theirs = lengths(package)
    assert theirs[0] == pytest.approx(1e-2, rel=1e-5)
    assert theirs[-1] > 9 * theirs[0]


def test_epsilon_stands_beside_the_corrected_root_as_in_torch() -> None:
    """Different from the package, which adds it before the correction; without the average it is torch's AdamW."""
    options = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1}
    plain = {"lamb": 0.0, "gamma": 0.0}
    reference = train(torch.optim.AdamW(make(), **options))
    for one, other in zip(reference, train(GrokAdamW(make(), **options, **plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    theirs = train(package(make(), **options, **plain))
    differences = [(one - other).abs().flatten() for one, other in zip(reference, theirs, strict=True)]
    assert torch.cat(differences).max() > 1e-3


def test_gradients_are_not_clipped() -> None:
    """Different from the package, whose default overwrites each gradient with its clipped self."""
    parameters = make()
    optimizer = GrokAdamW(parameters)
    set_gradients(parameters, 0)
    before = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    optimizer.step()
    assert_same(before, [parameter.grad for parameter in parameters if parameter.grad is not None])


@pytest.mark.parametrize(
    ("train_loss", "eval_loss", "signal"),
    [
        (1.0, 2.0, 0.5),
        (2.0, 1.0, 0.0),
        (0.0, 2.0, 1.0),
        (0.0, 0.0, 0.0),
        (-2.0, -1.0, 0.0),
        (-1.0, 1.0, 2.0),
        (None, 1.0, 0.0),
        (1.0, None, 0.0),
        (math.nan, 1.0, 0.0),
        (1.0, math.inf, 0.0),
    ],
)
def test_the_signal(train_loss: float | None, eval_loss: float | None, signal: float) -> None:
    assert grokking_signal(train_loss, eval_loss) == signal
    if eval_loss != math.inf:
        assert package(make())._default_grokking_signal(train_loss, eval_loss) == signal  # type: ignore[attr-defined]


# --- the state -------------------------------------------------------------------------------------------------------


def test_groups_added_later_count_on_their_own() -> None:
    first, second = make(), make()
    optimizer = GrokAdamW(first)
    optimizer.add_param_group({"params": second})
    weights = train(optimizer)
    assert_same(weights[: len(first)], train(GrokAdamW(make())))


def test_own_clipping_is_refused() -> None:
    with pytest.raises(InvalidOption, match=r"gradient_clipping=1 .* Trainer\(gradient_clip_val=1\)"):
        parse(ROW.options, "alpha_init=0.9,lamb=1,gamma=0.2,gradient_clipping=1.0", ROW.name)
    options = parse(ROW.options, "beta1=0.8,gradient_clipping=0", ROW.name)
    assert "gradient_clipping" not in options.select("group", "constructor")


# --- the callback ----------------------------------------------------------------------------------------------------


class Lit(L.LightningModule):
    """Trains with GrokAdamW, or another optimizer; logs its losses as told."""

    def __init__(self, optimizer: type = GrokAdamW, **logged: Any) -> None:
        super().__init__()
        self.model = TokenModel(16)
        self.optimizer, self.logged = optimizer, logged

    def _loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(self.model(batch[0]).flatten(0, 1), batch[1].flatten())

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, **self.logged)
        return loss

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=1e-2)


class Seen(Callback):
    """Records what the groups say at the start of every training batch."""

    def __init__(self) -> None:
        self.losses: list[tuple[Any, Any]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        (pair,) = {(group["train_loss"], group["eval_loss"]) for group in trainer.optimizers[0].param_groups}
        self.losses.append(pair)


def fit(model: Lit | None = None, *callbacks: Callback, ckpt_path: Any = None, **flags: Any) -> tuple[Lit, L.Trainer]:
    torch.manual_seed(0)
    model = model or Lit()
    run = trainer(**{"max_epochs": 3, **flags}, callbacks=list(callbacks))
    run.fit(model, loader(4), loader(2, seed=1), ckpt_path=ckpt_path)
    return model, run


@pytest.mark.parametrize("strategy", ["auto", "layerwise"])
def test_losses_reach_the_optimizer_after_each_validation(strategy: str) -> None:
    seen = Seen()
    torch.manual_seed(0)
    _, run = fit(Lit(), GrokkingSignal(), seen, val_check_interval=2, strategy=strategy)
    (optimizer,) = run.optimizers
    # Batches 0 and 1 know nothing, also of the sanity check; then each validation's losses count for two batches.
    assert seen.losses[:2] == [(None, None)] * 2
    assert seen.losses[::2] == seen.losses[1::2]
    assert len(set(seen.losses)) == 6
    assert all(type(loss) is float for pair in seen.losses[2:] for loss in pair)
    assert optimizer.param_groups[0]["eval_loss"] == run.callback_metrics["val_loss"].item()
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    run.validate(Lit(), loader(2, seed=3), verbose=False)
    assert optimizer.state_dict()["param_groups"] == before


def test_layerwise_equals_plain_and_the_signal_counts() -> None:
    def weights(*callbacks: Callback, **flags: Any) -> list[Tensor]:
        torch.manual_seed(0)
        return [p.detach() for p in fit(Lit(), *callbacks, **flags)[0].parameters()]

    plain = weights(GrokkingSignal())
    assert_same(plain, weights(GrokkingSignal(), strategy="layerwise"))
    # The other way round, the model seems to overfit.
    swapped = weights(GrokkingSignal("val_loss", "train_loss"))
    assert any(not torch.equal(one, other) for one, other in zip(plain, swapped, strict=True))


def test_attached_by_hand() -> None:
    def outcome(layerwise: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = TokenModel(16)
        optimizer = GrokAdamW(model.parameters(), lr=1e-2)
        attached = Layerwise(optimizer, bucket_mb=0) if layerwise else None
        for number, (tokens, targets) in enumerate(loader(6)):
            tell(optimizer, {"train_loss": 1.0, "eval_loss": 1.0 + number})
            loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
            if attached:
                attached.backward(loss)
            else:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return [parameter.detach() for parameter in model.parameters()]

    assert_same(outcome(False), outcome(True))


Outcome = tuple[Lit, L.Trainer, Seen]


def resumed_and_not(step: int, when: dict[str, Any], directory: Path, **flags: Any) -> list[Outcome]:
    """Trains at once and resumed from ``step``; the losses are swapped, so that there is a signal."""
    outcomes = []
    for checkpoint in (None, directory / f"step={step}.ckpt"):
        seen = Seen()
        own = directory if checkpoint is None else directory / "again"
        saver = ModelCheckpoint(own, filename="{step}", save_top_k=-1, **when)
        callbacks = (GrokkingSignal("val_loss", "train_loss"), seen, saver)
        model, run = fit(Lit(), *callbacks, ckpt_path=checkpoint, enable_checkpointing=True, max_epochs=4, **flags)
        outcomes.append((model, run, seen))
    return outcomes


AFTER_VALIDATION = {"every_n_epochs": 1, "save_on_train_epoch_end": False}


@pytest.mark.parametrize("strategy", ["auto", "layerwise"])
@pytest.mark.parametrize(
    ("when", "step", "interval"),
    [(AFTER_VALIDATION, 4, 1), (AFTER_VALIDATION, 8, 1), ({"every_n_train_steps": 4}, 12, 2)],
)
def test_resume_is_exact(when: dict[str, Any], step: int, interval: int, strategy: str, tmp_path: Path) -> None:
    flags = {"strategy": strategy, "check_val_every_n_epoch": interval}
    (whole, run, before), (resumed, again, after) = resumed_and_not(step, when, tmp_path, **flags)
    assert after.losses == before.losses[step:]
    assert grokking_signal(*after.losses[-1]) > 0
    assert_same([p.detach() for p in whole.parameters()], [p.detach() for p in resumed.parameters()])
    assert run.optimizers[0].state_dict()["param_groups"] == again.optimizers[0].state_dict()["param_groups"]


def test_a_checkpoint_before_a_validation_lacks_its_losses(tmp_path: Path) -> None:
    """Lightning does not repeat that validation: documented."""
    (_, _, before), (_, _, after) = resumed_and_not(8, {"every_n_train_steps": 8}, tmp_path)
    assert after.losses[:4] == before.losses[4:8] != before.losses[8:12]


@pytest.mark.parametrize(
    ("on_step", "name", "unknown"),
    [(False, "train_loss", 8), (True, "train_loss", 4), (True, "train_loss_epoch", 8), (True, "train_loss_step", 4)],
)
def test_a_loss_logged_per_epoch_is_known_an_epoch_later(on_step: bool, name: str, unknown: int) -> None:
    seen = Seen()
    fit(Lit(on_step=on_step, on_epoch=True), GrokkingSignal(name), seen)
    # Four batches per epoch, one validation at its end.
    assert [pair[0] is None for pair in seen.losses] == [True] * unknown + [False] * (12 - unknown)
    assert [pair[1] is None for pair in seen.losses] == [True] * 4 + [False] * 8


def test_without_grokadamw_it_is_refused() -> None:
    with pytest.raises(IncompatibleTrainer, match=r"trains with 'SGD'\. Set optim='grokadamw'"):
        fit(Lit(torch.optim.SGD), GrokkingSignal())


class Started(Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("a batch was trained on")


@pytest.mark.parametrize("flags", [{"limit_val_batches": 0}, {}])
def test_without_validation_it_is_refused(flags: dict[str, Any]) -> None:
    run = trainer(max_epochs=1, callbacks=[GrokkingSignal(), Started()], **flags)
    with pytest.raises(IncompatibleTrainer, match="reads 'val_loss' after each validation, but there is none"):
        run.fit(Lit(), loader(2), loader(2) if flags else None)


@pytest.mark.parametrize("names", [("loss", "val_loss"), ("train_loss", "eval_loss"), ("train_loss_epoch", "val_loss")])
def test_a_loss_that_is_not_logged_is_refused_at_the_first_validation(names: tuple[str, str]) -> None:
    (wrong,) = set(names) - {"train_loss", "val_loss"}
    with pytest.raises(IncompatibleTrainer, match=f"'{wrong}' was not logged; there are 'train_loss', 'val_loss'"):
        fit(Lit(), GrokkingSignal(*names), max_epochs=1)


_TWO_RANKS = """
import torch
from lightning.pytorch.callbacks import Callback
from lightning_optim import GrokkingSignal
from tests.models import loader, trainer
from tests.optimizers.test_grokadamw import Lit

class Ranks(Lit):
    def training_step(self, batch, batch_idx):
        self.log("only_rank_zero", 0.25, rank_zero_only=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 1.0 + self.global_rank, sync_dist=False)

class Check(Callback):
    def on_train_end(self, trainer, pl_module):
        (group,) = trainer.optimizers[0].param_groups
        assert (group["train_loss"], group["eval_loss"]) == (0.25, 1.5), group

if __name__ == "__main__":
    callbacks = [GrokkingSignal("only_rank_zero"), Check()]
    trainer(max_epochs=1, strategy="ddp_fork", devices=2, callbacks=callbacks).fit(Ranks(), loader(4), loader(2))
    print("EQUAL")
"""


def test_two_ranks_get_the_same_losses(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(_TWO_RANKS)
    done = run_fresh(str(script))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "EQUAL" in done.stdout
