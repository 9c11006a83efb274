"""Schedule-free optimizers under Lightning (contract C8): the right mode at every moment, averages in every file."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import (
    IncompatibleTrainer,
    InvalidOption,
    OptimCallback,
    OptimMixin,
    ScheduleFreeCallback,
)
from lightning_optim.stepping._averaging import KeepsTrainingPoint
from tests.models import ForeignTokens, LitTokens, loader, trainer

NAMES = ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd")
LR = {"schedule_free_sgd": 3.0}
Weights = dict[str, Tensor]


def lit(name: str, **kwargs: Any) -> LitTokens:
    return LitTokens(optim=name, lr=LR.get(name, 3e-2), **kwargs)


def weights(module: nn.Module) -> Weights:
    """Copies of the parameters as they are, past any state-dict hook."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def averaged(optimizer: KeepsTrainingPoint, module: nn.Module) -> Weights:
    """The averaged weights, computed from the training point as schedulefree computes them."""
    result = weights(module)
    for group in optimizer.param_groups:
        beta = group["betas"][0] if "betas" in group else group["momentum"]
        for name, parameter in module.named_parameters():
            if any(parameter is p for p in group["params"]) and "z" in optimizer.state[parameter]:
                y = optimizer.state[parameter].get("y", parameter.detach())
                result[name] = y.lerp(optimizer.state[parameter]["z"], 1 - 1 / beta)
    return result


def assert_same(left: Weights, right: Weights) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def differ(left: Weights, right: Weights) -> bool:
    return any(not torch.equal(left[name], right[name]) for name in left)


