"""Strategies ``fused`` and ``fused_ddp``: the kernel, loss scaling and clipping together, equal to the plain run.

The reference is always the same fit with Lightning's own ``MixedPrecision`` and ``foreach=False``.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from lightning_optim import (
    FusedDDPStrategy,
    FusedMixedPrecision,
    FusedStrategy,
    IncompatibleTrainer,
    OptimMixin,
    build_optimizer,
)
from lightning_optim._compat.torch import has_fused_kernel, sgd_is_wrong_on_half
from lightning_optim.build.rules import Fusing, check_fused
from lightning_optim.stepping._fused import FusedStep, fused_class, is_packed
from tests.models import ForeignTokens, LitTokens, fp16_mixed, loader, trainer

CPU = torch.device("cpu")

#: Greatest difference after 20 steps with lr 1e-2: float16 activations carry the kernels' last bits into gradients.
TOLERANCE = 2e-4

OPTIMS: dict[str, dict[str, Any]] = {
    "adamw_torch": {},
    "adamw_torch amsgrad": {"amsgrad": True},
    "sgd": {},
    "sgd momentum": {"momentum": 0.9},
    "sgd nesterov": {"momentum": 0.9, "nesterov": True},
    "adagrad": {},
}
CLIPPING: dict[str, dict[str, Any]] = {
    "no clipping": {},
    "norm": {"gradient_clip_val": 0.1},
    "value": {"gradient_clip_val": 0.003, "gradient_clip_algorithm": "value"},
    "norm, accumulation": {"gradient_clip_val": 0.1, "accumulate_grad_batches": 3},
}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls of torch's fused kernels, which run as always."""
    counted: Counter[str] = Counter()

    def watch(name: str) -> None:
        kernel = getattr(torch, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return kernel(*args, **kwargs)

        monkeypatch.setattr(torch, name, call)

    for name in ("_fused_adam_", "_fused_adamw_", "_fused_sgd_", "_fused_adagrad_"):
        watch(name)
    return counted


class Overflows(LitTokens):
    """In some batches the gradients are beyond what float16 holds: in the whole model or in one parameter."""

    overflows: tuple[int, ...] = ()

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 1e36 if self.global_step_seen() in self.overflows else loss

    def global_step_seen(self) -> int:
        return len(self.losses) - 1


class Watch(Callback):
    """Notes weights, optimizer state and scale after every step."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []
        self.states: list[dict[str, Any]] = []
        self.scales: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.weights.append([p.detach().clone() for p in pl_module.parameters()])
        self.states.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))
        assert trainer.scaler is not None
        self.scales.append(trainer.scaler.get_scale())


def fit(
    strategy: Any,
    optim: str = "adamw_torch",
    module: Callable[..., L.LightningModule] = LitTokens,
    steps: int = 20,
    seed: int = 0,
    checkpoint: Path | None = None,
    width: int = 64,
    **flags: Any,
) -> tuple[Any, L.Trainer]:
    """Trains in float16 with a real GradScaler; ``optim`` is a key of ``OPTIMS`` or an identifier."""
    torch.manual_seed(seed)
    options = dict(OPTIMS.get(optim, {}))
    if strategy == "auto":
        options["foreach"] = False
    model = module(optim=optim.split(" ", maxsplit=1)[0], lr=1e-2, weight_decay=0.1, optim_args=options, width=width)
    run = trainer(**{"max_steps": steps, "strategy": strategy, "plugins": [fp16_mixed()], **flags})
    run.fit(model, loader(), ckpt_path=checkpoint, weights_only=checkpoint and True)
    return model, run


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


# --- equal to the plain run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clipping", "width"), [("no clipping", 37), ("norm", 64), ("norm", 37), ("value", 64), ("norm, accumulation", 37)]
)
@pytest.mark.parametrize("optim", OPTIMS)
def test_fp16_clipping_and_the_fused_kernel_equal_the_plain_run(
    kernels: Counter[str], optim: str, clipping: str, width: int
) -> None:
    reference, _ = fit("auto", optim, width=width, **CLIPPING[clipping])
    assert not kernels
    model, run = fit("fused", optim, width=width, **CLIPPING[clipping])
    # Two groups, with and without decay.
    assert sum(kernels.values()) == 2 * run.global_step == 40
    assert difference(model, reference) < TOLERANCE
    if clipping != "no clipping":
        unclipped, _ = fit("auto", optim, width=width, **{**CLIPPING[clipping], "gradient_clip_val": None})
        assert difference(reference, unclipped) > 5 * TOLERANCE


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw"])
def test_what_is_built_fused_trains_too(kernels: Counter[str], optim: str) -> None:
    reference, _ = fit("auto", **CLIPPING["norm"])
    model, run = fit("fused", optim, **CLIPPING["norm"])
    assert kernels == {"_fused_adamw_": 40}
    assert difference(model, reference) < TOLERANCE
    assert all(group["fused"] for group in run.optimizers[0].param_groups)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_without_loss_scaling(kernels: Counter[str], precision: str) -> None:
    flags = {"plugins": None, "precision": precision, **CLIPPING["norm"]}
    reference, _ = fit("auto", "sgd momentum", **flags)
    model, _ = fit("fused", "sgd momentum", **flags)
    assert kernels["_fused_sgd_"] == 40
    assert difference(model, reference) < TOLERANCE


class SeesGradients(LitTokens):
    """Clips by itself, and notes the norm that its hooks see."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norms: list[float] = []

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]).item())

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        for parameter in self.parameters():
            parameter.grad.clamp_(-0.002, 0.002)


