"""What test_npu.py runs in a process of its own, where torch loads tests/stand_ins/ascend and has a device "npu"."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu.optim
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.amp import GradScaler

from lightning_optim import (
    IncompatibleTrainer,
    InvalidOption,
    NPUAccelerator,
    NPUDDPStrategy,
    NPUStrategy,
    build_optimizer,
)
from lightning_optim.optimizers.adapters._npu import NpuFusedAdamW
from tests.models import ForeignTokens, LitTokens, loader, trainer
from tests.npu_worker import FUSED, on_npu, train

NPU = torch.device("npu", 0)
# The stand-in runs the CPU's kernels: equal bit for bit. The fused AdamW multiplies in another order than torch's, and
# the largest weights are about 1: two units in the last place.
TOLERANCE = {FUSED: 2.5e-7}


class Watched(LitTokens):
    """Remembers where its parameters, batches and activations were while it trained, and of which type."""

    def on_fit_start(self) -> None:
        self.seen: set[tuple[str, str]] = set()

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            hidden = self.model.linear(self.model.embedding(batch[0]))
        self.seen |= {("batch", batch[0].device.type), ("loss", loss.device.type), ("cast", str(hidden.dtype))}
        self.seen |= {("parameters", parameter.device.type) for parameter in self.parameters()}
        return loss


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a.cpu() - b.cpu()).abs().max().item() for a, b in pairs)


# --- training ---------------------------------------------------------------------------------------------------------

CLIP_VALUE = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip_norm": {"gradient_clip_val": 0.5},
    "clip_value": CLIP_VALUE,
    "accumulate": {"accumulate_grad_batches": 4},
    "bf16-mixed": {"precision": "bf16-mixed", "gradient_clip_val": 0.5},
    "16-mixed": {"precision": "16-mixed", "gradient_clip_val": 0.5},
}
FITS = [
    *((name, mode) for name in ("adamw_torch", "adamw_torch_layerwise", FUSED) for mode in MODES),
    *((name, "clip_norm") for name in ("adamw", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor")),
    *(("adamw_torch_fused", mode) for mode in ("bf16-mixed", "16-mixed")),
]


@pytest.mark.parametrize(("name", "mode"), FITS)
def test_a_fit_is_that_of_the_cpu(name: str, mode: str) -> None:
    flags = {"max_steps": 6, **MODES[mode]}
    models = {}
    for device in ("npu", "cpu"):
        torch.manual_seed(0)
        own = "adamw_torch" if (device, name) == ("cpu", FUSED) else name
        models[device] = Watched(optim=own, lr=1e-3, weight_decay=0.01, lr_scheduler="linear", warmup_steps=3)
        if device == "npu":
            run = on_npu(**flags)
        elif "precision" in flags:
            mixed = MixedPrecision(flags["precision"], "cpu")
            run = trainer(**{**flags, "precision": None, "plugins": [mixed]})
        else:
            run = trainer(**flags)
        run.fit(models[device], loader(batches=6), loader(batches=2, seed=1))
        assert run.global_step == 6
        assert bool(run.optimizers[0].param_groups[0].get("fused")) == (name in ("adamw", "adamw_torch_fused"))
        models[device].metric = run.callback_metrics["val_loss"]
    dtype = {"bf16-mixed": "torch.bfloat16", "16-mixed": "torch.float16"}.get(mode, "torch.float32")
    at = {("parameters", "npu"), ("batch", "npu"), ("loss", "npu"), ("cast", dtype)}
    assert models["npu"].seen == at
    assert difference(models["npu"], models["cpu"]) <= TOLERANCE.get(name, 0.0)
    assert models["npu"].metric.item() == pytest.approx(models["cpu"].metric.item(), abs=1e-6)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_layerwise", FUSED])
def test_a_step_that_overflows_is_skipped(name: str) -> None:
    """The user's own plugin is kept, and its scaler works: the first steps are skipped until the scale has fallen."""
    models = []
    for device in ("npu", "cpu"):
        torch.manual_seed(0)
        precision = MixedPrecision("16-mixed", device, GradScaler(device, init_scale=2.0**24))
        model = LitTokens(optim="adamw_torch" if device == "cpu" else name, lr=1e-3)
        make = on_npu if device == "npu" else trainer
        run = make(max_steps=14, plugins=[precision])
        assert run.precision_plugin is precision
        before = {key: value.clone() for key, value in model.state_dict().items()}
        run.fit(model, loader())
        assert precision.scaler.get_scale() < 2.0**24
        assert any(not torch.equal(value.cpu(), before[key]) for key, value in model.state_dict().items())
        models.append(model)
    if not name.endswith("_layerwise"):  # which skips bucket by bucket
        assert difference(*models) <= TOLERANCE[FUSED]