class Watch(Callback):
    """Records at every hook which mode the optimizer is in and whether the weights are the averaged ones."""

    def __init__(self) -> None:
        self.modes: dict[str, set[bool]] = {}

    def _see(self, hook: str, trainer: L.Trainer, module: L.LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        self.modes.setdefault(hook, set()).add(optimizer.training)
        if not optimizer.training:
            assert_same(weights(module), averaged(optimizer, module))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._see("train_batch_start", trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._see("optimizer_step", trainer, pl_module)

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        self._see("sanity", trainer, pl_module)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._see("validation", trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._see("validation_end", trainer, pl_module)

    def on_test_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._see("test", trainer, pl_module)

    def on_predict_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._see("predict", trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._see("train_end", trainer, pl_module)


@pytest.mark.parametrize("name", NAMES)
def test_train_mode_exactly_while_training(name: str) -> None:
    watch = Watch()
    model = lit(name)
    run = trainer(max_epochs=3, callbacks=[watch], val_check_interval=3, accumulate_grad_batches=2)
    run.fit(model, loader(), loader(batches=2, seed=1))
    after_fit = weights(model)
    run.validate(model, loader(batches=2, seed=1), verbose=False)
    run.test(model, loader(batches=2, seed=2), verbose=False)
    run.predict(model, loader(batches=2, seed=3))
    training = {"train_batch_start", "optimizer_step"}
    assert watch.modes == {
        hook: {hook in training}
        for hook in (*training, "sanity", "validation", "validation_end", "test", "predict", "train_end")
    }
    assert_same(weights(model), after_fit)
    assert not any(isinstance(callback, ScheduleFreeCallback) for callback in run.callbacks)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "saver",
    [
        {"every_n_train_steps": 3},
        {"every_n_train_steps": 3, "save_weights_only": True},
        {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        {"every_n_epochs": 1, "save_on_train_epoch_end": False, "monitor": "val_loss"},
        {"every_n_epochs": 1, "save_weights_only": True},
    ],
    ids=lambda saver: "+".join(saver),
)
def test_every_checkpoint_holds_the_averaged_weights(name: str, saver: dict[str, Any], tmp_path: Path) -> None:
    expected: dict[int, Weights] = {}

    class Record(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            expected[trainer.global_step] = averaged(trainer.optimizers[0], pl_module)

    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **saver)
    run = trainer(max_epochs=2, callbacks=[Record(), checkpoints], enable_checkpointing=True)
    model = lit(name)
    run.fit(model, loader(), loader(batches=2, seed=1))
    files = sorted(tmp_path.glob("*.ckpt"))
    assert files
    for path in files:
        saved = torch.load(path, weights_only=True)
        assert_same(saved["state_dict"], expected[saved["global_step"]])
        loaded = LitTokens.load_from_checkpoint(path)
        assert_same(weights(loaded), expected[saved["global_step"]])
    assert_same(weights(model), expected[run.global_step])


def test_saving_does_not_disturb_the_training(tmp_path: Path) -> None:
    finals = []
    for save in (False, True):
        torch.manual_seed(1)
        model = lit("schedule_free_adamw")
        saver = [ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)] if save else []
        run = trainer(max_epochs=2, callbacks=saver, enable_checkpointing=save, val_check_interval=2 if save else 1.0)
        run.fit(model, loader(), loader(batches=2, seed=1) if save else None)
        finals.append(weights(model))
    assert_same(*finals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switching_does_not_drift(dtype: torch.dtype) -> None:
    """Upstream drifts by 6e-8 in float32 and 2e-3 in bfloat16 over 100 switches."""
    from lightning_optim import build_optimizer

    model = nn.Linear(64, 64).to(dtype)
    optimizer = build_optimizer(model, "schedule_free_adamw")
    optimizer.train()
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 64, dtype=dtype)).square().mean().backward()
        optimizer.step()
    point = weights(model)
    for _ in range(100):
        optimizer.eval()
        assert differ(weights(model), point)
        optimizer.train()
    assert_same(weights(model), point)


class Stop(RuntimeError):
    pass


@pytest.mark.parametrize("where", ["training_step", "validation_step", "on_before_optimizer_step"])
def test_an_exception_leaves_averaged_weights_and_nothing_attached(where: str, tmp_path: Path) -> None:
    class Breaks(LitTokens):
        def fails(self, *_: Any) -> None:
            if self.global_step == 4:
                self.expected = averaged(self.trainer.optimizers[0], self)
                raise Stop

    def step(self: Any, *args: Any) -> Any:
        self.fails()
        return getattr(super(Breaks, self), where)(*args)

    setattr(Breaks, where, step)
    model = Breaks(optim="schedule_free_adamw", lr=3e-2)
    run = trainer(
        max_epochs=2,
        val_check_interval=2,
        callbacks=[OnExceptionCheckpoint(tmp_path, filename="broken")],
        enable_checkpointing=True,
    )
    with pytest.raises(Stop):
        run.fit(model, loader(), loader(batches=2, seed=1))
    assert_same(weights(model), model.expected)
    assert_same(torch.load(tmp_path / "broken.ckpt", weights_only=True)["state_dict"], model.expected)
    assert not model._state_dict_hooks
    assert not any(isinstance(callback, ScheduleFreeCallback) for callback in run.callbacks)


def test_early_stopping_leaves_averaged_weights() -> None:
    model = lit("schedule_free_adamw")
    stopping = EarlyStopping("val_loss", patience=1, min_delta=1e9)
    run = trainer(max_epochs=50, callbacks=[stopping])
    run.fit(model, loader(), loader(batches=2, seed=1))
    assert run.current_epoch < 5
    assert not run.optimizers[0].training
    assert_same(weights(model), averaged(run.optimizers[0], model))


def test_a_second_fit_continues_from_the_average() -> None:
    model = lit("schedule_free_adamw")
    run = trainer(max_epochs=1)
    run.fit(model, loader())
    first = weights(model)
    run = trainer(max_epochs=1)
    run.fit(model, loader())
    assert differ(weights(model), first)
    assert model.losses[-1] < model.losses[9]
    assert not model._state_dict_hooks


def test_copies_made_while_fit_runs_are_independent() -> None:
    copies = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            copies.append((copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module)), weights(pl_module)))

    model = lit("schedule_free_adamw")
    trainer(max_steps=3, callbacks=[Copy()]).fit(model, loader())
    assert len(copies) == 3
    for deep, pickled, at_the_time in copies:
        assert_same(weights(deep), at_the_time)
        assert_same(dict(deep.state_dict()), at_the_time)
        assert_same(dict(pickled.state_dict()), at_the_time)


def test_tied_weights_are_averaged_under_both_names(tmp_path: Path) -> None:
    class Tied(LitTokens):
        def __init__(self, **optim: Any) -> None:
            super().__init__(**optim)
            self.model.head.weight = self.model.embedding.weight

    model = Tied(optim="schedule_free_adamw", lr=3e-2)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=5, filename="{step}", save_top_k=-1)
    trainer(max_steps=5, callbacks=[saver], enable_checkpointing=True).fit(model, loader())
    saved = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["model.head.weight"], saved["model.embedding.weight"])
    assert torch.equal(saved["model.head.weight"], model.model.head.weight)