def test_hooks_and_own_clipping_see_unscaled_gradients() -> None:
    reference, _ = fit("auto", module=SeesGradients)
    model, _ = fit("fused", module=SeesGradients)
    assert model.norms == pytest.approx(reference.norms, rel=1e-2)
    assert max(model.norms) < 100  # scaled, they would be some 65536 times as large
    assert difference(model, reference) < TOLERANCE


class Skips(LitTokens):
    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor | None:  # type: ignore[override]
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_training_step_that_returns_none() -> None:
    reference, _ = fit("auto", module=Skips, **CLIPPING["norm"])
    model, run = fit("fused", module=Skips, **CLIPPING["norm"])
    assert difference(model, reference) < TOLERANCE
    assert run.optimizers[0].state_dict()["state"][0]["step"] == len(model.losses) == len(reference.losses)


class TwoOptimizers(OptimMixin, L.LightningModule):
    """Manual optimization, as of a GAN: two optimizers in turn, one toggled, both clipped."""

    automatic_optimization = False

    def __init__(self, width: int = 8, **optim: Any) -> None:
        super().__init__(**optim)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 1)

    def configure_optimizers(self) -> Any:
        return self.build_optimizer(self.first), self.build_optimizer(self.second, "sgd", lr=0.1, optim_args={})

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        data = batch[0].float()
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.second(torch.tanh(self.first(data))).sub(1).square().mean())
            self.clip_gradients(optimizer, 1e3, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def test_manual_optimization_with_two_optimizers(kernels: Counter[str]) -> None:
    reference, _ = fit("auto", module=TwoOptimizers)
    assert not kernels
    model, run = fit("fused", module=TwoOptimizers)
    assert kernels["_fused_sgd_"]
    assert kernels["_fused_adamw_"]
    assert run.global_step == 20
    assert difference(model, reference) < TOLERANCE
    untrained = TwoOptimizers(optim="adamw_torch")
    torch.manual_seed(0)
    assert difference(model, untrained) > 0.01


# --- overflow ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", OPTIMS)
def test_a_step_that_overflows_is_skipped_by_the_kernel(kernels: Counter[str], optim: str) -> None:
    class Model(Overflows):
        overflows = (0, 1, 7, 19)

    watches = Watch(), Watch()
    reference, _ = fit("auto", optim, Model, callbacks=[watches[0]], **CLIPPING["norm"])
    model, _ = fit("fused", optim, Model, callbacks=[watches[1]], **CLIPPING["norm"])
    # The kernel is called all the same: nobody waits for the flag.
    assert sum(kernels.values()) == 40
    seen = watches[1]
    assert len(seen.weights) == 21
    for step in range(20):
        skipped = step in Model.overflows
        assert same(seen.weights[step], seen.weights[step + 1]) is skipped
        assert seen.scales[step + 1] == seen.scales[step] / (2 if skipped else 1)
        if skipped and step > 1:
            assert same(seen.states[step], seen.states[step + 1])
    for state in seen.states[2].values():
        # Before the first step that counts.
        assert all(value.count_nonzero() == 0 for value in state.values() if value is not None)
    if optim.startswith("adam") or optim == "adagrad":
        assert {state["step"].item() for state in seen.states[-1].values()} == {16.0}
    assert watches[0].scales == seen.scales
    assert difference(model, reference) < TOLERANCE


# --- checkpoints ------------------------------------------------------------------------------------------------------


def saved(directory: Path, strategy: str, optim: str, module: Callable[..., Any] = Overflows) -> Path:
    callback = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=10)
    fit(strategy, optim, module, steps=10, callbacks=[callback], enable_checkpointing=True, **CLIPPING["norm"])
    return directory / "step=10.ckpt"


