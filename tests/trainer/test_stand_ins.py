"""One name for several kernels: ``adamw`` takes the device's, ``optim_fallback`` the nearest that runs here."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_optim import (
    REGISTRY,
    IncompatibleTrainer,
    InvalidOption,
    InvalidParamGroups,
    MissingDependency,
    OptimCallback,
    OptimConfig,
    OptimMixin,
    build_optimizer,
)
from lightning_optim.build._factory import resolve
from lightning_optim.optimizers._base import OwnOptimizer
from lightning_optim.table._availability import Requirement
from tests.models import ForeignTokens, LitTokens, TokenModel, loader, trainer

APEX = "adamw_apex_fused"


def taken(name: str, model: nn.Module | None = None, **request: Any) -> str:
    return resolve(model or TokenModel(), OptimConfig(name, **request)).name


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Requirement, "installed_version", lambda self: None)


# --- adamw -----------------------------------------------------------------------------------------------------------


def test_adamw_is_the_fused_kernel_where_there_is_one() -> None:
    optimizer = build_optimizer(TokenModel(), "adamw", lr=1e-2, optim_args="betas=(0.8, 0.9)")
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["fused"] and group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
    layerwise = resolve(TokenModel(), OptimConfig("adamw_layerwise"))
    assert (layerwise.name, layerwise.spec.layerwise) == ("adamw_torch_fused_layerwise", True)


def test_adamw_is_another_one_where_the_fused_kernel_cannot_step() -> None:
    model = nn.Linear(2, 2, dtype=torch.complex64)
    resolved = resolve(model, OptimConfig("adamw"))
    assert resolved.name == "adamw_torch"
    assert set(resolved.passed_over) == {"adamw_torch_fused"}
    assert "complex" in resolved.passed_over["adamw_torch_fused"]
    assert resolved.substitution("adamw") == "", "that is what adamw is for, and no substitute"
    assert taken("adamw", TokenModel().to("meta")) == "adamw_torch"


@pytest.mark.parametrize("mixed", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("name", ["adamw", "adamw_torch_fused"])
def test_hooks_and_clipping_see_what_they_see_of_any_optimizer(name: str, mixed: str) -> None:
    """A fused kernel that unscales by itself would show them scaled gradients, and Lightning would not clip."""

    class Watches(LitTokens):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))

    seen, models = [], []
    for built in (name, "adamw_torch"):
        norms: list[torch.Tensor] = []
        torch.manual_seed(3)
        models.append(Watches(optim=built, lr=1e-2))
        run = trainer(max_steps=8, plugins=MixedPrecision(mixed, "cpu"), gradient_clip_val=0.2)
        run.fit(models[-1], loader())
        assert bool(run.optimizers[0].param_groups[0]["fused"]) == (built == name)
        seen.append([norm for norm in torch.stack(norms).tolist() if norm < float("inf")])
    assert seen[0] == pytest.approx(seen[1], rel=1e-3)
    assert min(seen[0]) > 0.2, "clipping has work to do"
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_what_adamw_took_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = CSVLogger(tmp_path)
    with caplog.at_level("INFO"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*takes the place of.*")
        trainer(max_steps=1, logger=logger).fit(LitTokens(optim="adamw"), loader())
    assert "optim='adamw' takes 'adamw_torch_fused': torch.optim.AdamW (" in caplog.text
    saved = (Path(logger.log_dir) / "hparams.yaml").read_text()
    assert "identifier: adamw\n" in saved
    assert "taken: adamw_torch_fused" in saved


def test_if_nothing_can_step_it_every_reason_is_given() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    with pytest.raises(IncompatibleTrainer) as caught:
        build_optimizer(model, "adamw")
    assert "optim='adamw_torch_fused' cannot step sparse gradients" in str(caught.value)
    assert "optim='adamw_torch' cannot step sparse gradients" in str(caught.value)


# --- optim_fallback --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (APEX, "adamw_torch_fused"),
        (f"{APEX}_layerwise", "adamw_torch_fused_layerwise"),
        ("adamw_torch_xla", "adamw_torch_fused"),
        ("adamw_torch_npu_fused", "adamw_torch_fused"),
        ("paged_adamw_8bit", "adamw_bnb_8bit"),
        ("paged_adamw_32bit", "adamw_torch_fused"),
        ("paged_lion_8bit_layerwise", "lion_8bit_layerwise"),
        ("paged_ademamix_32bit", "ademamix"),
        ("lion_8bit", "lion_8bit"),
        ("sgd", "sgd"),
    ],
)
def test_the_nearest_that_runs_on_a_cpu(asked: str, expected: str) -> None:
    assert taken(asked, optim_fallback=True) == expected


@pytest.mark.usefixtures("without_packages")
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("adamw_8bit", "adamw_torch_fused"),
        ("adamw_torch_4bit", "adamw_torch_fused"),
        ("paged_adamw_8bit", "adamw_torch_fused"),
        ("rmsprop_bnb_8bit", "rmsprop"),
        ("galore_adamw_8bit", "galore_adamw"),
    ],
)
def test_the_nearest_without_any_package(asked: str, expected: str) -> None:
    resolved = resolve(TokenModel(), OptimConfig(asked, optim_fallback=True))
    assert resolved.name == expected
    assert isinstance(resolved.optimizer, OwnOptimizer) == (expected == "galore_adamw")
    assert "is not installed" in resolved.passed_over[asked]


@pytest.mark.usefixtures("without_packages")
def test_where_nothing_comes_near_the_reasons_are_given() -> None:
    with pytest.raises(MissingDependency, match=r"^optim='stable_adamw' cannot run here: .* pip install"):
        taken("stable_adamw", optim_fallback=True)
    with pytest.raises(MissingDependency) as caught:
        taken("paged_lion_8bit", optim_fallback=True)
    first, *others = caught.value.text.splitlines()
    assert first == "no optimizer for optim='paged_lion_8bit' can run here:"
    assert [line.split("'")[1] for line in others] == ["paged_lion_8bit", "lion_8bit", "lion_32bit"]


@pytest.mark.usefixtures("without_packages")
def test_only_what_runs_is_offered_in_its_place() -> None:
    for name, offered in (("adamw_8bit", "'adamw'"), ("lion_8bit", None)):
        with pytest.raises(MissingDependency) as caught:
            taken(name)
        assert (f"Or use optim={offered}" in str(caught.value)) == (offered is not None)
        assert ("Or use" in str(caught.value)) == (offered is not None)


def test_a_rule_that_holds_for_all_is_said_once(tmp_path: Path) -> None:
    run = trainer(max_steps=1)
    run.fit(LitTokens(optim="adamw"), loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(IncompatibleTrainer) as caught:
        trainer(callbacks=LearningRateFinder(), max_steps=2).fit(
            LitTokens(optim="adamw"), loader(), ckpt_path=tmp_path / "one.ckpt"
        )
    assert "optim='adamw'" in str(caught.value)
    assert str(caught.value).count("LearningRateFinder") == 1


def test_without_it_nothing_is_replaced() -> None:
    with pytest.raises(MissingDependency) as caught:
        build_optimizer(TokenModel(), APEX)
    assert "Or use optim='adamw' (optim_fallback=True does so by itself)" in str(caught.value)
    assert taken("paged_lion_8bit") == "paged_lion_8bit"


def test_a_mistake_stays_a_mistake() -> None:
    with pytest.raises(InvalidOption, match="'beta'"):
        OptimConfig(APEX, optim_args="beta=1", optim_fallback=True)
    with pytest.raises(InvalidOption, match="optim_fallback='yes' is neither True nor False"):
        OptimConfig("sgd", optim_fallback="yes")  # type: ignore[arg-type]
    with pytest.raises(InvalidParamGroups, match="block_size"):
        build_optimizer(TokenModel(), "lion_8bit", param_groups={".*": {"block_size": 3}}, optim_fallback=True)


def test_an_option_that_the_nearest_lacks_is_not_dropped() -> None:
    with pytest.raises(MissingDependency) as caught:
        taken(APEX, optim_args={"bias_correction": False}, optim_fallback=True)
    assert "optim='adamw_apex_fused' cannot run here" in str(caught.value)
    assert "'adamw_torch_fused' has no option 'bias_correction'" in str(caught.value)


def test_plain_pytorch_is_told_once() -> None:
    with pytest.warns(UserWarning, match="takes the place of") as caught:
        build_optimizer(TokenModel(), APEX, optim_fallback=True)
    (warning,) = (w for w in caught if "takes the place of" in str(w.message))
    assert warning.filename == __file__
    text = str(warning.message)
    assert text.startswith(f"optim_fallback=True: optim='adamw_torch_fused' takes the place of '{APEX}'.\noptim=")
    assert "Or use" not in text


def test_a_run_is_told_once_and_keeps_the_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = LitTokens(optim=APEX, lr=1e-2, optim_fallback=True)
    logger = CSVLogger(tmp_path)
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    run = trainer(max_steps=10, logger=logger, enable_checkpointing=True, callbacks=[checkpoint])
    with pytest.warns(UserWarning, match="takes the place of") as caught, caplog.at_level("INFO"):
        run.fit(model, loader())
    assert sum(f"takes the place of '{APEX}'" in str(w.message) for w in caught) == 1
    assert f"optim={APEX!r} takes 'adamw_torch_fused': torch.optim.AdamW (" in caplog.text
    assert model.losses[-1] < model.losses[0]
    saved = (Path(logger.log_dir) / "hparams.yaml").read_text()
    assert f"optim: {APEX}\n" in saved
    assert "optim_fallback: true\n" in saved
    again = LitTokens.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert again.optim_config == OptimConfig(APEX, lr=1e-2, optim_fallback=True)


def test_the_fallback_trains_as_what_it_takes() -> None:
    models = []
    for name, fallback in ((APEX, True), ("adamw_torch_fused", False)):
        torch.manual_seed(3)
        models.append(LitTokens(optim=name, lr=1e-2, optim_fallback=fallback))
        trainer(max_steps=5).fit(models[-1], loader())
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_the_callback_and_the_module_s_builder_take_it() -> None:
    run = trainer(max_steps=1, callbacks=[OptimCallback(APEX, optim_fallback=True)])
    run.fit(ForeignTokens(), loader())
    assert run.optimizers[0].param_groups[0]["fused"]

    class Builds(LitTokens):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.build_optimizer(optim="adamw_torch_npu_fused", optim_fallback=True)

    run = trainer(max_steps=1)
    run.fit(Builds(), loader())
    assert run.optimizers[0].param_groups[0]["fused"]


def test_the_command_line_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_optim import OptimCLI

    words = ["fit", "--optim", APEX, "--trainer.max_steps=1", "--trainer.accelerator=cpu"]
    quiet = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        OptimCLI(LitTokens, args=[*words, *quiet], run=False)
    assert caught.value.code == 2
    cli = OptimCLI(LitTokens, args=[*words[1:], *quiet, "--optim_fallback=true"], run=False)
    assert isinstance(cli.model, OptimMixin)
    assert cli.model.optim_config == OptimConfig(APEX, optim_fallback=True)


# --- checkpoints of another kernel -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), itertools.permutations(("adamw_torch", "adamw_torch_fused"), 2))
def test_a_checkpoint_does_not_change_the_kernel(tmp_path: Path, before: str, after: str) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    trainer(max_steps=3, enable_checkpointing=True, callbacks=[checkpoint]).fit(LitTokens(optim=before), loader())
    model = LitTokens(optim=after, lr=3e-3)
    run = trainer(max_steps=6)
    run.fit(model, loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    fused = REGISTRY[after].fixed.get("fused")
    for group in run.optimizers[0].param_groups:
        assert (group["fused"], group["foreach"]) == (fused, None)
        assert group["lr"] == 1e-3, "hyperparameters are the checkpoint's"
        assert all(run.optimizers[0].state[p]["step"] == 6 for p in group["params"])


@pytest.mark.parametrize(
    ("before", "after"), [("adamw_8bit", "adamw"), ("adamw", "paged_adamw_32bit"), ("rmsprop", "rmsprop_bnb")]
)
def test_another_optimizer_s_state_is_refused(before: str, after: str) -> None:
    model = nn.Linear(64, 64)
    first = build_optimizer(model, before)
    model(torch.ones(2, 64)).sum().backward()
    first.step()
    second = build_optimizer(model, after)
    with pytest.raises(InvalidOption) as caught:
        second.load_state_dict(first.state_dict())
    assert first.param_groups[0]["format"] in str(caught.value)
    assert second.param_groups[0]["format"] in str(caught.value)


class _Freezes(BackboneFinetuning):
    """Lets nothing unfreeze: what matters is what the callback saves and restores."""

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        pass

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        BaseFinetuning.on_fit_start(self, trainer, pl_module)

    def finetune_function(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(("before", "after"), itertools.permutations(("adamw_torch", "adamw_torch_fused"), 2))
def test_a_finetuning_callback_does_not_change_the_kernel(tmp_path: Path, before: str, after: str) -> None:
    """It replaces the param groups by those that it saved, after the optimizer was loaded."""
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    run = trainer(max_steps=3, enable_checkpointing=True, callbacks=[checkpoint, _Freezes()])
    run.fit(LitTokens(optim=before), loader())
    run = trainer(max_steps=6, callbacks=[_Freezes()])
    run.fit(LitTokens(optim=after), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert all(bool(group["fused"]) == (after == "adamw_torch_fused") for group in run.optimizers[0].param_groups)


def test_gradients_that_lie_otherwise_are_stepped_right() -> None:
    """Also where the closure makes them, as under Lightning."""
    results = []
    for name in ("adamw_torch", "adamw"):
        torch.manual_seed(3)
        layer = nn.Linear(5, 7)
        optimizer = build_optimizer(layer, name, lr=0.1)

        def closure(layer: nn.Linear = layer) -> torch.Tensor:
            loss = layer(torch.arange(5.0)).square().sum()
            loss.backward()
            layer.weight.grad = layer.weight.grad.t().contiguous().t()
            return loss

        for _ in range(3):
            optimizer.zero_grad()
            assert optimizer.step(closure) > 0
        results.append(layer.weight)
    assert (results[0] - results[1]).abs().max() < 1e-6


def test_other_groups_that_do_not_name_their_parameters_are_refused() -> None:
    model = TokenModel()
    saved = torch.optim.AdamW(model.parameters()).state_dict()
    with pytest.raises(ValueError, match=r"1 group\(s\), of 7 parameters, and does not name them"):
        build_optimizer(model, "adamw").load_state_dict(saved)
