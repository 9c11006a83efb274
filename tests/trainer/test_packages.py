"""Lightning is two packages, ``lightning.pytorch`` and ``pytorch_lightning``: what trains, and what is registered."""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor

import lightning_optim
from lightning_optim import (
    FusedStrategy,
    IncompatibleTrainer,
    Layerwise,
    LayerwiseStrategy,
    NPUAccelerator,
    NPUStrategy,
    OptimCallback,
    OptimMixin,
    ScheduleFreeCallback,
)
from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer import accelerators, strategies
from tests.models import TokenModel, loader
from tests.models import trainer as lightning_trainer

# Behind lightning_optim, which has to notice it.
import pytorch_lightning as pl  # isort: skip


def body(base: type) -> type:
    """The same module on the LightningModule of one of the packages."""

    class Tokens(base):  # type: ignore[misc]
        def __init__(self, **optim: Any) -> None:
            super().__init__(**optim)
            self.save_hyperparameters()
            self.model = TokenModel(16)
            self.norm = torch.nn.BatchNorm1d(8)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            scores = self.norm(self.model(batch[0]))
            return torch.nn.functional.cross_entropy(scores.flatten(0, 1).float(), batch[1].flatten())

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.norm(self.model(tokens))

        def configure_optimizers(self) -> Any:
            own = base is pl.LightningModule
            return torch.optim.SGD(self.parameters(), lr=0.1) if own else super().configure_optimizers()

    return Tokens


class WithMixin(OptimMixin, pl.LightningModule):
    pass


Own: Any = body(pl.LightningModule)
Named: Any = body(WithMixin)