class OverflowsOnce(Overflows):
    overflows = (4,)


@pytest.mark.parametrize("optim", OPTIMS)
def test_resumes_exactly_with_its_scale(kernels: Counter[str], tmp_path: Path, optim: str) -> None:
    whole, run = fit("fused", optim, OverflowsOnce, **CLIPPING["norm"])
    path = saved(tmp_path, "fused", optim, OverflowsOnce)
    contents = torch.load(path, weights_only=True)
    assert contents["MixedPrecision"]["scale"] == 32768.0
    kernels.clear()
    resumed, again = fit("fused", optim, seed=1, checkpoint=path, **CLIPPING["norm"])
    assert sum(kernels.values()) == 20
    assert same(resumed.state_dict(), whole.state_dict())
    assert same(again.optimizers[0].state_dict(), run.optimizers[0].state_dict())
    assert again.scaler is not None
    assert again.scaler.get_scale() == 32768.0


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd momentum", "adagrad"])
@pytest.mark.parametrize(("first", "second"), [("auto", "fused"), ("fused", "auto")])
def test_checkpoints_move_between_plain_and_fused(
    kernels: Counter[str], tmp_path: Path, optim: str, first: str, second: str
) -> None:
    reference, _ = fit("auto", optim, OverflowsOnce, **CLIPPING["norm"])
    path = saved(tmp_path, first, optim, OverflowsOnce)
    for group in torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]:
        assert not group["fused"]
        assert not group["foreach"]
    kernels.clear()
    resumed, run = fit(second, optim, seed=1, checkpoint=path, **CLIPPING["norm"])
    assert sum(kernels.values()) == (20 if second == "fused" else 0)
    assert difference(resumed, reference) < TOLERANCE
    assert run.scaler is not None
    assert run.scaler.get_scale() == 32768.0


def test_a_plain_checkpoint_does_not_turn_an_own_fused_optimizer_off(kernels: Counter[str]) -> None:
    weights = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    plain, fused = Adam(weights[:1], foreach=True), Adam(weights[1:], fused=True)
    weights[0].grad = torch.ones(5)
    plain.step()
    step = FusedStep(fused)
    fused.load_state_dict(plain.state_dict())
    assert fused.param_groups[0]["fused"]
    assert not fused.param_groups[0]["foreach"]
    step.detach()
    fused.load_state_dict(plain.state_dict())
    assert not fused.param_groups[0]["fused"]  # torch's own behaviour is back


# --- optimizers of the module's own -----------------------------------------------------------------------------------


class Own(ForeignTokens):
    def __init__(self, make: Callable[..., Optimizer]) -> None:
        super().__init__()
        self.optimizer = make(self.parameters())

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer


@pytest.mark.parametrize("built", [{}, {"foreach": True}, {"foreach": False}, {"fused": False}, {"fused": True}])
@pytest.mark.parametrize("kind", [Adam, AdamW, SGD, Adagrad])
def test_is_as_it_was_built_when_fit_ends(
    kernels: Counter[str], kind: Callable[..., Optimizer], built: dict[str, Any]
) -> None:
    own = Own(lambda parameters: kind(parameters, lr=1e-2, **built))
    optimizer, before = own.optimizer, dict(own.optimizer.defaults)
    attributes = set(vars(optimizer))
    scales = getattr(optimizer, "_step_supports_amp_scaling", False)
    for fits in (1, 2):
        run = trainer(max_steps=5 * fits, strategy="fused", plugins=[fp16_mixed()])
        if built.get("foreach"):
            with pytest.raises(IncompatibleTrainer, match="foreach=True, another way to step"):
                run.fit(own, loader())
            assert not kernels
        else:
            run.fit(own, loader())
            assert sum(kernels.values()) == 5 if fits == 1 else 15
        assert optimizer.defaults == before
        assert all(group[key] == before[key] for group in optimizer.param_groups for key in before)
        hooks = [value for name, value in vars(optimizer).items() if "hooks" in name]
        assert not any(hooks)
    assert set(vars(optimizer)) - attributes <= {"_step_supports_amp_scaling", "_need_device_dtype_check_for_fused"}
    assert getattr(optimizer, "_step_supports_amp_scaling", False) is scales
    # And it still steps.
    count = sum(kernels.values())
    for parameter in own.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert sum(kernels.values()) - count == bool(built.get("fused"))