def test_optim_callback_attaches_it_too(tmp_path: Path) -> None:
    model = ForeignTokens()
    watch = Watch()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, filename="{step}", save_weights_only=True)
    callbacks = [OptimCallback("schedule_free_adamw", lr=3e-2), watch, saver]
    trainer(max_steps=4, callbacks=callbacks, enable_checkpointing=True).fit(model, loader())
    assert watch.modes["optimizer_step"] == {True}
    assert watch.modes["train_end"] == {False}
    assert_same(torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"], weights(model))


def test_manual_optimization_of_two_optimizers() -> None:
    class Two(OptimMixin, L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.left, self.right = nn.Linear(4, 1), nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer, module in zip(self.optimizers(), (self.left, self.right), strict=True):
                optimizer.zero_grad()
                self.manual_backward(module(batch[0]).square().mean())
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [
                self.build_optimizer(self.left, "schedule_free_sgd", lr=0.1),
                self.build_optimizer(self.right, "adamw_torch"),
            ]

    model = Two()
    run = trainer(max_steps=12)
    run.fit(model, DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=8))
    assert not run.optimizers[0].training
    assert_same(weights(model), averaged(run.optimizers[0], model) | {})


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_plain_state_dict_tells_the_mode_it_was_saved_in(mode: str) -> None:
    """As upstream's: what was saved in train mode goes with weights at the training point."""
    from lightning_optim import build_optimizer

    models = [nn.Linear(8, 8) for _ in range(2)]
    optimizers = [build_optimizer(model, "schedule_free_adamw", lr=0.1) for model in models]
    optimizers[0].train()
    for _ in range(3):
        models[0](torch.randn(4, 8)).square().mean().backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    getattr(optimizers[0], mode)()
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for switch in ("train", "eval", "train"):
        for optimizer in optimizers:
            getattr(optimizer, switch)()
        assert_same(weights(models[1]), weights(models[0]))
    before = weights(models[0])
    optimizers[0].load_state_dict(optimizers[0].state_dict())
    optimizers[0].train()
    assert_same(weights(models[0]), before)


def test_the_learning_rate_finder_runs_without_the_callbacks(tmp_path: Path) -> None:
    from lightning.pytorch.tuner import Tuner

    model = lit("schedule_free_adamw")
    before = weights(model)
    run = trainer(max_epochs=2, default_root_dir=tmp_path, enable_checkpointing=True)
    Tuner(run).lr_find(model, loader(), num_training=30, min_lr=1e-4, max_lr=1e-1)
    assert_same(weights(model), before)
    run.fit(model, loader())
    fresh = lit("schedule_free_adamw")
    fresh.load_state_dict(before)
    fresh.lr = model.lr
    trainer(max_epochs=2).fit(fresh, loader())
    assert_same(weights(fresh), weights(model))


def test_momentum_must_not_be_cycled() -> None:
    class Cycles(LitTokens):
        def configure_optimizers(self) -> Any:
            optimizer = self.build_optimizer()
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    with pytest.raises(IncompatibleTrainer, match=r"OneCycleLR cycles the momentum.*Give it cycle_momentum=False"):
        trainer(max_steps=3).fit(Cycles(optim="schedule_free_adamw"), loader())


class ConvNet(OptimMixin, L.LightningModule):
    """A classifier with BatchNorm, whose statistics belong to the weights they were collected with."""

    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def points(persistent: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    x = torch.randn(256, 8) * 3 + 1
    data = TensorDataset(x, (x.sum(1) > 8).long())
    return DataLoader(data, batch_size=64, shuffle=True, persistent_workers=persistent, num_workers=int(persistent))


def test_batchnorm_statistics_are_recalibrated_for_the_averaged_weights() -> None:
    results = {}
    for bn_batches in (0, 4):
        torch.manual_seed(3)
        model, data = ConvNet(optim="schedule_free_sgd", lr=1.0), points()
        recalibration = ScheduleFreeCallback(bn_batches=bn_batches)
        run = trainer(max_epochs=4, callbacks=[recalibration])
        run.fit(model, data, data)
        norm = model.net[1]
        # All 4 batches make the whole data set, and their order does not matter to the averages.
        inputs = model.net[0](data.dataset.tensors[0])
        results[bn_batches] = (weights(model), (norm.running_mean - inputs.mean(0)).abs().max().item())
        assert norm.momentum == 0.1
        assert any(callback is recalibration for callback in run.callbacks)
    (plain, plain_error), (recalibrated, error) = results[0], results[4]
    assert_same(plain, recalibrated)
    assert error < 1e-4
    assert plain_error > 100 * error


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_recalibration_sees_batches_as_training_does(precision: str) -> None:
    class Named(ConvNet):
        """Takes its data from a dict, shifted before the transfer to the device."""

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {name: [values[0] + 5, values[1]] for name, values in batch.items()}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["points"], batch_idx)

    class OfNamed(ScheduleFreeCallback):
        def recalibration_forward(self, pl_module: Any, batch: Any) -> None:
            super().recalibration_forward(pl_module, batch["points"])

    model, data = Named(optim="schedule_free_sgd", lr=1.0), points()
    trainer(max_epochs=2, precision=precision, callbacks=[OfNamed(bn_batches=4)]).fit(model, {"points": data})
    mean = model.net[0].float()(data.dataset.tensors[0] + 5).mean(0)
    torch.testing.assert_close(model.net[1].running_mean.float(), mean, rtol=2e-2, atol=2e-2)


def test_recalibration_refuses_what_cannot_work() -> None:
    with pytest.raises(InvalidOption, match=r"bn_batches=-1.*0 switches recalibration off"):
        ScheduleFreeCallback(bn_batches=-1)
    with pytest.raises(IncompatibleTrainer, match=r"bn_batches=5.*no BatchNorm.*Leave bn_batches out"):
        trainer(max_steps=2, callbacks=[ScheduleFreeCallback(bn_batches=5)]).fit(lit(NAMES[0]), loader())
    model, data = ConvNet(optim="schedule_free_sgd"), points(persistent=True)
    with pytest.raises(IncompatibleTrainer, match=r"persistent_workers=True.*Set persistent_workers=False"):
        trainer(max_epochs=1, callbacks=[ScheduleFreeCallback(bn_batches=5)]).fit(model, data)
    assert not model._state_dict_hooks


def test_state_written_by_upstream_is_read_as_upstream_reads_it() -> None:
    import schedulefree

    from lightning_optim import build_optimizer

    torch.manual_seed(0)
    models = [nn.Linear(8, 8) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    theirs = schedulefree.AdamWScheduleFree(models[0].parameters(), lr=0.1, foreach=True)
    ours = build_optimizer(list(models[1].parameters()), "schedule_free_adamw", lr=0.1)
    theirs.train()
    for _ in range(3):
        models[0](torch.randn(4, 8)).square().mean().backward()
        theirs.step()
        theirs.zero_grad()
    theirs.eval()
    saved = theirs.state_dict()
    # Upstream has one group, ours two (decay, no_decay): the same parameters, divided the same way.
    decay, no_decay = (dict(saved["param_groups"][0], params=[index]) for index in (0, 1))
    models[1].load_state_dict(models[0].state_dict())
    ours.load_state_dict({"state": saved["state"], "param_groups": [decay, no_decay]})
    theirs.train()
    ours.train()
    assert_same(weights(models[1]), weights(models[0]))


@pytest.mark.parametrize("beta2", [0.6, 0.5])
def test_radam_that_would_never_leave_its_silent_phase_is_refused(beta2: float) -> None:
    from lightning_optim import build_optimizer

    asked = {"betas": (0.9, beta2)}
    for arguments in ({"optim_args": asked}, {"param_groups": {"weight": asked}}):
        with pytest.raises(InvalidOption, match=r"no weight ever moves.*above 0\.6.*silent_sgd_phase=False"):
            build_optimizer(nn.Linear(2, 2), "schedule_free_radam", **arguments)


@pytest.mark.parametrize(("beta2", "silent"), [(0.601, True), (0.6, False)])
def test_radam_at_the_bound_moves(beta2: float, silent: bool) -> None:
    from lightning_optim import build_optimizer

    model = nn.Linear(2, 2)
    before = weights(model)["weight"]
    options = {"betas": (0.9, beta2), "silent_sgd_phase": silent}
    optimizer: Any = build_optimizer(model, "schedule_free_radam", optim_args=options)
    optimizer.train()
    for _ in range(40):
        model(torch.ones(1, 2)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(model.weight, before)
