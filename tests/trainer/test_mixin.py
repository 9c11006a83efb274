"""OptimMixin, OptimCallback and build_optimizer under Lightning, in Fabric and by hand."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from lightning_optim import (
    IncompatibleTrainer,
    InvalidOption,
    MissingDependency,
    OptimCallback,
    OptimMixin,
    UnknownOptimizer,
    build_optimizer,
    build_schedule,
)
from tests.cases import BY_NAME, NAMES
from tests.models import ForeignTokens, LitTokens, TokenModel, loader, trainer


def learning_rates(run: L.Trainer) -> list[float]:
    return [float(group["lr"]) for group in run.optimizers[0].param_groups]


class TestMixin:
    def test_mistakes_are_refused_when_the_module_is_made(self) -> None:
        with pytest.raises(UnknownOptimizer, match=r"no optimizer 'adamw_trch'.*'adamw_torch'"):
            LitTokens(optim="adamw_trch")
        with pytest.raises(InvalidOption, match=r"'adamw_torch' has no option 'beta'.*'betas'"):
            LitTokens(optim_args={"beta": 1})
        with pytest.raises(IncompatibleTrainer, match="warmup_steps=10 without lr_scheduler would be ignored"):
            LitTokens(warmup_steps=10)

    def test_the_order_of_the_bases_matters(self) -> None:
        with pytest.raises(IncompatibleTrainer, match=r"Write `class Wrong\(OptimMixin, L.LightningModule\)`"):

            class Wrong(L.LightningModule, OptimMixin):
                pass

    @pytest.mark.parametrize("collector", ["optim", "kwargs"])
    def test_hyperparameters_survive_saving_and_loading(self, collector: str, tmp_path: Path) -> None:
        """Lightning alone would lose ``optim`` where the collecting parameter is called ``**optim``."""
        namespace: dict[str, Any] = {"LitTokens": LitTokens}
        exec(
            "class Model(LitTokens):\n"
            f"    def __init__(self, width: int = 16, **{collector}):\n"
            f"        super().__init__(width, **{collector})\n",
            namespace,
        )
        model = namespace["Model"](optim="lion_8bit", lr=1e-3, optim_args={"betas": [0.5, 0.6]})
        run = trainer(max_steps=1)
        run.fit(model, loader())
        run.save_checkpoint(tmp_path / "model.ckpt")
        loaded = namespace["Model"].load_from_checkpoint(tmp_path / "model.ckpt")
        assert loaded.optim_config == model.optim_config
        assert loaded.hparams == {"width": 16, "optim": "lion_8bit", "lr": 1e-3, "optim_args": {"betas": [0.5, 0.6]}}

    def test_ignored_hyperparameters_stay_ignored(self) -> None:
        class Model(OptimMixin, L.LightningModule):
            def __init__(self, width: int = 2, **optim: Any) -> None:
                super().__init__(**optim)
                self.save_hyperparameters(ignore="optim")

        assert Model(optim="sgd", lr=0.1).hparams == {"width": 2, "lr": 0.1}

    def test_a_missing_package_is_no_obstacle_to_inference(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The request is checked when the module is made, the package when the optimizer is built."""
        from lightning_optim.table._registry import REGISTRY

        requirement = REGISTRY["lion_8bit"].requirements[0]
        run = trainer(max_steps=1)
        run.fit(LitTokens(optim="lion_8bit"), loader())
        run.save_checkpoint(tmp_path / "model.ckpt")
        monkeypatch.setattr(type(requirement), "installed_version", lambda self: None)
        model = LitTokens.load_from_checkpoint(tmp_path / "model.ckpt")
        trainer().validate(model, loader(batches=1), verbose=False)
        with pytest.raises(MissingDependency, match=r"optim='lion_8bit'.*pip install --upgrade 'bitsandbytes"):
            trainer(max_steps=1).fit(model, loader())
        assert not model.losses

    def test_lr_find_sets_the_learning_rate(self, tmp_path: Path) -> None:
        model = LitTokens(optim="adamw_torch_fused", lr_scheduler="cosine", warmup_steps=0.5)
        run = trainer(max_steps=40, default_root_dir=tmp_path, enable_checkpointing=True)
        found = Tuner(run).lr_find(model, loader(), num_training=40, min_lr=1e-4, max_lr=1.0)
        assert found is not None
        assert model.lr == found.suggestion() is not None
        run.fit(model, loader())
        assert [group["initial_lr"] for group in run.optimizers[0].param_groups] == [model.lr] * 2

    def test_learning_rate_can_be_set_by_hand_and_is_checked(self) -> None:
        model = LitTokens(lr=1e-3)
        model.lr = 5e-3
        assert model.optim_config.lr == 5e-3
        with pytest.raises(InvalidOption, match="lr=-1"):
            model.lr = -1

    def test_torch_schedulers_in_the_usual_way(self) -> None:
        class Model(LitTokens):
            def configure_optimizers(self) -> Any:
                optimizer = self.build_optimizer(self, "lion_8bit", lr=1e-3)
                scheduler = OneCycleLR(optimizer, max_lr=1e-2, total_steps=20, cycle_momentum=False)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        run = trainer(max_steps=6)
        run.fit(Model(), loader())
        assert max(learning_rates(run)) == pytest.approx(1e-2, rel=0.1)

    def test_own_arguments_are_build_optimizers_defaults(self) -> None:
        model = LitTokens(optim="sgd", lr=0.5, optim_args={"momentum": 0.9})
        optimizer = model.build_optimizer(model.model.head)
        assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
        model = LitTokens(optim="sgd", lr=0.5, lr_scheduler="linear", warmup_steps=0.1)
        assert [group["lr"] for group in model.build_optimizer().param_groups] == [0.5, 0.5]
        optimizer = model.build_optimizer(optim="adagrad")
        assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2]

    @pytest.mark.parametrize("scheduler", ["linear", "cosine", "warmup_stable_decay"])
    def test_schedules_span_the_whole_training(self, scheduler: str) -> None:
        args = {"num_decay_steps": 6} if scheduler == "warmup_stable_decay" else None
        model = LitTokens(lr=1e-2, lr_scheduler=scheduler, lr_scheduler_args=args, warmup_steps=0.25)
        seen: list[float] = []

        class Record(L.Callback):
            def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
                seen.append(learning_rates(trainer)[0])

        # 10 batches by 2 make 5 steps an epoch, 20 in all, 5 of them warm-up.
        trainer(max_epochs=4, accumulate_grad_batches=2, callbacks=[Record()]).fit(model, loader())
        assert len(seen) == 20
        assert seen[:6] == pytest.approx([0, 0.002, 0.004, 0.006, 0.008, 0.01])
        assert seen[-1] < 0.002

    def test_a_schedule_without_an_end_is_refused(self) -> None:
        model = LitTokens(lr_scheduler="cosine")
        with pytest.raises(InvalidOption, match=r"lr_scheduler='cosine' needs the length.*Trainer\(max_steps="):
            trainer(max_epochs=-1, max_steps=-1).fit(model, loader())
        assert not model.losses
        model = LitTokens(lr_scheduler="constant_with_warmup", warmup_steps=0.1)
        with pytest.raises(InvalidOption, match=r"fraction of a training whose length is unknown"):
            trainer(max_epochs=-1, max_steps=-1).fit(model, loader())

    def test_reduce_on_plateau_watches_the_metric(self) -> None:
        args = {"monitor": "val_loss", "patience": 0, "factor": 0.1, "threshold": 1e6, "threshold_mode": "abs"}
        model = LitTokens(lr=1e-3, lr_scheduler="reduce_lr_on_plateau", lr_scheduler_args=args)
        run = trainer(max_epochs=5, check_val_every_n_epoch=2)
        run.fit(model, loader(), loader(batches=2, seed=1))
        # Validated after epochs 2 and 4; only the second can be worse than a best value.
        assert learning_rates(run) == pytest.approx([1e-4, 1e-4])

    def test_layer_decay_reaches_the_trainer(self) -> None:
        class Deep(LitTokens):
            def __init__(self, **optim: Any) -> None:
                super().__init__(**optim)
                self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
                self.head = nn.Linear(64, 2)

        optimizer = Deep(lr=1.0, layer_decay=0.5).configure_optimizers()
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["layer_0/decay"] == 0.5**4
        assert rates["layer_3/decay"] == 0.5
        assert rates["layer_4/decay"] == 1.0

    def test_hyperparameters_survive_helpers_and_overrides(self) -> None:
        class Model(OptimMixin, L.LightningModule):
            def __init__(self, width: int = 2, **optim: Any) -> None:
                super().__init__(**optim)
                self.keep()

            def keep(self) -> None:
                self.save_hyperparameters()

            def save_hyperparameters(self, *args: Any, **kwargs: Any) -> None:
                super().save_hyperparameters(*args, **kwargs)

        assert Model(optim="sgd", lr=0.1).hparams == {"width": 2, "optim": "sgd", "lr": 0.1}

        class Named(OptimMixin, L.LightningModule):
            def __init__(self, width: int = 2, **optim: Any) -> None:
                super().__init__(**optim)
                self.save_hyperparameters("width", "optim")

        assert Named(optim="sgd", lr=0.1).hparams == {"width": 2, "optim": "sgd"}

    def test_hyperparameters_of_any_kind_can_be_saved(self) -> None:
        class Model(OptimMixin, L.LightningModule):
            def __init__(self, weights: Any = None, **optim: Any) -> None:
                super().__init__(**optim)
                self.save_hyperparameters(ignore=["weights"])

        model = Model(np.zeros(3), optim="sgd")
        model.save_hyperparameters({"more": [1, 2]})
        assert model.hparams == {"optim": "sgd", "more": [1, 2]}

    def test_an_optim_that_nobody_looks_at_is_refused(self) -> None:
        class Own(LitTokens):
            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=self.lr)

        trainer(max_steps=1).fit(Own(lr=0.1), loader())
        model = Own(optim="lion_8bit", lr=0.1)
        with pytest.raises(IncompatibleTrainer, match=r"optim='lion_8bit' was given to Own.*self.build_optimizer\(\)"):
            trainer(max_steps=1).fit(model, loader())
        assert not model.losses

        class Parts(LitTokens):
            def configure_optimizers(self) -> Any:
                return self.build_optimizer(self.model, self.optim_config.optim, lr=self.lr)

        run = trainer(max_steps=1)
        run.fit(Parts(optim="lion_8bit", lr=0.1), loader())
        assert type(run.optimizers[0]).__name__ == "Lion"

    def test_a_checkpoint_is_loaded_by_the_class(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="cannot be called on an instance"):
            LitTokens().load_from_checkpoint(tmp_path / "any.ckpt")

    def test_named_schedules_follow_groups_that_are_added(self) -> None:
        class Unfreezes(L.Callback):
            def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
                if trainer.current_epoch == 1:
                    pl_module.late.requires_grad_(True)
                    trainer.optimizers[0].add_param_group({"params": [*pl_module.late.parameters()], "lr": 1.0})

        class Late(LitTokens):
            def __init__(self, **optim: Any) -> None:
                super().__init__(**optim)
                self.late = nn.Linear(2, 2).requires_grad_(False)

        run = trainer(max_epochs=2, callbacks=[Unfreezes()])
        run.fit(Late(lr=0.1, lr_scheduler="linear"), loader())
        # 20 steps, of which the schedule has taken all; the group's own peak is 1.
        assert learning_rates(run) == pytest.approx([0.0, 0.0, 0.0])