def test_is_as_it_was_built_after_an_exception() -> None:
    class Fails(Own):
        def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
            if batch_idx == 3:
                raise RuntimeError("as expected")
            return super().training_step(batch, batch_idx)

    own = Fails(lambda parameters: AdamW(parameters))
    with pytest.raises(RuntimeError, match="as expected"):
        trainer(max_steps=5, strategy="fused").fit(own, loader())
    assert own.optimizer.param_groups[0]["fused"] is None
    assert own.optimizer.defaults["fused"] is None
    assert own.optimizer._step_supports_amp_scaling is False


@pytest.mark.parametrize("kind", [Adam, AdamW, Adagrad])
def test_an_optimizer_that_has_stepped_goes_on(kernels: Counter[str], kind: Callable[..., Optimizer]) -> None:
    gradients = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    exact = stepped(kind, torch.ones(40, dtype=torch.float64), list(gradients), fused=False, foreach=False, lr=1e-2)
    weight = nn.Parameter(torch.ones(40, dtype=torch.float64))
    optimizer = kind([weight], lr=1e-2, foreach=False)
    for number, gradient in enumerate(gradients):
        # Plain, fused, plain again.
        if number == 2:
            # As torch keeps it where float64 is the default.
            optimizer.state[weight]["step"] = optimizer.state[weight]["step"].double()
            step = FusedStep(optimizer)
            assert optimizer.state[weight]["step"].dtype is torch.float32
        if number == 4:
            step.detach()
        weight.grad = gradient
        optimizer.step()
    assert sum(kernels.values()) == 2
    assert (weight - exact).abs().max() < 1e-12


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.model.embedding)

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.embedding, optimizer, lr=3e-3)


@pytest.mark.parametrize("make", [lambda p: AdamW(p, 3e-3), lambda p: SGD(p, 1e-2, momentum=0.9)])
def test_parameters_unfrozen_later_are_stepped_by_the_kernel(
    kernels: Counter[str], make: Callable[..., Optimizer]
) -> None:
    def train(strategy: str) -> Own:
        torch.manual_seed(0)
        own = Own(lambda parameters: make([p for p in parameters if p.shape != (16, 64)]))
        flags = {"plugins": [fp16_mixed()], "callbacks": [Unfreezes()], "max_epochs": 2, "gradient_clip_val": 0.1}
        trainer(strategy=strategy, **flags).fit(own, loader())
        return own

    reference, own = train("auto"), train("fused")
    assert sum(kernels.values()) == 10 + 20
    assert len(own.optimizer.param_groups) == 2
    assert [group["fused"] for group in own.optimizer.param_groups] == [None, None]
    assert difference(own, reference) < TOLERANCE


class Late(Own):
    """Uses its head from the second batch on, and lays a gradient out otherwise."""

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx:
            return loss
        hidden = self.model.embedding(batch[0])
        return self.model.norm(hidden + self.model.linear(hidden)).square().mean()

    def on_after_backward(self) -> None:
        weight = self.model.linear.weight
        assert weight.grad is not None
        weight.grad = weight.grad.t().contiguous().t()


