"""What a module's own loop expects from configure_optimizers: given, refused before the first batch, or said."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, StepLR

from lightning_optim import IncompatibleTrainer, InvalidOption, OptimCallback, OptimMixin, build_optimizer
from tests.models import ForeignTokens, LitTokens, loader, trainer


class Own(ForeignTokens):
    """Foreign, with SGD and a schedule of its own; notes the rate of every step."""

    def __init__(self, schedule: Any = None, manual: bool = False) -> None:
        super().__init__()
        self.schedule, self.rates = schedule, []
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        optimizer = self.optimizers()
        self.rates.append(optimizer.param_groups[0]["lr"])
        loss = super().training_step(batch, batch_idx)
        self.log("val_loss", loss)
        if self.automatic_optimization:
            return loss
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)} if self.schedule else optimizer


class StepsItsSchedule(Own):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.lr_schedulers().step()


def fit(model: L.LightningModule, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    run = trainer(callbacks=list(callbacks), **{"max_epochs": 2, **kwargs})
    run.fit(model, loader(batches=4))
    return run


class Adversarial(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.g, self.d = nn.Linear(8, 2), nn.Linear(2, 1)
        self.asked = 0

    def configure_optimizers(self) -> Any:
        self.asked += 1
        return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (self.g, self.d)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("no batch")


class TestSeveralOptimizers:
    def test_they_are_not_replaced_by_one(self) -> None:
        module = Adversarial()
        remedies = r"2 optimizers \(Adam, Adam\).*self\.build_optimizer.*OptimCallback\(\).*'layerwise'.*'fused'"
        with pytest.raises(IncompatibleTrainer, match=remedies):
            fit(module, OptimCallback("adamw_torch", lr=1e-2))
        assert module.asked == 1

    def test_nor_by_the_mixin_before_a_class_that_has_them(self) -> None:
        class Mixed(OptimMixin, Adversarial):
            pass

        with pytest.raises(IncompatibleTrainer, match="returns 2 optimizers"):
            fit(Mixed(optim="sgd", lr=0.1))


class TestTheModulesOwnSchedule:
    def test_dropped_it_is_said(self) -> None:
        with pytest.warns(UserWarning, match="own schedule StepLR is dropped.*lr_scheduler='module'.*'constant'"):
            fit(Own(lambda optimizer: StepLR(optimizer, 1)), OptimCallback("sgd", lr=0.1))

    @pytest.mark.parametrize(
        "schedule",
        [
            lambda optimizer: {"scheduler": CosineAnnealingLR(optimizer, 8), "interval": "step"},
            lambda optimizer: StepLR(optimizer, 1, gamma=0.3),
            lambda optimizer: {"scheduler": OneCycleLR(optimizer, 0.5, total_steps=20), "interval": "step"},
            lambda optimizer: {
                "scheduler": ReduceLROnPlateau(optimizer, patience=0, threshold=9.0),
                "monitor": "val_loss",
            },
        ],
        ids=["cosine", "step", "one_cycle", "plateau"],
    )
    @pytest.mark.parametrize(("lr", "factor"), [(None, 1.0), (0.05, 0.1)])
    def test_kept_it_gives_the_same_rates(self, schedule: Any, lr: float | None, factor: float) -> None:
        alone, named = Own(schedule), Own(schedule)
        fit(alone, max_epochs=4)
        run = fit(named, OptimCallback("adamw_torch", lr=lr, lr_scheduler="module"), max_epochs=4)
        assert type(run.optimizers[0]) is torch.optim.AdamW
        assert named.rates == pytest.approx([factor * rate for rate in alone.rates], rel=1e-12)
        assert len(set(alone.rates)) > 1

    def test_resumed_it_goes_on(self, tmp_path: Any) -> None:
        def schedule(optimizer: Any) -> Any:
            return {"scheduler": CosineAnnealingLR(optimizer, 16), "interval": "step"}

        whole, first, second = Own(schedule), Own(schedule), Own(schedule)
        fit(whole, OptimCallback("adamw_torch", lr_scheduler="module"), max_epochs=4)
        fit(first, OptimCallback("adamw_torch", lr_scheduler="module")).save_checkpoint(tmp_path / "half.ckpt")
        run = trainer(callbacks=[OptimCallback("adamw_torch", lr_scheduler="module")], max_epochs=4)
        run.fit(second, loader(batches=4), ckpt_path=tmp_path / "half.ckpt")
        assert first.rates + second.rates == whole.rates

    def test_with_the_mixin(self) -> None:
        class Mixed(OptimMixin, Own):
            pass

        named = Mixed(lambda optimizer: StepLR(optimizer, 1), optim="adamw_torch", lr=0.1, lr_scheduler="module")
        fit(named)
        assert named.rates == pytest.approx([0.1] * 4 + [0.01] * 4)

    def test_a_named_one_that_the_own_hook_does_not_make_is_refused(self) -> None:
        class Forgets(LitTokens):
            def configure_optimizers(self) -> Any:
                return self.build_optimizer()

        with pytest.raises(IncompatibleTrainer, match=r"lr_scheduler='cosine' was given to Forgets.*build_schedule"):
            fit(Forgets(lr_scheduler="cosine"))

    def test_there_is_none_to_keep(self) -> None:
        with pytest.raises(IncompatibleTrainer, match="makes no schedule"):
            fit(Own(), OptimCallback("sgd", lr=0.1, lr_scheduler="module"))

    def test_a_loop_that_steps_it_gets_one(self) -> None:
        def schedule(optimizer: Any) -> Any:
            return StepLR(optimizer, 1, gamma=0.5)

        with pytest.raises(IncompatibleTrainer, match=r"steps its own StepLR by self\.lr.*'module'.*'constant'"):
            fit(StepsItsSchedule(schedule, manual=True), OptimCallback("sgd", lr=1.0))
        module = StepsItsSchedule(schedule, manual=True)
        fit(module, OptimCallback("sgd", lr=1.0, lr_scheduler="module"), max_epochs=1)
        assert module.rates == [1.0, 0.5, 0.25, 0.125]


class TestWhatElseIsTheModulesOwn:
    def test_its_learning_rate_is_said_where_the_default_takes_its_place(self) -> None:
        with pytest.warns(UserWarning, match=r"lr=0.001 is the default of.*'adamw_torch'; Own's own SGD has lr=0.5"):
            fit(Own(), OptimCallback("adamw_torch"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(Own(), OptimCallback("adamw_torch", lr=0.1))
        assert not any("SGD" in str(warning.message) for warning in caught)

    def test_the_parameters_that_it_leaves_alone_stay(self) -> None:
        class Head(Own):
            def configure_optimizers(self) -> Any:
                self.optimizer = torch.optim.SGD(self.model.head.parameters(), lr=0.5)
                return self.optimizer

        module = Head()
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        with pytest.warns(UserWarning, match="own SGD leaves 5 of 7 parameters alone, and so does optim='adamw_torch'"):
            run = fit(module, OptimCallback("adamw_torch", lr=0.1))
        moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {"model.head.weight", "model.head.bias"}
        # What it keeps for itself is what trains.
        assert module.optimizer is run.optimizers[0]

    def test_asking_leaves_random_numbers_and_errors_alone(self) -> None:
        class Draws(Own):
            def configure_optimizers(self) -> Any:
                self.state = torch.get_rng_state()
                torch.rand(3)
                raise KeyError("optimizer")

            def on_fit_start(self) -> None:
                assert torch.equal(self.state, torch.get_rng_state())

        module = Draws()
        with pytest.warns(UserWarning, match="configure_optimizers raises KeyError"):
            fit(module, OptimCallback("sgd", lr=0.1), max_steps=1)
        assert module.rates == [0.1]


class Manual(OptimMixin, Own):
    """Manual optimization by name; nothing of its own."""

    def __init__(self, **optim: Any) -> None:
        super().__init__(manual=True, **optim)

    configure_optimizers = OptimMixin.configure_optimizers


class TestManualOptimization:
    def test_a_named_schedule_is_stepped_as_in_automatic_optimization(self) -> None:
        arguments: dict[str, Any] = {"lr": 1e-2, "lr_scheduler": "cosine", "warmup_steps": 2}
        module, automatic = Manual(optim="adamw_torch", **arguments), Own()
        fit(module)
        fit(automatic, OptimCallback("adamw_torch", **arguments))
        assert module.rates == automatic.rates
        called = Own(manual=True)
        fit(called, OptimCallback("adamw_torch", **arguments))
        assert called.rates == automatic.rates

    def test_it_is_not_stepped_twice(self) -> None:
        class Steps(Manual):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                super().training_step(batch, batch_idx)
                self.lr_schedulers().step()

        def step(module: L.LightningModule) -> None:
            module.lr_schedulers().step()

        class ByHelper(Manual):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                super().training_step(batch, batch_idx)
                step(self)

        expected = [1.0 - index / 8 for index in range(8)]
        module = Steps(optim="sgd", lr=1.0, lr_scheduler="linear")
        fit(module)
        assert module.rates == expected
        helped = ByHelper(optim="sgd", lr=1.0, lr_scheduler="linear")
        with pytest.warns(UserWarning, match="also stepped by other code"):
            fit(helped)
        # It is found out at the second step.
        assert helped.rates[2:] == expected[2:]

    def test_only_steps_of_the_optimizer_count(self) -> None:
        class Accumulates(Manual):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                optimizer = self.optimizers()
                self.rates.append(optimizer.param_groups[0]["lr"])
                self.manual_backward(ForeignTokens.training_step(self, batch, batch_idx))
                if batch_idx % 2:
                    optimizer.step()
                    optimizer.zero_grad()

        module = Accumulates(optim="sgd", lr=1.0, lr_scheduler="polynomial")
        fit(module, max_steps=4, max_epochs=-1)
        assert len(set(module.rates)) == 4
        assert module.rates[0::2] == module.rates[1::2]

    def test_plateau_is_asked_at_the_end_of_an_epoch(self) -> None:
        watch = {"patience": 0, "threshold": 9.0, "factor": 0.5}
        module = Manual(optim="sgd", lr=1.0, lr_scheduler="reduce_lr_on_plateau", lr_scheduler_args=watch)
        fit(module, max_epochs=3)
        assert module.rates[::4] == [1.0, 0.5, 0.25]

    def test_a_loop_that_forgets_it_is_told(self) -> None:
        class Forgets(Manual):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                super().training_step(batch, batch_idx)
                assert self.lr_schedulers() is not None

        with pytest.warns(UserWarning, match="it moves nothing") as caught:
            fit(Forgets(optim="sgd", lr=1.0, lr_scheduler="constant_with_warmup", warmup_steps=2), max_epochs=3)
        texts = [str(warning.message) for warning in caught]
        assert sum("was not stepped in an epoch of 4 steps" in text for text in texts) == 1
        assert sum("optim='sgd' had the learning rate 0 in all 4 steps of epoch 0" in text for text in texts) == 1


class Builds(ForeignTokens):
    """A module of a package that takes the optimizer as a function."""

    def __init__(self, optim: str) -> None:
        super().__init__()
        self.optim, self.modes = optim, set()

    def configure_optimizers(self) -> Any:
        return build_optimizer(self.parameters(), self.optim, lr=1e-2)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.modes.add(self.trainer.optimizers[0].training)


class TestBuiltInTheModulesOwnHook:
    @pytest.mark.parametrize("name", ["schedule_free_adamw", "sgd_layerwise"])
    @pytest.mark.parametrize("early", [False, True])
    def test_nobody_told_the_trainer(self, name: str, early: bool) -> None:
        module = Builds(name)
        if early:
            optimizer = module.configure_optimizers()
            module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
        with pytest.warns(UserWarning, match=rf"optim='{name}' was built by build_optimizer.*\[OptimCallback\(\)\]"):
            fit(module, max_steps=1)

    @pytest.mark.parametrize("early", [False, True])
    def test_the_callback_without_a_name_takes_care(self, early: bool) -> None:
        module = Builds("schedule_free_adamw")
        own = module.configure_optimizers
        if early:
            optimizer = own()
            module.configure_optimizers = own = lambda: optimizer  # type: ignore[method-assign]
        run = trainer(max_epochs=1, callbacks=[OptimCallback()])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.fit(module, loader(batches=4), loader(batches=1))
        assert module.modes == {False}
        assert not run.optimizers[0].training
        assert not any("nobody told" in str(warning.message) for warning in caught)
        assert module.configure_optimizers == own

    def test_what_it_replaces_nothing_of(self) -> None:
        run = fit(Own(), OptimCallback(), max_steps=1)
        assert type(run.optimizers[0]) is torch.optim.SGD
        fit(LitTokens(), OptimCallback(), max_steps=1)

    def test_companions_need_a_name(self) -> None:
        with pytest.raises(InvalidOption, match=r"OptimCallback\(lr=0.1\) without optim.*optim='adamw_torch'"):
            OptimCallback(lr=0.1)
        with pytest.raises(InvalidOption, match="names no optimizer to install"):
            OptimCallback().install(ForeignTokens())
