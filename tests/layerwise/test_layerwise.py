"""Layerwise under Lightning (contracts C4 to C6): the same numbers as the plain run, without all gradients alive."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_optim import (
    IncompatibleTrainer,
    InvalidOption,
    Layerwise,
    LayerwiseStrategy,
    OptimCallback,
    OptimMixin,
    build_optimizer,
)
from tests.cases import KINDS, LAYERWISE, case_of, in_modes
from tests.models import ForeignTokens, LitTokens, TokenModel, fp16_mixed, loader, trainer
from tests.trainer.test_resume import assert_equal

# Epochs of 4 batches: accumulated by 3 they end with a step from a single one.
STEPS, BATCHES = 6, 4
KIB = 1 / 1024

EXACT: dict[str, dict[str, Any]] = {
    "32-true": {},
    "accumulate": {"accumulate_grad_batches": 3},
    "clip_value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "bf16-true": {"precision": "bf16-true"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"plugins": [fp16_mixed]},
    "16-mixed accumulate": {"plugins": [fp16_mixed], "accumulate_grad_batches": 3},
    "accumulate clip_value": {
        "accumulate_grad_batches": 3,
        "gradient_clip_val": 0.01,
        "gradient_clip_algorithm": "value",
    },
}
BY_NORM: dict[str, dict[str, Any]] = {
    "clip_norm": {"gradient_clip_val": 0.5},
    "clip_norm accumulate": {"gradient_clip_val": 0.5, "accumulate_grad_batches": 3},
    "clip_norm 16-mixed": {"gradient_clip_val": 0.5, "plugins": [fp16_mixed]},
    "clip_norm 16-mixed accumulate": {
        "gradient_clip_val": 0.5,
        "plugins": [fp16_mixed],
        "accumulate_grad_batches": 3,
    },
}
MODES = EXACT | BY_NORM
# In 32-true tests/testing compares all.
FOR_ALL = ("bf16-true", "clip_norm")


class Watched(LitTokens):
    """Notes the bytes of gradients that are alive during and after each backward."""

    def setup(self, stage: str) -> None:
        # Before the optimizer is built, so that they see the gradient that arrives before the engine does.
        self._handles = [p.register_post_accumulate_grad_hook(self._arrived) for p in self.parameters()]
        self.during: list[int] = []
        self.after: list[int] = []

    def teardown(self, stage: str) -> None:
        for handle in self._handles:
            handle.remove()

    def on_after_backward(self) -> None:
        self.after.append(alive(self))

    def _arrived(self, _: Tensor) -> None:
        self.during.append(alive(self))


def alive(module: nn.Module) -> int:
    return sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)


def sizes(module: nn.Module) -> list[int]:
    return [parameter.nbytes for parameter in module.parameters()]


def build(name: str, model_class: type[LitTokens] = LitTokens, **optim_args: Any) -> LitTokens:
    case = case_of(name)
    torch.manual_seed(0)
    arguments = {**case.options, **optim_args}
    return model_class(optim=name, lr=case.lr, optim_args=arguments, weight_decay=0.1, lr_scheduler=case.schedule)


def run(model: L.LightningModule, batches: int = BATCHES, **flags: Any) -> L.Trainer:
    """Trains on the same data every time; ``plugins`` are functions that make them."""
    plugins = [make() for make in flags.pop("plugins", ())]
    trained = trainer(**{"max_steps": STEPS, "plugins": plugins or None, **flags})
    trained.fit(model, loader(batches, batch_size=8))
    return trained


def outcome(model: L.LightningModule, trained: L.Trainer) -> dict[str, Any]:
    return {
        "losses": getattr(model, "losses", None),
        "weights": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trained.optimizers],
        "steps": trained.global_step,
    }


@functools.cache
def plain(name: str, mode: str) -> dict[str, Any]:
    model = build(case_of(name).plain)
    return outcome(model, run(model, **MODES[mode]))


def assert_near(left: dict[str, Any], right: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Fails unless steps are the same and losses and weights are within float tolerance."""
    assert left["steps"] == right["steps"]
    for key in ("losses", "weights"):
        torch.testing.assert_close(left[key], right[key], rtol=tolerance, atol=tolerance)