def trainer(**kwargs: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(**{"accelerator": "cpu", "max_epochs": 2, "enable_model_summary": False, **quiet, **kwargs})


def fit(module: Any, run: Any = None, **kwargs: Any) -> Any:
    run = run or trainer(**kwargs)
    run.fit(module, loader(4), loader(1))
    return run


def weights(module: torch.nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


# --- every way in ----------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "name": {"optim": "adamw_torch"},
    "schedule": {"optim": "lion_8bit", "lr_scheduler": "cosine", "warmup_steps": 0.1},
    "averages": {"optim": "schedule_free_adamw", "callbacks": [ScheduleFreeCallback(bn_batches=1)]},
    "plateau": {"optim": "adamw_torch", "lr_scheduler": "reduce_lr_on_plateau"},
    "layerwise": {"optim": "adamw_torch_layerwise"},
    "in backward": {"optim": "lomo", "lr": 1e-3},
    "clipped": {"optim": "adamw_8bit_layerwise", "precision": "bf16-mixed", "gradient_clip_val": 1.0},
    "fused": {"optim": "adamw_torch_fused", "precision": "bf16-mixed", "gradient_clip_val": 1.0},
    "strategy": {"optim": "adamw_torch", "strategy": "layerwise", "accumulate_grad_batches": 2},
    "fused strategy": {
        **{"optim": "adamw_torch", "strategy": "fused"},
        **{"precision": "bf16-mixed", "gradient_clip_val": 1.0},
    },
}
OF_THE_TRAINER = {"callbacks", "precision", "gradient_clip_val", "strategy", "accumulate_grad_batches"}


@pytest.mark.parametrize("way", WAYS)
def test_mixin_and_callback_train_alike_and_as_with_lightning(way: str) -> None:
    given = WAYS[way]
    optim = {name: value for name, value in given.items() if name not in OF_THE_TRAINER}
    of_trainer = {name: value for name, value in given.items() if name in OF_THE_TRAINER}
    torch.manual_seed(0)
    mixed = Named(**optim)
    before = weights(mixed)
    torch.manual_seed(0)
    called = Own()
    torch.manual_seed(0)
    twin: Any = body(type("WithMixin", (OptimMixin, L.LightningModule), {}))(**optim)
    run = fit(mixed, **of_trainer)
    fit(called, **{**of_trainer, "callbacks": [OptimCallback(**optim), *of_trainer.get("callbacks", ())]})
    fit(twin, lightning_trainer(max_epochs=2, **of_trainer))
    assert not all(map(torch.equal, before, mixed.parameters()))
    assert same(mixed, called)
    assert same(mixed, twin)
    assert isinstance(run.strategy, pl.strategies.Strategy)
    assert not [name for name in vars(run.precision_plugin) if name == "clip_gradients"], "detached"


@pytest.mark.parametrize(
    ("flag", "instance", "steps"),
    [("layerwise", lambda: LayerwiseStrategy(bucket_mb=0), Layerwise), ("fused", FusedStrategy, None)],
)
def test_a_strategy_trains_the_module_s_own_optimizer_by_flag_and_by_instance(
    flag: str, instance: Callable[[], Any], steps: type | None
) -> None:
    trained = []
    for strategy in (flag, instance(), "auto"):
        torch.manual_seed(0)
        trained.append(Own())
        run = fit(trained[-1], strategy=strategy)
        if strategy != "auto":
            # Of pytorch_lightning through and through, with the options that it was given.
            assert type(run.strategy) is packages.derived(LayerwiseStrategy if steps else FusedStrategy)
            assert isinstance(run.strategy, pl.strategies.SingleDeviceStrategy)
            assert run.strategy.strategy_name == flag
            assert not steps or run.strategy.layerwise_options.bucket_mb == (None if strategy == flag else 0)
    assert same(trained[0], trained[2])
    assert same(trained[1], trained[2])


@pytest.mark.parametrize("optim", ["adamw_torch_layerwise", "schedule_free_adamw"])
def test_resume_is_exact_and_crosses_the_packages(optim: str, tmp_path: Path) -> None:
    lightnings: Any = body(type("WithMixin", (OptimMixin, L.LightningModule), {}))
    torch.manual_seed(0)
    whole = Named(optim=optim, lr=1e-2)
    fit(whole, max_epochs=2)
    torch.manual_seed(0)
    run = fit(Named(optim=optim, lr=1e-2), max_epochs=1)
    run.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    for module, again in ((Named, trainer), (lightnings, lightning_trainer)):
        resumed = module(optim=optim, lr=1e-2)
        again(max_epochs=2).fit(resumed, loader(4), loader(1), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
        assert same(resumed, whole)
    loaded = Named.load_from_checkpoint(tmp_path / "half.ckpt", weights_only=True)
    assert loaded.optim_config.optim == optim


@pytest.mark.parametrize(
    ("optim", "callback", "text"),
    [
        (
            {},
            lambda: pl.callbacks.LearningRateFinder(num_training_steps=2),
            "the learning-rate finder sets an attribute",
        ),
        (
            {"optim": "schedule_free_adamw"},
            lambda: pl.callbacks.WeightAveraging(),
            "the callback WeightAveraging together with optim='schedule_free_adamw'",
        ),
    ],
)
def test_callbacks_of_the_package_are_told_by_their_class(optim: dict[str, Any], callback: Any, text: str) -> None:
    with pytest.raises(IncompatibleTrainer, match=text):
        fit(Own(), callbacks=[OptimCallback(**{"optim": "adamw_torch", **optim}), callback()])


def test_its_accumulation_is_counted_in_the_length_of_a_schedule() -> None:
    plan = pl.callbacks.GradientAccumulationScheduler({0: 2})
    run = fit(Own(), callbacks=[OptimCallback("sgd", lr=1.0, lr_scheduler="linear"), plan])
    assert run.global_step == 4
    assert {group["lr"] for group in run.optimizers[0].param_groups} == {0.0}


@pytest.mark.parametrize("strategy", strategies.MOVABLE)
def test_each_strategy_is_one_of_the_package_s(strategy: Any) -> None:
    theirs = next(base for base in strategy.__bases__ if base.__module__.startswith("lightning.pytorch."))
    for run in (trainer(strategy=strategy.strategy_name), trainer(strategy=strategy())):
        assert isinstance(run.strategy, getattr(pl.strategies, theirs.__name__))
        # The processes of a launcher may get it by pickle.
        assert type(pickle.loads(pickle.dumps(run.strategy))) is type(run.strategy)
        assert not [name for name, value in vars(strategy).items() if callable(value)], "would not be derived"


def test_hooks_and_strategies_of_the_package_are_under_the_same_rules() -> None:
    class OwnClipping(Own):  # type: ignore[misc]
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            pass

    with pytest.raises(IncompatibleTrainer, match=r"configure_gradient_clipping of the module's own"):
        fit(OwnClipping(), strategy="layerwise")
    run = trainer(strategy="ddp", devices=2)
    from lightning_optim.trainer.callbacks._layerwise import _strategy_name

    assert _strategy_name(run.strategy) == "ddp"


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["npu", "npu_ddp", "single_xla_syncfree", "xla_syncfree"])
def test_flags_for_accelerators_say_what_works(flag: str) -> None:
    with pytest.raises(IncompatibleTrainer, match=rf"strategy='{flag}'.* is for lightning\.pytorch.*L\.Trainer"):
        trainer(strategy=flag)


@pytest.mark.parametrize("flag", ["npu", "pjrt"])
def test_accelerators_say_what_works(flag: str) -> None:
    with pytest.raises(IncompatibleTrainer, match=rf"accelerator='{flag}'.* is for lightning\.pytorch.*L\.Trainer"):
        trainer(accelerator=flag)


def test_the_command_line_says_what_works() -> None:
    with pytest.raises(IncompatibleTrainer, match=r"Tokens is a module of pytorch_lightning\. Use that package's"):
        lightning_optim.OptimCLI(Own, args=["fit"])


def test_a_subclass_derives_from_the_package_s_own() -> None:
    class Mine(LayerwiseStrategy):
        pass

    with pytest.raises(IncompatibleTrainer, match=r"strategy=Mine\(\.\.\.\).*lightning_optim\.pytorch_l"):
        trainer(strategy=Mine())
    from lightning_optim import pytorch_lightning as others

    class Theirs(others.LayerwiseStrategy):  # type: ignore[misc]
        pass

    fit(Own(), strategy=Theirs(), max_epochs=1)
    assert others.LayerwiseDDPStrategy is packages.derived(lightning_optim.LayerwiseDDPStrategy)
    with pytest.raises(AttributeError, match="no attribute 'NPUStrategy'"):
        _ = others.NPUStrategy


def test_module_and_trainer_of_different_packages_are_refused_by_lightning() -> None:
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        lightning_trainer(max_steps=1).fit(Named(), loader())


# --- registries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("registry", "argument", "base", "ours", "register"),
    [
        (StrategyRegistry, "strategy", SingleDeviceStrategy, NPUStrategy, strategies.register),
        (AcceleratorRegistry, "accelerator", Accelerator, NPUAccelerator, accelerators.register),
    ],
)
def test_a_name_that_is_taken_stays_its_owner_s(
    registry: dict[str, Any], argument: str, base: type, ours: type, register: Callable[[], None]
) -> None:
    entry = registry["npu"]
    theirs = type("Theirs", (base,), {"__module__": "a_vendor"})
    # Ours of an earlier import of the same module, which is exchanged without a word.
    earlier = type(ours.__name__, (base,), {"__module__": ours.__module__, "__qualname__": ours.__qualname__})
    try:
        registry["npu"] = {**entry, argument: theirs}
        with pytest.warns(UserWarning, match=r"'npu' stays a_vendor\.Theirs") as caught:
            register()
        assert registry["npu"][argument] is theirs
        registry["npu"] = {**entry, argument: earlier}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            register()
        assert registry["npu"][argument] is ours
    finally:
        registry["npu"] = entry
    (warning,) = caught
    assert f"{ours.__module__}.{ours.__qualname__} is not registered" in str(warning.message)
    assert f"Trainer({argument}=lightning_optim.{ours.__qualname__}())" in str(warning.message)


def test_an_import_is_noticed_once_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late_package.py").write_text("import missing_at_first\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packages, "OTHER", "late_package")
    before, noticed = list(sys.meta_path), []
    packages.when_imported(lambda: noticed.append(sys.modules["late_package"]))
    with pytest.raises(ModuleNotFoundError, match="missing_at_first"):
        import late_package  # type: ignore[import-not-found]
    assert noticed == []
    (tmp_path / "late_package.py").write_text("here = True\n")
    import late_package

    assert noticed == [late_package]
    assert sys.meta_path == before
    assert type(late_package.__loader__).__name__ == type(late_package.__spec__.loader).__name__ == "SourceFileLoader"
    packages.when_imported(lambda: noticed.append("at once"))
    assert noticed == [late_package, "at once"]
    monkeypatch.delitem(sys.modules, "late_package")