def test_validate_test_and_predict_run_on_the_device() -> None:
    class Probe(LitTokens):
        def forward(self, tokens: Tensor) -> Tensor:
            seen.append(tokens.device)
            return super().forward(tokens)

    seen: list[torch.device] = []
    run = on_npu()
    for use in (run.validate, run.test, run.predict):
        use(Probe(), loader(batches=2))
    assert seen == [NPU] * 6


def test_the_strategies_own_optimizer_of_a_foreign_module() -> None:
    on_npu(max_steps=2, gradient_clip_val=0.5).fit(ForeignTokens(), loader(batches=2))


# --- resume -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_moves_between_torchs_adamw_and_the_fused_one(tmp_path: Path) -> None:
    """In both directions, as with optim_fallback on a machine without NPU."""
    for first, second in (("adamw_torch", FUSED), (FUSED, "adamw_torch")):
        whole = train(first, tmp_path)
        model = LitTokens(optim=second, lr=1e-3)
        on_npu(max_steps=20).fit(model, loader(), ckpt_path=tmp_path / f"{first}.ckpt", weights_only=True)
        assert 0 < difference(model, whole) <= TOLERANCE[FUSED]


# --- the accelerator and the strategies -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "expected"),
    [(1, [0]), ("1", [0]), (2, [0, 1]), (-1, [0, 1]), ("-1", [0, 1]), ([1], [1]), ("1,", [1]), ("0, 1", [0, 1])],
)
def test_devices(devices: Any, expected: list[int]) -> None:
    assert NPUAccelerator.parse_devices(devices) == expected
    assert NPUAccelerator.get_parallel_devices(expected) == [torch.device("npu", index) for index in expected]


@pytest.mark.parametrize("devices", [3, -2, "2,", [0, 0], [0, 7], "first", [], ""])
def test_devices_that_are_not_there(devices: Any) -> None:
    with pytest.raises(IncompatibleTrainer, match=r"this machine has 2\. Use a number from 1 to 2, -1 for all"):
        NPUAccelerator.parse_devices(devices)


def test_the_accelerator_sets_and_measures_the_device() -> None:
    accelerator = AcceleratorRegistry.get("npu")
    accelerator.setup_device(torch.device("npu", 1))
    assert torch.npu.current_device() == 1
    accelerator.setup_device(NPU)
    assert "allocated_bytes.all.current" in accelerator.get_device_stats(NPU)


def test_the_accelerator_without_its_strategy_is_refused() -> None:
    """Lightning would train on the CPU."""
    model = LitTokens()
    with pytest.raises(IncompatibleTrainer, match=r"would train on 'cpu'.* Use .*='npu', strategy='npu'"):
        trainer(accelerator="npu", devices=1, max_steps=1).fit(model, loader())
    assert not model.losses


@pytest.mark.parametrize("strategy", ["ddp", "fused_ddp"])
def test_ddp_that_wraps_the_model_for_cuda_is_refused(strategy: str) -> None:
    run = trainer(accelerator="npu", devices=1, strategy=strategy)
    with pytest.raises(IncompatibleTrainer, match=rf"strategy='{strategy}'.*CUDA stream\. Use strategy='npu_ddp'"):
        run.accelerator.setup(run)
    for fitting in ("npu_ddp", "layerwise_ddp"):
        run = trainer(accelerator="npu", devices=1, strategy=fitting)
        run.accelerator.setup(run)


def test_the_fused_strategy_steps_what_torch_npu_has_a_kernel_of() -> None:
    models = []
    for device in ("npu", "cpu"):
        torch.manual_seed(0)
        models.append(Watched(optim="adamw_torch", lr=1e-3))
        flags = {"plugins": [MixedPrecision("16-mixed", device)], "gradient_clip_val": 0.5, "max_steps": 4}
        trainer(accelerator=device, devices=1, strategy="fused", **flags).fit(models[-1], loader())
    assert ("parameters", "npu") in models[0].seen
    assert difference(*models) == 0
    with pytest.raises(IncompatibleTrainer, match=r"kernel of SGD for npu\. Use .*'adamw'.*Trainer\(strategy='npu'\)"):
        trainer(accelerator="npu", devices=1, strategy="fused").fit(LitTokens(optim="sgd"), loader())