@pytest.mark.parametrize("mixed", [None, "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("make", [lambda p: AdamW(p, 1e-2), lambda p: SGD(p, 1e-2, momentum=0.9)])
def test_what_backward_leaves_is_made_fit_for_the_kernel(
    kernels: Counter[str], make: Callable[..., Optimizer], mixed: Any
) -> None:
    """Lightning runs backward in the closure of the step, or before it where it scales the loss."""

    def train(strategy: str) -> Late:
        torch.manual_seed(0)
        own = Late(make)
        plugins = [MixedPrecision(mixed, "cpu")] if mixed else None
        trainer(strategy=strategy, plugins=plugins, max_steps=6).fit(own, loader())
        return own

    assert difference(train("auto"), train("fused")) < TOLERANCE
    assert sum(kernels.values()) == 6


def test_modes_without_an_optimizer() -> None:
    model = LitTokens(optim="rmsprop")
    run = trainer(strategy="fused", plugins=[fp16_mixed()])
    assert run.validate(model, loader(2), verbose=False)
    assert run.test(model, loader(2), verbose=False)
    assert len(run.predict(model, loader(2))) == 2

    class None_(ForeignTokens):
        def configure_optimizers(self) -> None:  # type: ignore[override]
            return None

    with pytest.warns(UserWarning, match="configure_optimizers` returned `None`"):
        trainer(max_steps=2, strategy="fused").fit(None_(), loader())


def test_says_once_what_it_made_fused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit("fused", module=TwoOptimizers, steps=2)
        fit("fused", "adamw_torch_fused", steps=2)
    said = [record.message for record in caplog.records if record.message.startswith("strategy=")]
    assert said == ["strategy='fused': torch's fused kernels step AdamW and SGD."]


# --- what the kernels take for granted --------------------------------------------------------------------------------


def stepped(kind: Callable[..., Optimizer], parameter: Tensor, gradients: list[Tensor], **options: Any) -> Tensor:
    """Returns the parameter after a step with each of the gradients."""
    parameter = nn.Parameter(parameter.clone(memory_format=torch.preserve_format))
    fused = options.pop("fused")
    optimizer = kind([parameter], **options)
    step = FusedStep(optimizer) if fused else None
    for gradient in gradients:
        parameter.grad = gradient.clone(memory_format=torch.preserve_format)
        optimizer.step()
    if step:
        step.detach()
    return parameter.detach()


KINDS: list[tuple[Callable[..., Optimizer], dict[str, Any]]] = [
    (kind, {"lr": 1e-2, "weight_decay": decay, "maximize": maximize, **options})
    for kind, variants in (
        (SGD, ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.5})),
        (Adam, ({}, {"amsgrad": True})),
        (AdamW, ({}, {"amsgrad": True})),
        (Adagrad, ({}, {"lr_decay": 0.1, "initial_accumulator_value": 0.5})),
    )
    for options in variants
    for decay, maximize in ((0.0, False), (0.1, True))
]
SIZES = (1, 7, 16, 33, 63, 1000, 4097)
#: By type of the parameters: what five roundings may make of numbers around 2.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_the_kernels_of_this_torch_are_right(
    kind: Callable[..., Optimizer], options: dict[str, Any], dtype: torch.dtype
) -> None:
    if kind is SGD and dtype in (torch.float16, torch.bfloat16) and sgd_is_wrong_on_half():
        fusing = Fusing("fused", SGD([nn.Parameter(torch.zeros(7, dtype=dtype))]), None, {})
        with pytest.raises(IncompatibleTrainer, match="issues/191763"):
            check_fused(fusing)
        return
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        parameter, *gradients = torch.randn(6, size, generator=generator).to(dtype).unbind()
        plain = stepped(kind, parameter, gradients, fused=False, foreach=False, **options)
        fused = stepped(kind, parameter, gradients, fused=True, **options)
        exact = stepped(
            kind, parameter.double(), [g.double() for g in gradients], fused=False, foreach=False, **options
        )
        # In half types the plain loop rounds more often than the kernel, and eps may be 0 in it.
        assert (fused - exact).abs().max() <= (plain - exact).abs().nan_to_num(0.0).max() + ROUNDING[dtype]
        assert not torch.equal(fused, parameter)


def test_whether_half_sgd_is_wrong_is_found_out_by_trying() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        parameter = torch.zeros(64, dtype=dtype)
        moved = stepped(SGD, parameter, [torch.ones_like(parameter)], lr=1.0, fused=True)
        assert torch.equal(moved, -torch.ones_like(parameter)) is not sgd_is_wrong_on_half()


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_gradients_and_states_may_lie_otherwise_in_memory(
    kind: Callable[..., Optimizer], options: dict[str, Any]
) -> None:
    parameter, *gradients = torch.randn(6, 5, 37, generator=torch.Generator().manual_seed(0)).unbind()
    plain = stepped(kind, parameter, gradients, fused=False, foreach=False, **options)
    other = [gradient.t().contiguous().t() for gradient in gradients]
    assert (stepped(kind, parameter, other, fused=True, **options) - plain).abs().max() <= 1e-6
    # A checkpoint from before the model took another memory format.
    weight = nn.Parameter(parameter.clone())
    first = kind([weight], **options)
    weight.grad = gradients[0]
    first.step()
    turned = nn.Parameter(weight.detach().t().contiguous().t())
    second = kind([turned], **options)
    second.load_state_dict(first.state_dict())
    FusedStep(second)
    for gradient in gradients[1:]:
        turned.grad = gradient
        second.step()
    assert (turned - plain).abs().max() <= 1e-6