class TestReport:
    def test_every_optimizer_of_a_module_is_logged(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        trainer(max_steps=2, logger=logger).fit(GAN(), loader())
        saved = (Path(logger.log_dir) / "hparams.yaml").read_text()
        assert saved.index("optimizer_0:") < saved.index("identifier: lion_8bit") < saved.index("optimizer_1:")
        assert "identifier: adamw_torch" in saved

    def test_it_is_said_once_and_logged(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        model = LitTokens(optim="adamw_8bit", lr=1e-2, lr_scheduler="linear", warmup_steps=2)
        logger = CSVLogger(tmp_path)
        with caplog.at_level(logging.INFO):
            trainer(max_steps=2, logger=logger).fit(model, loader())
        (report,) = (record.getMessage() for record in caplog.records if "optim=" in record.getMessage())
        assert report.splitlines()[0].startswith(
            "optim='adamw_8bit': bitsandbytes.optim.AdamW (lr=0.01, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-08"
        )
        assert "decay/32bit     1 tensors         1,024 elements  lr=0.01, weight_decay=0.01, optim_bits=32" in report
        assert "schedule: linear, warmup_steps=2, total_steps=2; layerwise: no" in report
        saved = (Path(logger.log_dir) / "hparams.yaml").read_text()
        for expected in (
            "identifier: adamw_8bit",
            "class: bitsandbytes.optim.AdamW",
            "state_bytes:",
            "layerwise: false",
        ):
            assert expected in saved


class TestCallback:
    def test_it_replaces_the_optimizer_of_any_module_while_fit_runs(self) -> None:
        model = ForeignTokens()
        own = model.configure_optimizers
        before = model.model.head.weight.clone()
        run = trainer(max_steps=5, callbacks=[OptimCallback("lion_8bit", lr=1e-3, lr_scheduler="linear")])
        run.fit(model, loader())
        assert type(run.optimizers[0]).__name__ == "Lion"
        assert not torch.equal(model.model.head.weight, before)
        assert model.configure_optimizers == own
        assert "configure_optimizers" not in model.__dict__

    def test_equal_to_the_mixin(self) -> None:
        torch.manual_seed(1)
        foreign = ForeignTokens()
        lit = LitTokens(optim="adamw_torch", lr=1e-2)
        lit.model.load_state_dict(foreign.model.state_dict())
        trainer(max_steps=5).fit(lit, loader())
        trainer(max_steps=5, callbacks=[OptimCallback("adamw_torch", lr=1e-2)]).fit(foreign, loader())
        for ours, theirs in zip(lit.model.parameters(), foreign.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    def test_an_exception_gives_the_module_back(self) -> None:
        class Breaks(ForeignTokens):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                raise RuntimeError("broken")

        model = Breaks()
        with pytest.raises(RuntimeError, match="broken"):
            trainer(max_steps=5, callbacks=[OptimCallback("sgd")]).fit(model, loader())
        assert "configure_optimizers" not in model.__dict__

    def test_installed_for_good_where_the_module_has_no_optimizer(self) -> None:
        class Bare(ForeignTokens):
            configure_optimizers = L.LightningModule.configure_optimizers

        model, callback = Bare(), OptimCallback("sgd", lr=0.1)
        callback.install(model)
        for _ in range(2):
            run = trainer(max_steps=2, callbacks=[callback])
            run.fit(model, loader())
            assert type(run.optimizers[0]) is torch.optim.SGD

    def test_two_sources_are_refused(self) -> None:
        text = r"OptimCallback\(optim='sgd'\) together with LitTokens.*'adamw_torch'"
        with pytest.raises(IncompatibleTrainer, match=text):
            trainer(callbacks=[OptimCallback("sgd")], max_steps=1).fit(LitTokens(), loader())
        callbacks = [OptimCallback("sgd"), OptimCallback("sgd")]
        with pytest.raises(IncompatibleTrainer, match="two OptimCallbacks in one Trainer; keep one"):
            trainer(callbacks=callbacks, max_steps=1).fit(ForeignTokens(), loader())

    def test_the_learning_rate_finder_is_refused(self, tmp_path: Path) -> None:
        run = trainer(
            callbacks=[OptimCallback("sgd")], max_steps=1, default_root_dir=tmp_path, enable_checkpointing=True
        )
        model = ForeignTokens()
        model.lr = 0.1
        with pytest.raises(IncompatibleTrainer, match=r"update_attr=False.*OptimCallback\(lr=...\)"):
            Tuner(run).lr_find(model, loader())


class TestNothingStaysAttached:
    @pytest.mark.parametrize("name", ["adamw_torch", "lion_8bit", "stable_adamw", "schedule_free_adamw"])
    def test_a_second_fit_with_the_same_module_and_trainer(self, name: str) -> None:
        model = LitTokens(optim=name, lr=BY_NAME[name].lr)
        run = trainer(max_epochs=1)
        callbacks = len(run.callbacks)
        run.fit(model, loader())
        assert len(run.callbacks) == callbacks
        run.fit_loop.max_epochs = 2
        run.fit(model, loader())
        assert run.global_step == 20
        assert sum(model.losses[-5:]) < sum(model.losses[:5])
        assert len(run.callbacks) == callbacks

    @pytest.mark.parametrize("name", NAMES)
    def test_the_module_can_be_copied_and_pickled_before_and_after(self, name: str) -> None:
        model = LitTokens(optim=name)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert copied.optim_config == model.optim_config
        if "torchao" not in BY_NAME[name].upstream:
            trainer(max_steps=1).fit(model, loader())
        model.trainer = None
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), model.parameters(), strict=True))

    def test_a_compiled_module_trains(self) -> None:
        model = LitTokens(optim="schedule_free_adamw", lr=3e-2)
        model.model = torch.compile(model.model, backend="eager")
        run = trainer(max_epochs=2)
        run.fit(model, loader(), loader(batches=1))
        assert sum(model.losses[-5:]) < sum(model.losses[:5])
        assert set(run.optimizers[0].state_dict()["param_groups"][0]) >= {"name", "lr"}