class TestSameNumbers:
    """C4: with decay groups and a schedule."""

    @pytest.mark.parametrize(("name", "mode"), in_modes(EXACT, FOR_ALL, LAYERWISE))
    def test_bit_for_bit(self, name: str, mode: str) -> None:
        model = build(f"{name}_layerwise", Watched)
        trained = run(model, **EXACT[mode])
        assert_equal(plain(name, mode), outcome(model, trained), name)
        total = sum(sizes(model))
        # What waits for the step after backward: the first two of three micro-batches, and all three with a scaler.
        third = total if mode == "16-mixed accumulate" else 0
        assert model.after == ([total, total, third, 0] * 3 if "accumulate" in mode else [0] * STEPS)

    @pytest.mark.parametrize(("name", "mode"), in_modes(BY_NORM, FOR_ALL, LAYERWISE))
    def test_clipped_by_norm(self, name: str, mode: str) -> None:
        model = build(f"{name}_layerwise", Watched)
        trained = run(model, **BY_NORM[mode])
        assert_near(plain(name, mode), outcome(model, trained), 1e-5)
        total = sum(sizes(model))
        assert model.after == ([total, total, total, 0] * 3 if "accumulate" in mode else [0] * STEPS)

    @pytest.mark.parametrize("bucket_mb", [0, 2 * KIB, 1000])
    @pytest.mark.parametrize("name", [name for name in KINDS if name in LAYERWISE])
    def test_buckets_of_any_size(self, name: str, bucket_mb: float) -> None:
        model = build(f"{name}_layerwise", bucket_mb=bucket_mb)
        assert_equal(plain(name, "32-true"), outcome(model, run(model)), name)

    def test_the_modes_are_different_trainings(self) -> None:
        """Otherwise clipping or accumulation that does nothing would pass."""
        losses = [tuple(plain("adamw_torch", mode)["losses"]) for mode in MODES]
        assert len(set(losses)) == len(MODES)