def test_autocast_on_another_device_is_refused() -> None:
    run = trainer(accelerator="npu", devices=1, strategy=SingleDeviceStrategy("npu:0"), precision="bf16-mixed")
    with pytest.raises(IncompatibleTrainer, match="would cast on 'cuda' and leave the NPU in float32"):
        run.fit(LitTokens(), loader())


def test_the_layerwise_strategy_trains_there_with_a_plugin_for_the_device() -> None:
    models = []
    for device in ("npu", "cpu"):
        torch.manual_seed(0)
        models.append(Watched(optim="adamw_torch", lr=1e-3))
        plugins = [MixedPrecision("bf16-mixed", device)]
        trainer(accelerator=device, devices=1, strategy="layerwise", plugins=plugins, max_steps=4).fit(
            models[-1], loader()
        )
    assert {("parameters", "npu"), ("cast", "torch.bfloat16")} <= models[0].seen
    assert difference(*models) == 0


def test_the_strategies_want_an_npu() -> None:
    for strategy in ("npu", "npu_ddp"):
        with pytest.raises(
            IncompatibleTrainer, match=f"CPUAccelerator. Use Trainer.accelerator='npu', strategy='{strategy}'"
        ):
            trainer(accelerator="cpu", strategy=strategy)
    with pytest.raises(
        IncompatibleTrainer, match=r"the Trainer has 2 devices. Use Trainer\(strategy='npu_ddp'\), or devices=1"
    ):
        trainer(accelerator="npu", strategy="npu")


def test_a_strategy_given_as_an_object() -> None:
    run = trainer(accelerator="npu", strategy=NPUStrategy(device="npu:1"), precision="16-mixed")
    assert run.strategy.root_device == torch.device("npu", 1)
    assert (run.precision_plugin.device, run.precision_plugin.scaler._device) == ("npu", "npu")
    assert run.precision_plugin.scaler.is_enabled()


def test_npu_ddp_knows_its_devices_and_backend() -> None:
    run = trainer(accelerator="npu", strategy="npu_ddp", precision="bf16-mixed")
    assert isinstance(run.strategy, NPUDDPStrategy)
    assert run.strategy.parallel_devices == [torch.device("npu", 0), torch.device("npu", 1)]
    assert run.strategy._get_process_group_backend() == "hccl"
    assert run.strategy.determine_ddp_device_ids() == [0]
    assert run.precision_plugin.device == "npu"
    assert NPUDDPStrategy(process_group_backend="gloo")._get_process_group_backend() == "gloo"


# --- the fused AdamW --------------------------------------------------------------------------------------------------