class GAN(OptimMixin, L.LightningModule):
    """Two networks, two optimizers by name, manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(4, 8), nn.Linear(8, 1)

    def configure_optimizers(self) -> Any:
        generator = self.build_optimizer(self.generator, "lion_8bit", lr=1e-3)
        critic = self.build_optimizer(self.critic.named_parameters(), "adamw_torch", weight_decay=0.5)
        schedule = build_schedule(critic, "linear", total_steps=10, warmup_steps=2)
        return [generator, critic], [schedule]

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        generator, critic = self.optimizers()
        noise = torch.randn(8, 4)
        loss = F.softplus(self.critic(self.generator(noise))).mean()
        critic.zero_grad()
        self.manual_backward(loss)
        critic.step()
        self.lr_schedulers().step()
        generator.zero_grad()
        self.manual_backward(F.softplus(-self.critic(self.generator(noise))).mean())
        generator.step()


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GAN()
    before = copy.deepcopy(model.state_dict())
    saver = ModelCheckpoint(tmp_path, filename="gan")
    run = trainer(max_steps=8, callbacks=[saver], enable_checkpointing=True)
    run.fit(model, loader())
    assert [type(optimizer).__name__ for optimizer in run.optimizers] == ["Lion", "AdamW"]
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [group["weight_decay"] for group in run.optimizers[1].param_groups] == [0.5, 0.0]
    assert len(torch.load(tmp_path / "gan.ckpt", weights_only=True)["optimizer_states"]) == 2


@pytest.mark.parametrize("name", ["adamw_torch", "lion_8bit", "schedule_free_adamw"])
def test_fabric(name: str) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    model = TokenModel()
    optimizer = build_optimizer(model, name, lr=BY_NAME[name].lr)
    wrapped, fabric_optimizer = fabric.setup(model, optimizer)
    if name == "schedule_free_adamw":
        optimizer.train()
    losses = []
    for tokens, targets in fabric.setup_dataloaders(loader()):
        loss = F.cross_entropy(wrapped(tokens).flatten(0, 1), targets.flatten())
        fabric_optimizer.zero_grad()
        fabric.backward(loss)
        fabric_optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_stable_adamw_moves_from_gpu_to_cpu() -> None:
    """Upstream's checkpoint says triton=True when it comes from a GPU, and then fails on a CPU."""
    model = nn.Linear(8, 8)
    optimizer = build_optimizer(model, "stable_adamw")

    def step() -> None:
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()

    step()
    from_gpu = optimizer.state_dict()
    for group in from_gpu["param_groups"]:
        group["triton"] = True
    optimizer.load_state_dict(from_gpu)
    step()
    assert [group["triton"] for group in optimizer.param_groups] == [False, False]
    assert [group["step"].item() for group in optimizer.param_groups] == [2, 2]


@pytest.mark.parametrize("stepped", [True, False])
def test_stable_adamw_moves_from_cpu_to_gpu(stepped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream makes what its kernels need with the state, on a CPU without them."""
    model = nn.Linear(8, 8)
    before, after = build_optimizer(model, "stable_adamw"), build_optimizer(model, "stable_adamw")
    if stepped:
        model(torch.randn(4, 8)).square().mean().backward()
        before.step()
    monkeypatch.setattr("lightning_optim.optimizers.adapters._optimi._on_gpu", lambda parameters: True)
    after.load_state_dict(before.state_dict())
    assert [group["triton"] for group in after.param_groups] == [True, True]
    for parameter in model.parameters():
        assert after.state[parameter]["mean_square"].dtype is torch.float32
        assert ("kahan_comp" in after.state[parameter]) == stepped
        if stepped:
            assert after.state[parameter]["kahan_comp"].dtype is torch.uint8