def test_the_layout_of_an_unmended_gradient_matters() -> None:
    """If this fails, torch's kernel has learned of strides: then FusedStep need not mend them on a CPU."""
    parameter, gradient = torch.zeros(2, 3), torch.arange(6.0).view(2, 3)
    weight = nn.Parameter(parameter)
    weight.grad = gradient.t().contiguous().t()
    SGD([weight], lr=1.0, fused=True).step()
    assert not torch.equal(weight.detach(), -gradient)


def test_packed_parameters() -> None:
    square = torch.zeros(4, 6)
    for packed in (square, square.t(), square[1:], square[:, :1].contiguous(), torch.zeros(0, 3), torch.zeros(())):
        assert is_packed(packed)
    assert is_packed(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    assert is_packed(torch.zeros(2, 1, 100).as_strided((2, 1, 100), (100, 1, 1)))
    for unfit in (square[:, ::2], square[::2], square[:, 1:], torch.zeros(3, 1).expand(3, 4)):
        assert not is_packed(unfit)


def test_which_classes_have_a_kernel() -> None:
    class Subclass(AdamW):
        pass

    class OwnStep(AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    weight = [nn.Parameter(torch.zeros(1))]
    assert fused_class(Subclass(weight)) is AdamW
    assert fused_class(OwnStep(weight)) is None
    assert fused_class(RMSprop(weight)) is None
    assert fused_class(build_optimizer(weight, "grokadamw")) is None
    for kind in (Adam, AdamW, SGD, Adagrad):
        assert fused_class(kind(weight)) is kind  # type: ignore[arg-type]
        assert has_fused_kernel(kind, CPU)
        assert not has_fused_kernel(kind, torch.device("meta"))
        assert not has_fused_kernel(kind, torch.device("xla"))


# --- Trainer ----------------------------------------------------------------------------------------------------------


def test_flags() -> None:
    names = {name for name in StrategyRegistry.available_strategies() if name.startswith("fused")}
    assert names == {"fused", "fused_ddp", "fused_ddp_spawn", "fused_ddp_fork", "fused_ddp_notebook"}
    assert isinstance(trainer(strategy="fused").strategy, FusedStrategy)
    assert trainer(strategy=FusedStrategy()).strategy.root_device == CPU
    assert isinstance(trainer(strategy="fused_ddp", devices=2).strategy, FusedDDPStrategy)
    with pytest.raises(IncompatibleTrainer, match=r"one device, and the Trainer has 2.*strategy='fused_ddp'"):
        trainer(strategy="fused", devices=2)


def test_precision_plugins() -> None:
    class Foreign(MixedPrecision):
        pass

    class Ours(FusedMixedPrecision):
        pass

    plugin = fp16_mixed()
    run = trainer(strategy="fused", plugins=[plugin])
    assert type(run.precision_plugin) is FusedMixedPrecision
    assert (run.precision, run.scaler) == ("16-mixed", plugin.scaler)
    # Lightning's would refuse to clip for a fused optimizer there, too.
    assert type(trainer(strategy="fused", precision="bf16-mixed").precision_plugin) is FusedMixedPrecision
    ours = Ours("16-mixed", "cpu")
    assert trainer(strategy="fused", plugins=[ours]).precision_plugin is ours
    for strategy, devices in (("fused", 1), ("fused_ddp", 2)):
        with pytest.raises(IncompatibleTrainer, match=rf"'{strategy}' with plugins=Foreign.*FusedMixedPrecision"):
            trainer(strategy=strategy, devices=devices, plugins=[Foreign("16-mixed", "cpu")])


def test_command_line(kernels: Counter[str]) -> None:
    flags = ["accelerator=cpu", "strategy=fused", "max_steps=3", "logger=false", "enable_checkpointing=false"]
    arguments = ["fit", *(f"--trainer.{flag}" for flag in flags), "--model.optim=sgd"]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

    cli = LightningCLI(LitTokens, Data, args=arguments, trainer_defaults=quiet, save_config_callback=None)
    assert isinstance(cli.trainer.strategy, FusedStrategy)
    assert kernels == {"_fused_sgd_": 6}
