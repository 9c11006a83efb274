"""What may go wrong around a layerwise run, and what is left when it has (contract C10)."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_optim import IncompatibleTrainer, Layerwise
from lightning_optim.trainer.callbacks._layerwise import LayerwiseCallback
from tests.cases import LAYERWISE
from tests.layerwise.test_layerwise import BY_NORM, STEPS, Watched, alive, assert_near, build, outcome, run, sizes
from tests.models import LitTokens, fp16_mixed, loader, trainer
from tests.trainer.test_resume import assert_equal

NAN, INFINITE = float("nan"), float("inf")


def assert_clean(model: nn.Module, trained: L.Trainer) -> None:
    """Fails if a layerwise run has left anything behind but numbers."""
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    for optimizer in trained.optimizers:
        assert Layerwise.of(optimizer) is None
        # A schedule may have wrapped it.
        assert inspect.unwrap(getattr(optimizer.step, "__func__", optimizer.step)) is inspect.unwrap(
            type(optimizer).step
        )
    assert "clip_gradients" not in vars(trained.precision_plugin)
    assert type(getattr(trained.precision_plugin, "scaler", None)) in (type(None), torch.amp.GradScaler)
    assert not any(isinstance(callback, LayerwiseCallback) for callback in trained.callbacks)


FLAGS: dict[str, dict[str, Any]] = {
    "32-true": {},
    "accumulate": {"accumulate_grad_batches": 3},
    "clip_norm": {"gradient_clip_val": 0.5},
    "16-mixed": {"plugins": [fp16_mixed]},
}


class Checkpointed(LitTokens):
    """Recomputes a block whose weight is used in two places."""

    use_reentrant = True

    def _loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return F.gelu(self.model.linear(x))

        hidden = self.model.embedding(batch[0])
        for _ in range(2):
            hidden = checkpoint(block, hidden, use_reentrant=self.use_reentrant)
        return F.cross_entropy(self.model.head(self.model.norm(hidden)).flatten(0, 1).float(), batch[1].flatten())


class CheckpointedWell(Checkpointed):
    use_reentrant = False


class TestActivationCheckpointing:
    def test_reentrant_with_a_tied_parameter_is_refused(self) -> None:
        model = build("adamw_torch_layerwise", Checkpointed)
        text = r"'model.linear.(weight|bias)' got a gradient twice in one backward.*use_reentrant=False"
        with pytest.raises(IncompatibleTrainer, match=text):
            run(model)
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())

    @pytest.mark.parametrize("mode", FLAGS)
    def test_not_reentrant_equals_plain(self, mode: str) -> None:
        results = []
        for name in ("adamw_torch", "adamw_torch_layerwise"):
            model = build(name, CheckpointedWell)
            results.append(outcome(model, run(model, **FLAGS[mode])))
        assert_near(*results) if mode in BY_NORM else assert_equal(*results, mode)


class BadGradients(LitTokens):
    """One batch gives a gradient that is not finite."""

    value = NAN

    def on_train_start(self) -> None:
        spoil = self.value
        self.model.linear.weight.register_hook(lambda grad: grad * spoil if len(self.losses) == 3 else grad)


class InfiniteGradients(BadGradients):
    value = INFINITE


class TestGradientsThatAreNotFinite:
    @pytest.mark.parametrize(
        "flags",
        [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.5}, {"precision": "bf16-true"}],
        ids=str,
    )
    @pytest.mark.parametrize("model_class", [BadGradients, InfiniteGradients])
    @pytest.mark.parametrize("name", ["adamw_torch", "sgd", "adamw_8bit", "schedule_free_adamw"])
    def test_do_what_they_do_in_the_plain_run(
        self, name: str, model_class: type[BadGradients], flags: dict[str, Any]
    ) -> None:
        plain, layerwise = build(name, model_class), build(f"{name}_layerwise", model_class)
        run(plain, **flags)
        run(layerwise, **flags)
        assert any(parameter.isnan().any() for parameter in plain.parameters())
        results = [plain.state_dict(), layerwise.state_dict()]
        tolerance = 1e-5 if "gradient_clip_val" in flags else 0
        torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance, equal_nan=True)


class Breaking(LitTokens):
    """Fails in the third batch: in the backward of a layer, or in training_step."""

    where = "model.linear.weight"
    error: BaseException = RuntimeError("it broke")

    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        if self.where != "training_step":
            self.get_parameter(self.where).register_hook(self._fail)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.where == "training_step":
            self._fail(loss)
        return loss

    def _fail(self, _: Tensor) -> None:
        if len(self.losses) == 3:
            raise self.error


class BreaksInHead(Breaking):
    where = "model.head.weight"


class BreaksInEmbedding(Breaking):
    where = "model.embedding.weight"


class BreaksInStep(Breaking):
    where = "training_step"


class Interrupted(Breaking):
    error = KeyboardInterrupt()


class InterruptedInStep(BreaksInStep):
    error = KeyboardInterrupt()


BREAKING = [BreaksInHead, Breaking, BreaksInEmbedding, BreaksInStep, Interrupted, InterruptedInStep]


class TestExceptions:
    @pytest.mark.parametrize("mode", FLAGS)
    @pytest.mark.parametrize("model_class", BREAKING)
    def test_leave_module_and_optimizer_usable(self, model_class: type[Breaking], mode: str) -> None:
        model = build("adamw_torch_layerwise", model_class)
        plugins = [make() for make in FLAGS[mode].get("plugins", ())]
        flags = {**FLAGS[mode], "plugins": plugins or None}
        trained = trainer(max_steps=STEPS, **flags)
        with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)) as error:
            trained.fit(model, loader(4, batch_size=8))
        assert isinstance(error.value, SystemExit) or error.value is model.error
        assert len(model.losses) == 3
        assert_clean(model, trained)
        # Those of earlier micro-batches stay, as in a plain run, if no backward was running.
        expected = sum(sizes(model)) if mode == "accumulate" and model.where == "training_step" else 0
        assert alive(model) == expected
        # Ready for another fit, which is that of a module with these weights.
        twin = LitTokens(**model.hparams)
        twin.load_state_dict(model.state_dict())
        results = []
        for module in (model, twin):
            module.losses = [0.0] * 3 if module is twin else [*model.losses, 0.0]
            again = run(module, **FLAGS[mode])
            assert_clean(module, again)
            results.append(outcome(module, again) | {"losses": module.losses[-3:]})
        assert_equal(*results, "second fit")

    def test_while_the_optimizer_is_built(self) -> None:
        class Wrong(LitTokens):
            def configure_optimizers(self) -> Any:
                super().configure_optimizers()
                raise RuntimeError("no schedule")

        model = build("adamw_torch_layerwise", Wrong)
        with pytest.raises(RuntimeError, match="no schedule"):
            run(model)
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


class TestAfterFit:
    @pytest.mark.parametrize("name", LAYERWISE)
    def test_nothing_is_left(self, name: str) -> None:
        model = build(f"{name}_layerwise")
        assert_clean(model, run(model))

    @pytest.mark.parametrize("mode", FLAGS)
    def test_of_the_strategy_nothing_is_left(self, mode: str) -> None:
        model = build("adamw_torch")
        assert_clean(model, run(model, strategy="layerwise", **FLAGS[mode]))

    @pytest.mark.parametrize("mode", FLAGS)
    def test_a_second_fit_with_the_same_trainer(self, mode: str) -> None:
        results = []
        for name in ("adamw_torch", "adamw_torch_layerwise"):
            model = build(name, Watched)
            trained = run(model, **FLAGS[mode])
            trained.fit_loop.epoch_loop.max_steps = 2 * STEPS
            trained.fit(model, loader(4, batch_size=8))
            assert trained.global_step == 2 * STEPS
            assert model.after[-1] == (0 if "layerwise" in name else sum(p.nbytes for p in model.parameters()))
            results.append(outcome(model, trained))
        assert_clean(model, trained)
        assert_near(*results) if mode in BY_NORM else assert_equal(*results, mode)

    def test_another_module_with_the_same_trainer(self) -> None:
        trained = run(build("adamw_torch_layerwise"))
        for name in ("sgd_layerwise", "sgd"):
            model = build(name, Watched)
            trained.fit_loop.epoch_loop.max_steps += STEPS
            trained.fit(model, loader(4, batch_size=8))
            assert set(model.after) == {0 if "layerwise" in name else sum(p.nbytes for p in model.parameters())}
            assert_clean(model, trained)


class Compiled(LitTokens):
    """Compiles its parts one by one, or itself as a whole."""

    backend, whole = "aot_eager", False

    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        for part in [self.model] if self.whole else [self.model.linear, self.model.head]:
            part.compile(backend=self.backend)


class CompiledAsAWhole(Compiled):
    whole = True


class CompiledByInductor(Compiled):
    backend = "inductor"


class Silent(LitTokens):
    """Dynamo cannot trace LightningModule.log."""

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return self._loss(batch)


class TestCompile:
    @pytest.mark.parametrize("mode", ["32-true", "clip_norm", "accumulate"])
    @pytest.mark.parametrize("model_class", [Compiled, CompiledAsAWhole, CompiledByInductor])
    def test_equals_plain(self, model_class: type[Compiled], mode: str) -> None:
        torch.compiler.reset()
        results = []
        for name in ("adamw_torch", "adamw_torch_layerwise"):
            model = build(name, model_class)
            results.append(outcome(model, run(model, **FLAGS[mode])))
        assert_near(*results) if mode in BY_NORM else assert_equal(*results, mode)

    @pytest.mark.parametrize("mode", ["32-true", "clip_norm"])
    def test_compiled_by_the_user_before_fit(self, mode: str) -> None:
        """Trainer.fit takes torch.compile(LightningModule), too."""
        results = []
        for name in ("adamw_torch", "adamw_torch_layerwise"):
            torch.compiler.reset()
            model = build(name, Silent)
            results.append(outcome(model, run(torch.compile(model, backend="aot_eager"), **FLAGS[mode])))
        assert_near(*results) if mode in BY_NORM else assert_equal(*results, mode)


class Copies(Callback):
    """Copies the module in the middle of training and at its end."""

    def __init__(self, copied: Callable[[nn.Module], nn.Module]) -> None:
        self._copied = copied
        self.copies: list[nn.Module] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.copies.append(self._copied(pl_module.model))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.copies.append(self._copied(pl_module.model))


class TestCopies:
    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
    )
    @pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "schedule_free_adamw", "stable_adamw"])
    def test_during_fit_and_after(self, name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
        plain, layerwise = Copies(copied), Copies(copied)
        run(build(name), callbacks=[plain])
        model = build(f"{name}_layerwise")
        run(model, callbacks=[layerwise])
        layerwise.copies.append(copied(model).model)
        plain.copies.append(model.model)
        assert len(layerwise.copies) == STEPS + 2
        for one, other in zip(plain.copies, layerwise.copies, strict=True):
            assert_equal(one.state_dict(), other.state_dict(), "copy")
            assert not any(parameter._post_accumulate_grad_hooks for parameter in other.parameters())
        # A copy trains on by itself.
        twin = build("adamw_torch")
        twin.model = layerwise.copies[2]
        run(twin)

    @pytest.mark.parametrize("name", ["adamw_torch_layerwise", "schedule_free_adamw_layerwise"])
    def test_of_the_lightning_module_during_fit(self, name: str) -> None:
        class CopiesAll(Callback):
            def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
                self.twin = copy.deepcopy(pl_module)

        callback = CopiesAll()
        model = build(name)
        run(model, callbacks=[callback])
        assert not any(parameter._post_accumulate_grad_hooks for parameter in callback.twin.parameters())
        twin = pickle.loads(pickle.dumps(model))
        expected, actual = outcome(model, run(model)), outcome(twin, run(twin))
        assert_equal(expected, actual, "a fit of the copy")