class Pair:
    """The same little model twice, stepped by torch's AdamW and by the fused one."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.models = [nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).to(NPU) for _ in range(2)]
        self.models[1].load_state_dict(self.models[0].state_dict())
        self.optimizers: list[torch.optim.Optimizer] = []
        for model, optimizer in zip(self.models, (torch.optim.AdamW, NpuFusedAdamW), strict=True):
            groups = [{"params": [*model[0].parameters()]}, {"params": [*model[1].parameters()], "weight_decay": 0.0}]
            self.optimizers.append(optimizer(groups, lr=1e-2, **options))

    @property
    def fused(self) -> NpuFusedAdamW:
        return self.optimizers[1]

    def backward(self, seed: int = 0, **zero: Any) -> None:
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).to(NPU)
            optimizer.zero_grad(**zero)
            model(x).square().mean().backward()

    def step(self, steps: int = 3, **zero: Any) -> None:
        for seed in range(steps):
            self.backward(seed, **zero)
            for optimizer in self.optimizers:
                optimizer.step()

    @property
    def difference(self) -> float:
        return difference(*self.models)


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    pair.step()
    assert pair.difference < 1e-6
    yield pair
    assert pair.difference < 1e-6


def test_the_stand_in_has_the_traps() -> None:
    """Else the tests below would show nothing."""
    upstream = torch_npu.optim.NpuFusedAdamW
    weight = nn.Parameter(torch.ones(3, device=NPU))
    optimizer = upstream([weight])
    weight.sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="set_to_none"):
        optimizer.zero_grad(set_to_none=True)
    weight.grad = None
    (weight.sum() * 0).backward()
    state = {0: {"step": 7, "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    optimizer.step()  # with the old gradient and the old state
    assert (optimizer.combined_param_states_indexed_by_group[0][0]["exp_avg"] > 0.15).all()
    half = nn.Parameter(torch.ones(3, device=NPU, dtype=torch.bfloat16))
    half.sum().backward()
    with pytest.raises(TypeError, match="float32 or float16"):
        upstream([half]).step()


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"weight_decay": 0.1, "betas": (0.5, 0.7), "eps": 1e-3}])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_fused_step_is_torchs(options: dict[str, Any], set_to_none: bool) -> None:
    pair = Pair(**options)
    pair.step(10, set_to_none=set_to_none)
    assert 0 <= pair.difference < 1e-6
    flat = pair.fused.params_all_group_combined[0]
    assert all(
        flat.data_ptr() <= p.data_ptr() < flat.data_ptr() + flat.numel() * 4 for p in pair.models[1].parameters()
    )


def test_gradients_stay_in_place(pair: Pair) -> None:
    flat = *pair.fused.params_all_group_combined, *pair.fused.grads_all_group_combined
    before = [parameter.grad.data_ptr() for parameter in pair.models[1].parameters()]
    pair.fused.zero_grad()
    assert all((parameter.grad == 0).all() for parameter in pair.models[1].parameters())
    pair.step()
    assert [parameter.grad.data_ptr() for parameter in pair.models[1].parameters()] == before
    now = *pair.fused.params_all_group_combined, *pair.fused.grads_all_group_combined
    assert all(one is other for one, other in zip(flat, now, strict=True))


def test_a_parameter_without_use_is_stepped_by_its_momentum() -> None:
    torch.manual_seed(0)
    ends = []
    for optimizer_class in (torch.optim.AdamW, NpuFusedAdamW):
        weights = [nn.Parameter(torch.ones(3, device=NPU)) for _ in range(2)]
        optimizer = optimizer_class(weights, lr=0.1)
        for used in (weights, weights[:1], weights):
            optimizer.zero_grad(set_to_none=False)
            sum(weight.square().sum() for weight in used).backward()
            optimizer.step()
        ends.append(torch.cat(weights).detach().cpu())
    assert torch.allclose(*ends, atol=1e-6)


def test_gradients_that_others_freed(pair: Pair) -> None:
    for seed in range(3):
        for model in pair.models:
            model.zero_grad()
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).to(NPU)
            model(x).square().mean().backward()
        for optimizer in pair.optimizers:
            optimizer.step()


def test_clipping_sees_gradients_that_others_freed(pair: Pair) -> None:
    for model in pair.models:
        model.zero_grad()
    pair.backward(7)
    nn.utils.clip_grad_norm_(pair.models[0].parameters(), 0.1)
    pair.fused.clip_grad_norm_fused_(0.1)
    for optimizer in pair.optimizers:
        optimizer.step()


def test_gradients_that_are_slices_of_a_larger_one() -> None:
    torch.manual_seed(0)
    start = [torch.randn(2, 3) for _ in range(2)]
    ends = []
    for optimizer_class in (torch.optim.AdamW, NpuFusedAdamW):
        weights = [nn.Parameter(value.to(NPU, copy=True)) for value in start]
        optimizer = optimizer_class(weights, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (torch.cat(weights) * torch.arange(12.0).view(4, 3).to(NPU)).square().sum().backward()
            optimizer.step()
        ends.append(torch.cat(weights).detach().cpu())
    assert torch.allclose(*ends, atol=1e-6)


def test_a_state_dict_is_taken_after_a_step(pair: Pair) -> None:
    saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in pair.optimizers]
    pair.step(5)
    for optimizer, state in zip(pair.optimizers, saved, strict=True):
        optimizer.load_state_dict(state)
    pair.step()
    assert {state["step"] for state in pair.fused.state.values()} == {6}


def test_a_state_dict_of_torchs_is_taken(pair: Pair) -> None:
    pair.step(2)
    pair.fused.load_state_dict(copy.deepcopy(pair.optimizers[0].state_dict()))
    pair.step()
    assert {state["step"] for state in pair.fused.state.values()} == {8}


def test_a_group_added_later_is_stepped(pair: Pair) -> None:
    for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
        model.append(nn.Linear(2, 2).to(NPU))
        nn.init.eye_(model[2].weight)
        nn.init.zeros_(model[2].bias)
        optimizer.add_param_group({"params": [*model[2].parameters()]})
    pair.step()
    assert not torch.equal(pair.models[1][2].weight.cpu(), torch.eye(2))


def test_a_parameter_that_moved_is_stepped(pair: Pair) -> None:
    for model in pair.models:
        model.to("cpu")
        model.to(NPU)
    pair.step()


def test_frozen_parameters_stay(pair: Pair) -> None:
    for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
        optimizer.zero_grad()
        for parameter in model[0].parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
    before = pair.models[1][0].weight.detach().clone()
    pair.step()
    assert torch.equal(pair.models[1][0].weight, before)


def test_different_numbers_of_steps_are_refused(pair: Pair) -> None:
    pair.models[1][0].bias.grad = None
    pair.fused.step()
    pair.backward()
    with pytest.raises(IncompatibleTrainer, match="group 0 have taken different numbers of steps, 3 to 4"):
        pair.fused.step()
    pair.models[1].load_state_dict(pair.models[0].state_dict())


def test_the_closure_runs_with_gradients(pair: Pair) -> None:
    def closure(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4, device=NPU)).square().mean()
        loss.backward()
        return loss

    losses = [o.step(lambda m=m, o=o: closure(m, o)) for m, o in zip(pair.models, pair.optimizers, strict=True)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)


def test_the_memory_outlives_the_optimizer(pair: Pair) -> None:
    flat = weakref.ref(pair.fused.params_all_group_combined[0])
    pair.optimizers = []
    assert flat() is not None
    pair.models[1] = pair.models[0]
    assert flat() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 2, dtype=dtype).to(NPU)
    with pytest.raises(IncompatibleTrainer, match=r"steps float32 parameters.*Use Trainer\(precision='bf16-mixed'\)"):
        NpuFusedAdamW(model.parameters())


def test_bf16_weights_are_refused_before_training() -> None:
    model = LitTokens(optim=FUSED)
    with pytest.raises(IncompatibleTrainer, match=r"is torch.bfloat16. Use Trainer\(precision='bf16-mixed'\)"):
        on_npu(precision="bf16-true").fit(model, loader())
    assert not model.losses


def test_memory_that_cannot_be_moved_is_refused() -> None:
    transposed = nn.Parameter(torch.ones(2, 3, device=NPU).t())
    with pytest.raises(IncompatibleTrainer, match=r"not contiguous, and one of shape \(3, 2\)"):
        NpuFusedAdamW([transposed])
    whole = torch.ones(4, device=NPU)
    halves = [nn.Parameter(whole[:2]), nn.Parameter(whole[2:])]
    sum(half.sum() for half in halves).backward()
    with pytest.raises(IncompatibleTrainer, match=r"share memory, and one of shape \(2,\)"):
        NpuFusedAdamW(halves).step()


def test_a_maximizing_state_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2, device=NPU))
    state = torch.optim.AdamW([weight], maximize=True).state_dict()
    with pytest.raises(InvalidOption, match="maximize=True, which optim='adamw_torch_npu_fused' lacks"):
        NpuFusedAdamW([weight]).load_state_dict(state)


def test_layerwise_is_refused() -> None:
    with pytest.raises(IncompatibleTrainer, match=r"adamw_torch_npu_fused_layerwise.*flat buffers"):
        LitTokens(optim=f"{FUSED}_layerwise")
    with pytest.raises(IncompatibleTrainer, match=r"steps those as a whole\. Use another strategy"):
        trainer(accelerator="npu", devices=1, strategy="layerwise", max_steps=1).fit(LitTokens(optim=FUSED), loader())


def test_parameters_on_the_cpu_are_refused() -> None:
    with pytest.raises(IncompatibleTrainer, match="runs on npu, but parameters are on cpu"):
        build_optimizer(nn.Linear(2, 2), FUSED)


def test_plain_pytorch() -> None:
    model = nn.Linear(4, 2).to(NPU)
    optimizer = build_optimizer(model, FUSED, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(3, 4, device=NPU)).square().mean().backward()
        optimizer.step()
    assert type(optimizer) is NpuFusedAdamW