class TestLiveGradients:
    """C5."""

    @pytest.mark.parametrize("flags", [{}, {"gradient_clip_val": 0.5}, {"precision": "bf16-true"}], ids=str)
    @pytest.mark.parametrize("bucket_mb", [0, 1 * KIB, 5 * KIB, 18 * KIB, None])
    def test_at_most_a_bucket_and_the_largest(self, bucket_mb: float | None, flags: dict[str, Any]) -> None:
        model = build("adamw_torch_layerwise", Watched, **({} if bucket_mb is None else {"bucket_mb": bucket_mb}))
        run(model, **flags)
        total, largest = sum(sizes(model)), max(sizes(model))
        bucket = total // 2 if bucket_mb is None else int(bucket_mb * 2**20)
        assert len(model.during) == STEPS * len(sizes(model)) * (2 if "gradient_clip_val" in flags else 1)
        assert largest <= max(model.during) <= bucket + largest
        if bucket_mb == 0:
            assert sorted(model.during[: len(sizes(model))]) == sorted(sizes(model))

    @pytest.mark.parametrize(
        ("all_mb", "bucket_mb"), [(0.25, 0.125), (0.5, 0.25), (1, 0.25), (16, 2), (256, 32), (4096, 32)]
    )
    def test_the_default_bucket(self, all_mb: float, bucket_mb: float) -> None:
        parameters = [nn.Parameter(torch.empty(int(all_mb * 2**20) // 8, device="meta")) for _ in range(2)]
        assert Layerwise(torch.optim.SGD(parameters)).bucket_bytes == bucket_mb * 2**20

    def test_without_layerwise_all_are_alive(self) -> None:
        model = build("adamw_torch", Watched)
        run(model)
        assert max(model.during) == sum(sizes(model))
        assert model.after == [sum(sizes(model))] * STEPS

    def test_a_large_bucket_collects(self) -> None:
        model = build("adamw_torch_layerwise", Watched, bucket_mb=18 * KIB)
        run(model)
        assert max(model.during) > max(sizes(model))


Clip = Callable[[list[nn.Parameter]], None]


def by_hand(clip: Clip, accumulate: int = 1) -> dict[str, Tensor]:
    """The plain loop, with clipping of its own."""
    torch.manual_seed(0)
    model = LitTokens(lr=1e-2, weight_decay=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    batches, steps = 0, 0
    while steps < STEPS:
        for index, batch in enumerate(loader(BATCHES, batch_size=8)):
            (model.training_step(batch, index) / accumulate).backward()
            batches += 1
            if (index + 1) % accumulate and index + 1 < BATCHES:
                continue
            clip(list(model.parameters()))
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if steps == STEPS:
                break
    return model.state_dict()


def clipped_by_lightning(norm_clipping: str, **flags: Any) -> tuple[LitTokens, L.Trainer]:
    torch.manual_seed(0)
    options = {"norm_clipping": norm_clipping, "log_grad_norm": True}
    model = LitTokens(optim="adamw_torch_layerwise", lr=1e-2, weight_decay=0.0, optim_args=options)
    return model, run(model, gradient_clip_val=0.3, **flags)


class ByThePreviousNorm:
    """Scales by the total norm of the step before; the first step by its own."""

    def __init__(self) -> None:
        self.previous: Tensor | None = None

    def __call__(self, parameters: list[nn.Parameter]) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(parameters, 0.3, norm if self.previous is None else self.previous)
        self.previous = norm


class TestClipping:
    """C6."""

    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_per_parameter_clips_each_gradient_by_itself(self, accumulate: int) -> None:
        def clip(parameters: list[nn.Parameter]) -> None:
            for parameter in parameters:
                # What clip_grad_norm_ consists of; torch_xla puts one of its own there when it is imported.
                norm = torch.nn.utils.get_total_norm([parameter.grad])
                torch.nn.utils.clip_grads_with_norm_([parameter], 0.3, norm)

        model, _ = clipped_by_lightning("per_parameter", accumulate_grad_batches=accumulate)
        assert_equal(by_hand(clip, accumulate), model.state_dict(), "weights")

    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_previous_scales_by_the_norm_of_the_step_before(self, accumulate: int) -> None:
        model, _ = clipped_by_lightning("previous", accumulate_grad_batches=accumulate)
        torch.testing.assert_close(
            by_hand(ByThePreviousNorm(), accumulate), dict(model.state_dict()), rtol=1e-5, atol=1e-6
        )

    @pytest.mark.parametrize("plugins", [(), (fp16_mixed,)], ids=["32-true", "16-mixed"])
    def test_previous_goes_on_after_a_resume(self, tmp_path: Path, plugins: tuple[Any, ...]) -> None:
        def train(**flags: Any) -> dict[str, Any]:
            saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=BATCHES, save_top_k=-1)
            model = build("adamw_torch_layerwise", norm_clipping="previous")
            trained = trainer(
                max_steps=2 * BATCHES,
                gradient_clip_val=0.3,
                callbacks=[saver],
                enable_checkpointing=True,
                plugins=[make() for make in plugins],
            )
            trained.fit(model, loader(BATCHES, batch_size=8), **flags)
            return outcome(model, trained) | {"losses": model.losses[-BATCHES:]}

        uninterrupted = train()
        resumed = train(ckpt_path=tmp_path / f"step={BATCHES}.ckpt")
        assert_equal(uninterrupted, resumed, "resumed")

    @pytest.mark.parametrize("plugins", [(), (fp16_mixed,)], ids=["32-true", "16-mixed"])
    @pytest.mark.parametrize(("budget", "backwards"), [(None, 2), (1 * KIB, 2), (1.0, 1)])
    def test_gradients_that_fit_a_budget_need_no_backward_that_measures(
        self, budget: float | None, backwards: int, plugins: tuple[Any, ...]
    ) -> None:
        """Equal to the bit; a budget that is too small is not used, and a warning says which one would do."""
        options = {} if budget is None else {"norm_budget_mb": budget}
        flags: dict[str, Any] = {"gradient_clip_val": 0.3, "plugins": plugins}
        expected = build("adamw_torch_layerwise")
        expected_outcome = outcome(expected, run(expected, **flags))
        model = build("adamw_torch_layerwise", Watched, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trained = run(model, **flags)
        assert_equal(expected_outcome, outcome(model, trained), "without a budget")
        assert len(model.during) == STEPS * len(sizes(model)) * backwards
        texts = [str(warning.message) for warning in caught if "norm_budget_mb" in str(warning.message)]
        assert len(texts) == (budget is not None and backwards == 2)
        assert all(f"take {sum(sizes(model)) / 2**20:.3g} MiB" in text for text in texts)

    def test_the_kinds_are_different_trainings(self) -> None:
        """Otherwise an option that is ignored would pass."""
        weights = [clipped_by_lightning(kind)[0].model.head.weight for kind in ("exact", "previous", "per_parameter")]
        assert not any(torch.equal(a, b) for a, b in zip(weights, weights[1:] + weights[:1], strict=True))


class TrueNorms(Callback):
    """The norms of a plain run, by step."""

    def __init__(self) -> None:
        self.norms: dict[int, float] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms[trainer.global_step + 1] = float(torch.nn.utils.get_total_norm(gradients))


class LoggedNorms(Callback):
    """The norms that were logged, by step."""

    def __init__(self) -> None:
        self.norms: dict[int, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if "grad_norm" in trainer.callback_metrics:
            self.norms.setdefault(trainer.global_step, float(trainer.callback_metrics["grad_norm"]))


class TestLogging:
    """C6: what users log is true."""

    @pytest.mark.parametrize("mode", MODES)
    def test_the_norm(self, mode: str) -> None:
        truth, logged = TrueNorms(), LoggedNorms()
        run(build("adamw_torch"), **MODES[mode], callbacks=[truth])
        run(build("adamw_torch_layerwise", log_grad_norm=True), **MODES[mode], callbacks=[logged])
        assert list(truth.norms) == [1, 2, 3, 4, 5, 6]
        assert logged.norms == pytest.approx(truth.norms, rel=1e-6, abs=0)

    @pytest.mark.parametrize("norm_clipping", ["previous", "per_parameter"])
    def test_the_norm_before_other_kinds_of_clipping(self, norm_clipping: str) -> None:
        """The first step's gradients are those of the plain run."""
        truth, logged = TrueNorms(), LoggedNorms()
        run(build("adamw_torch"), callbacks=[truth])
        model = build("adamw_torch_layerwise", norm_clipping=norm_clipping, log_grad_norm=True)
        run(model, gradient_clip_val=0.3, callbacks=[logged])
        assert logged.norms[1] == pytest.approx(truth.norms[1], rel=1e-6)
        assert len(logged.norms) == STEPS

    def test_no_norm_unless_asked_for(self) -> None:
        logged = LoggedNorms()
        run(build("adamw_torch_layerwise"), gradient_clip_val=0.5, callbacks=[logged])
        assert not logged.norms

    def test_the_learning_rate(self, tmp_path: Path) -> None:
        def rates(name: str) -> dict[str, list[float]]:
            monitor = LearningRateMonitor("step")
            logger = CSVLogger(tmp_path, name=name)
            run(build(name), callbacks=[monitor], logger=logger, log_every_n_steps=1)
            return monitor.lrs

        expected = rates("adamw_torch")
        assert len(set(expected["lr-AdamW/decay"])) == STEPS
        assert rates("adamw_torch_layerwise") == expected


class Overflowing(LitTokens):
    """Has a batch whose loss is too large for float16."""

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 1e6 if len(self.losses) == 3 else loss


class OneOverflow(LitTokens):
    """Has one gradient that overflows in one batch, and keeps the weights of each step."""

    def on_train_start(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.model.linear.weight.register_hook(lambda grad: grad * float("inf") if len(self.losses) == 3 else grad)

    def on_train_batch_end(self, *_: Any) -> None:
        self.weights.append({name: parameter.detach().clone() for name, parameter in self.named_parameters()})


class States(Callback):
    """Keeps the optimizer's state dict after each step."""

    def __init__(self) -> None:
        self.of: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.of.append(copy.deepcopy(trainer.optimizers[0].state_dict()))


class TestOverflow:
    """C6: float16."""

    @pytest.mark.parametrize("flags", [{}, {"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 3}], ids=str)
    @pytest.mark.parametrize("name", ["adamw_torch", "sgd", "adamw_torch_8bit", "lion_8bit", "schedule_free_adamw"])
    def test_of_everything_is_skipped_as_in_the_plain_run(self, name: str, flags: dict[str, Any]) -> None:
        results = []
        for model in (build(name, Overflowing), build(f"{name}_layerwise", Overflowing)):
            trained = run(model, plugins=[fp16_mixed], **flags)
            results.append(outcome(model, trained) | {"scaler": trained.precision_plugin.scaler.state_dict()})
        assert results[0]["scaler"]["scale"] == 2.0**15
        assert_near(*results) if "gradient_clip_val" in flags else assert_equal(*results, name)

    @pytest.mark.parametrize("clipping", [None, "value", "previous", "per_parameter"])
    @pytest.mark.parametrize(("by_strategy", "budget"), [(False, None), (True, None), (False, 1.0)])
    def test_of_one_bucket_skips_the_whole_step_if_asked(
        self, clipping: str | None, by_strategy: bool, budget: float | None
    ) -> None:
        """Equal to the plain run, where that has such a clipping; a skipped step leaves everything to the bit."""
        flags: dict[str, Any] = {"gradient_clip_val": 0.05} if clipping else {}
        options: dict[str, Any] = {"overflow": "skip_step", "norm_budget_mb": budget}
        if clipping == "value":
            flags["gradient_clip_algorithm"] = "value"
        elif clipping:
            options["norm_clipping"] = clipping
        if by_strategy:
            flags["strategy"] = LayerwiseStrategy(bucket_mb=0, **options)
            model = build("schedule_free_adamw", OneOverflow)
        else:
            model = build("schedule_free_adamw_layerwise", OneOverflow, bucket_mb=0, **options)
        states = States()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="With loss scaling, a gradient that overflows")
            trained = run(model, plugins=[fp16_mixed], callbacks=[states], **flags)
        for before, after in ((model.weights[1], model.weights[2]), (states.of[1], states.of[2])):
            assert_equal(before, after, "the skipped step")
        assert all(not torch.equal(model.weights[2][name], after) for name, after in model.weights[3].items())
        assert trained.precision_plugin.scaler.get_scale() == 2.0**15
        if clipping in (None, "value"):
            plain = build("schedule_free_adamw", OneOverflow)
            flags.pop("strategy", None)
            expected = outcome(plain, run(plain, plugins=[fp16_mixed], **flags))
            assert_equal(expected, outcome(model, trained), "plain")

    @pytest.mark.parametrize(
        ("optim_args", "flags", "warned"),
        [
            ({}, {"plugins": [fp16_mixed]}, 1),
            ({"norm_clipping": "previous"}, {"plugins": [fp16_mixed], "gradient_clip_val": 0.5}, 1),
            ({"overflow": "skip_bucket"}, {"plugins": [fp16_mixed]}, 0),
            ({}, {"plugins": [fp16_mixed], "gradient_clip_val": 0.5}, 0),
            ({}, {}, 0),
        ],
        ids=["silent", "previous", "given", "clip_norm", "no_scaler"],
    )
    def test_that_it_skips_buckets_is_said_once(
        self, optim_args: dict[str, Any], flags: dict[str, Any], warned: int
    ) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(build("sgd_layerwise", **optim_args), **flags)
        texts = [str(warning.message) for warning in caught if "skips only its own bucket" in str(warning.message)]
        assert len(texts) == warned
        assert all("overflow='skip_step' (in optim_args or in the strategy)" in text for text in texts)

    @pytest.mark.parametrize("flags", [{}, {"gradient_clip_val": 0.5}], ids=["unclipped", "clip_norm"])
    def test_of_one_bucket(self, tmp_path: Path, flags: dict[str, Any]) -> None:
        scaler = torch.amp.GradScaler("cpu")
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        saver = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=STEPS)
        model = build("adamw_torch_layerwise", OneOverflow, bucket_mb=0)
        run(model, plugins=[lambda: plugin], callbacks=[saver], enable_checkpointing=True, **flags)
        unchanged = [
            {name for name in after if torch.equal(before[name], after[name])}
            for before, after in zip(model.weights, model.weights[1:], strict=False)
        ]
        # An infinite total norm concerns all of them.
        skipped = set(model.weights[0]) if flags else {"model.linear.weight"}
        assert unchanged == [set(), skipped, set(), set(), set()]
        assert scaler.get_scale() == 2.0**15
        stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert stored["MixedPrecision"]["scale"] == 2.0**15
        assert plugin.scaler is scaler

    @pytest.mark.parametrize("name", ["schedule_free_adamw", "stable_adamw"])
    @pytest.mark.parametrize("overflowing", ["head.bias", "head.weight", "embedding.weight"])
    def test_of_one_bucket_lets_the_counters_of_the_others_go_on(self, name: str, overflowing: str) -> None:
        model = build(f"{name}_layerwise", bucket_mb=0)
        model.model.get_parameter(overflowing).register_hook(
            lambda grad: grad * float("inf") if len(model.losses) == 3 else grad
        )
        trained = run(model, plugins=[fp16_mixed])
        counters = [group.get("k", group.get("step")) for group in trained.optimizers[0].param_groups]
        assert [int(counter) for counter in counters] == [STEPS, STEPS]


class Foreign(ForeignTokens):
    """An ordinary LightningModule, AdamW and a schedule written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def foreign() -> Foreign:
    torch.manual_seed(0)
    return Foreign()


class TestStrategy:
    @pytest.mark.parametrize("mode", MODES)
    def test_makes_an_ordinary_optimizer_layerwise(self, mode: str) -> None:
        plainly, layerwise = foreign(), foreign()
        expected = outcome(plainly, run(plainly, **MODES[mode]))
        actual = outcome(layerwise, run(layerwise, strategy="layerwise", **MODES[mode]))
        assert_near(expected, actual) if mode in BY_NORM else assert_equal(expected, actual, mode)

    @pytest.mark.parametrize("bucket_mb", [0, 5 * KIB])
    def test_has_the_options(self, bucket_mb: float) -> None:
        class WatchedForeign(Foreign):
            setup, teardown, on_after_backward = Watched.setup, Watched.teardown, Watched.on_after_backward
            _arrived = Watched._arrived

        model, logged = WatchedForeign(), LoggedNorms()
        strategy = LayerwiseStrategy(bucket_mb=bucket_mb, norm_clipping="previous", log_grad_norm=True)
        run(model, strategy=strategy, gradient_clip_val=0.5, callbacks=[logged])
        assert max(model.during) <= bucket_mb * 2**20 + max(sizes(model))
        assert len(logged.norms) == STEPS
        # Only the first step measures in a backward of its own.
        assert len(model.during) == (STEPS + 1) * len(sizes(model))

    def test_takes_a_module_with_the_mixin(self) -> None:
        model = build("adamw_torch")
        assert_equal(plain("adamw_torch", "32-true"), outcome(model, run(model, strategy="layerwise")), "mixin")

    def test_makes_any_name_layerwise_with_the_options_of_both(self) -> None:
        model, logged = build("adamw_torch_layerwise", Watched, bucket_mb=0), LoggedNorms()
        run(model, strategy=LayerwiseStrategy(log_grad_norm=True), callbacks=[logged])
        assert max(model.during) == max(sizes(model))
        assert len(logged.norms) == STEPS

    @pytest.mark.parametrize(
        ("option", "text"),
        [({"bucket_mb": -1}, "bucket_mb"), ({"norm_clipping": "no"}, "norm_clipping"), ({"log_grad_norm": 3}, "log_")],
        ids=str,
    )
    def test_refuses_a_wrong_option(self, option: dict[str, Any], text: str) -> None:
        with pytest.raises(InvalidOption, match=text):
            LayerwiseStrategy(**option)

    def test_refuses_several_devices(self) -> None:
        with pytest.raises(IncompatibleTrainer, match=r"steps on one device, and the Trainer has 2.*'layerwise_ddp'"):
            trainer(strategy="layerwise", devices=2)

    def test_refuses_an_option_that_is_given_twice(self) -> None:
        model = build("adamw_torch_layerwise", bucket_mb=1)
        with pytest.raises(IncompatibleTrainer, match="bucket_mb is given twice: optim_args has bucket_mb=1"):
            run(model, strategy=LayerwiseStrategy(bucket_mb=2))
        run(model, strategy=LayerwiseStrategy(bucket_mb=1))

    def test_refuses_an_option_that_would_be_ignored(self) -> None:
        with pytest.raises(IncompatibleTrainer, match=r"without Trainer\(gradient_clip_val="):
            run(build("adamw_torch_layerwise", norm_clipping="previous"))


class SometimesNone(LitTokens):
    """Skips batches, among them the last of an epoch and whole groups of micro-batches."""

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if len(self.losses) in (1, 3, 4, 6, 9, 10, 11) else loss


class StepsItself(LitTokens):
    """Overrides optimizer_step: runs the closure first, steps in two of three batches."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 3:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class BuildsItself(Foreign):
    """Builds a layerwise optimizer that nobody drives."""

    suffix = ""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self, "adamw_torch" + self.suffix, lr=1e-2)


class TestUnusualModules:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("name", ["adamw_torch", "schedule_free_adamw"])
    @pytest.mark.filterwarnings("ignore:.*overrides optimizer_step")
    def test_optimizer_step_of_its_own(self, name: str, mode: str) -> None:
        results = []
        for model in (build(name, StepsItself), build(f"{name}_layerwise", StepsItself)):
            results.append(outcome(model, run(model, **MODES[mode])))
        assert_near(*results) if mode in BY_NORM else assert_equal(*results, name)

    # torch refuses to clip by value where there is no gradient at all.
    @pytest.mark.parametrize("mode", [mode for mode in MODES if "clip_value" not in mode])
    @pytest.mark.parametrize("name", ["adamw_torch", "schedule_free_adamw", "stable_adamw"])
    def test_training_step_that_returns_none(self, name: str, mode: str) -> None:
        results = []
        for model in (build(name, SometimesNone), build(f"{name}_layerwise", SometimesNone)):
            results.append(outcome(model, run(model, **MODES[mode])))
        assert_near(*results) if mode in BY_NORM else assert_equal(*results, name)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_layerwise_optimizer_that_nobody_drives(self, mode: str) -> None:
        results = []
        for suffix in ("", "_layerwise"):
            torch.manual_seed(0)
            model = BuildsItself()
            model.suffix = suffix
            results.append(outcome(model, run(model, **MODES[mode])))
        assert_near(*results) if mode in BY_NORM else assert_equal(*results, mode)

    def test_callback_gives_a_foreign_module_a_layerwise_name(self) -> None:
        results = []
        for name in ("adamw_torch", "adamw_torch_layerwise"):
            model = foreign()
            callback = OptimCallback(optim=name, lr=1e-2, weight_decay=0.1, lr_scheduler="cosine")
            results.append(outcome(model, run(model, callbacks=[callback])))
        assert_equal(*results, "OptimCallback")

    def test_frozen_and_tied_parameters(self) -> None:
        class Tied(LitTokens):
            def __init__(self, **optim: Any) -> None:
                super().__init__(**optim)
                self.model.head.weight = self.model.embedding.weight
                self.model.norm.requires_grad_(False)

        results = []
        for model in (build("adamw_torch", Tied), build("adamw_torch_layerwise", Tied, bucket_mb=0)):
            results.append(outcome(model, run(model)))
        assert_equal(*results, "tied")


class LitGAN(OptimMixin, L.LightningModule):
    """Manual optimization of two optimizers; the generator's loss goes through the critic."""

    def __init__(self, optim: str, stepping: bool = False) -> None:
        super().__init__(optim=optim, lr=1e-2)
        self.automatic_optimization = False
        self.generator, self.critic = TokenModel(), nn.Linear(16, 1)
        self.stepping = stepping
        self.losses: list[float] = []
        self.alive_at_step: list[int] = []

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.build_optimizer(self.generator), self.build_optimizer(self.critic)]

    def _learn(self, optimizer: Any, network: nn.Module, loss: Tensor) -> None:
        self.losses.append(loss.item())
        self.toggle_optimizer(optimizer)
        if self.stepping:
            with Layerwise.of(optimizer).stepping():
                self.manual_backward(loss)
        else:
            self.manual_backward(loss)
        self.alive_at_step.append(alive(network))
        optimizer.step()
        optimizer.zero_grad()
        self.untoggle_optimizer(optimizer)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        generator, critic = self.optimizers()
        real = F.one_hot(batch[1], 16).float()
        self._learn(generator, self.generator, F.softplus(-self.critic(self.generator(batch[0]))).mean())
        fake = self.generator(batch[0]).detach()
        loss = F.softplus(self.critic(fake)) + F.softplus(-self.critic(real))
        self._learn(critic, self.critic, loss.mean())


class TestManualOptimization:
    @pytest.mark.parametrize("plugins", [(), (fp16_mixed,)], ids=["32-true", "16-mixed"])
    @pytest.mark.parametrize("stepping", [True, False])
    @pytest.mark.parametrize("strategy", ["auto", "layerwise"])
    @pytest.mark.parametrize("name", ["adamw_torch", "schedule_free_sgd"])
    def test_equals_plain(self, name: str, strategy: str, stepping: bool, plugins: tuple[Any, ...]) -> None:
        torch.manual_seed(0)
        plainly = LitGAN(name)
        expected = outcome(plainly, run(plainly, plugins=plugins, max_steps=2 * STEPS))
        torch.manual_seed(0)
        model = LitGAN(name if strategy == "layerwise" else f"{name}_layerwise", stepping)
        trained = run(model, plugins=plugins, max_steps=2 * STEPS, strategy=strategy)
        assert_equal(expected, outcome(model, trained), name)
        assert all(bytes_ == 0 for bytes_ in model.alive_at_step) is stepping


class TestAround:
    def test_learning_rate_finder(self, tmp_path: Path) -> None:
        found = []
        for name in ("adamw_torch", "adamw_torch_layerwise"):
            model = build(name)
            finder = Tuner(trainer(max_steps=40, default_root_dir=tmp_path)).lr_find(
                model, loader(BATCHES), num_training=20, early_stop_threshold=None
            )
            assert model.lr == finder.suggestion()
            found.append((finder.results, model.lr))
        assert_equal(*found, "lr_find")

    def test_validate_after_fit(self) -> None:
        results = []
        for name in ("schedule_free_adamw", "schedule_free_adamw_layerwise"):
            model = build(name)
            trained = run(model)
            results.append(trained.validate(model, loader(2, seed=1), verbose=False))
        assert results[0] == results[1]
