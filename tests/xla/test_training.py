"""Both strategies train on an XLA device with all that a Trainer does, and never anywhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torch_xla", reason="needs torch_xla: make test-xla")

import lightning as L
from lightning.pytorch.callbacks import DeviceStatsMonitor, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from torch import Tensor

from lightning_optim import IncompatibleTrainer, PJRTAccelerator, XLASyncFreePrecision
from tests.models import ForeignTokens, LitTokens, loader, trainer
from tests.trainer.test_resume import assert_equal, assert_plain
from tests.xla.runs import ALL, SINGLE, apart, counting, fit, graph_of, xla_trainer
from tests.xla.test_adamw import PARTS

BOTH = pytest.mark.parametrize("strategy", [SINGLE, ALL])
# Between a run here and one on the host, after 20 steps of 1e-2. With the usual eps AdamW would divide rounding by
# rounding where a gradient is nearly zero, and make full steps of it.
CLOSE = 1e-4
COMPARABLE = {"optim_args": {"eps": 1e-5}}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip_norm": {"gradient_clip_val": 0.5},
    "clip_value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "accumulate": {"accumulate_grad_batches": 4},
    "schedule": {"lr_scheduler": "linear", "warmup_steps": 3},
}


def assert_learned(module: LitTokens) -> None:
    first, last = sum(module.losses[:5]) / 5, sum(module.losses[-5:]) / 5
    assert last < 0.5 * first, f"{first:.3f} -> {last:.3f}"


@BOTH
@pytest.mark.parametrize("mode", MODES)
def test_trains_as_on_the_host(mode: str, strategy: str) -> None:
    schedule = {name: value for name, value in MODES[mode].items() if name in ("lr_scheduler", "warmup_steps")}
    flags = {name: value for name, value in MODES[mode].items() if name not in schedule}
    here = fit("adamw_torch_xla", strategy, module={**COMPARABLE, **schedule}, **flags)
    there = fit("adamw_torch", "cpu", module={**COMPARABLE, **schedule}, **flags)
    assert_learned(here)
    assert len(here.losses) == (68 if mode == "accumulate" else 20)
    assert torch.tensor(here.losses).sub(torch.tensor(there.losses)).abs().max() < CLOSE
    assert here.trainer.callback_metrics["val_loss"].sub(there.trainer.callback_metrics["val_loss"]).abs() < CLOSE
    assert apart(here, there) < CLOSE


@BOTH
def test_bfloat16_does_not_outlast_its_run(strategy: str) -> None:
    mixed = {"plugins": XLASyncFreePrecision("bf16-mixed")}
    runs: tuple[tuple[dict[str, Any], torch.dtype, torch.dtype], ...] = (
        ({"precision": "bf16-true"}, torch.bfloat16, torch.bfloat16),
        (mixed, torch.float32, torch.bfloat16),
        ({"precision": "32-true"}, torch.float32, torch.float32),
    )
    for flags, stored, computed in runs:
        torch.manual_seed(0)
        module, seen = LitTokens(optim="adamw_torch_xla", lr=1e-2), []
        module.model.head.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output.dtype))
        xla_trainer(strategy, max_steps=20, **flags).fit(module, loader())
        assert_learned(module)
        assert {parameter.dtype for parameter in module.parameters()} == {stored}
        assert set(seen) == {computed}
        assert not [name for name in os.environ if name in ("XLA_USE_BF16", "XLA_USE_F16")]
    assert torch.tensor(1 + 2**-20, device="xla").item() == 1 + 2**-20


def test_the_sync_free_kernel_is_taken_where_its_name_is_given() -> None:
    class Graphs(L.Callback):
        """Looks at what is recorded when the optimizer has stepped."""

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            parameters = list(pl_module.parameters())
            trainer.optimizers[0].register_step_post_hook(
                lambda *_: self.graphs.append(graph_of([parameter.data for parameter in parameters]))
            )

        def __init__(self) -> None:
            self.graphs: list[str] = []

    for name, taken in (("adamw_torch_xla", True), ("adamw", True), ("adamw_torch", False)):
        callback = Graphs()
        with counting() as counted:
            module = fit(name, steps=4, callbacks=[callback])
        parameters = len(list(module.parameters()))
        kernels = [graph.count("xla::adam_optimizer_step(") for graph in callback.graphs]
        assert kernels == [parameters if taken else 0] * 4
        assert [counted.get(part, 0) for part in PARTS] == [0 if taken else 4 * parameters] * len(PARTS)


def test_the_modules_own_optimizer_trains_as_it_is() -> None:
    class Own(ForeignTokens):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.3)

    module = Own()
    run = xla_trainer(max_steps=3)
    run.fit(module, loader())
    assert type(run.optimizers[0]) is torch.optim.SGD


@BOTH
def test_validation_and_prediction_run_batch_by_batch(strategy: str) -> None:
    """One graph for all batches, compiled once; without a cut after each it would grow with their number."""
    module = LitTokens(optim="adamw_torch_xla")
    run = xla_trainer(strategy)
    run.validate(module, loader(batches=2), verbose=False)
    with counting() as counted:
        run.validate(module, loader(batches=6), verbose=False)
    assert counted.get("UncachedCompile", 0) <= 2
    assert len(run.predict(module, loader(batches=2))) == 2
    with counting() as counted:
        run.predict(module, loader(batches=6))
    assert counted.get("UncachedCompile", 0) <= 1


# --- checkpoints -----------------------------------------------------------------------------------------------------

RESUMED = ((SINGLE, "32-true"), (SINGLE, "bf16-true"), (ALL, "32-true"))


def test_a_fresh_process_continues_exactly(tmp_path: Path) -> None:
    """10 steps, a checkpoint, a fresh process and 10 steps equal 20 steps, bit for bit."""
    expected = {}
    for strategy, precision in RESUMED:
        for optim in ("adamw_torch_xla", "adamw_torch_xla_layerwise"):
            name = f"{strategy}@{precision}@{optim}"
            saver = ModelCheckpoint(tmp_path, filename=f"{name}@{{step}}", every_n_train_steps=10, save_top_k=-1)
            torch.manual_seed(0)
            module = LitTokens(optim=optim, lr=1e-2, lr_scheduler="linear")
            run = xla_trainer(strategy, max_steps=20, precision=precision, callbacks=[saver], enable_checkpointing=True)
            run.fit(module, loader())
            checkpoint = torch.load(tmp_path / f"{name}@step=10.ckpt", weights_only=True)
            assert_plain(checkpoint["optimizer_states"], name)
            tensors = torch.utils._pytree.tree_leaves([checkpoint["optimizer_states"], checkpoint["state_dict"]])
            assert {tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)} == {"cpu"}
            expected[name] = torch.load(tmp_path / f"{name}@step=20.ckpt", weights_only=True)
            (tmp_path / f"{name}@step=20.ckpt").unlink()
    command = [sys.executable, "-m", "tests.xla.resume_worker", str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=600)
    for name, uninterrupted in expected.items():
        resumed = torch.load(tmp_path / f"{name}@step=10.out", weights_only=True)
        if name.startswith(ALL) and name.endswith("_layerwise"):
            # The first step of a process finds out the order of gradients: a graph of its own, rounded in its own way.
            for key, weight in resumed["state_dict"].items():
                assert torch.allclose(weight, uninterrupted["state_dict"][key], rtol=0, atol=1e-6), f"{name}: {key}"
            continue
        for key in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert_equal(resumed[key], uninterrupted[key], f"{name}: {key}")


@pytest.mark.parametrize("written", ["adamw_torch", "adamw_torch_xla"])
def test_checkpoints_move_between_the_host_and_the_device(written: str, tmp_path: Path) -> None:
    places = {"adamw_torch": "cpu", "adamw_torch_xla": SINGLE}
    read = next(name for name in places if name != written)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10)
    flags = {"callbacks": [saver], "enable_checkpointing": True}
    fit(written, places[written], steps=10, module=COMPARABLE, **flags)
    moved = LitTokens(optim=read, lr=1e-2, **COMPARABLE)
    run = xla_trainer(max_steps=20) if read == "adamw_torch_xla" else trainer(max_steps=20)
    run.fit(moved, loader(), ckpt_path=tmp_path / "step=10.ckpt", weights_only=True)
    assert apart(moved, fit("adamw_torch", "cpu", module=COMPARABLE)) < CLOSE


# --- the device ------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("devices", [1, "1", "auto", [0], "0,"])
def test_one_device(devices: Any, strategy: str) -> None:
    seen = []

    class Place(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, _: int) -> None:
            seen.extend([trainer.strategy.root_device.type, pl_module.device.type, batch[0].device.type])

    run = xla_trainer(strategy, devices=devices, max_steps=1, callbacks=[Place()])
    run.fit(LitTokens(optim="adamw_torch_xla"), loader())
    assert set(seen) == {"xla"}
    assert isinstance(run.accelerator, PJRTAccelerator)


@pytest.mark.parametrize("devices", [2, "2", [1], [0, 1], -1, "all"])
def test_other_devices_are_refused(devices: Any) -> None:
    with pytest.raises(IncompatibleTrainer, match=r"PJRT_DEVICE=CPU has 1 to train on. Use devices='auto', 1 or"):
        xla_trainer(devices=devices)


@BOTH
@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
def test_another_accelerator_is_refused(accelerator: str, strategy: str) -> None:
    with pytest.raises(IncompatibleTrainer, match=f"strategy='{strategy}'.* has cpu. Use .*accelerator='pjrt'"):
        L.Trainer(accelerator=accelerator, strategy=strategy)


def test_several_devices_are_refused_by_the_strategy_for_one() -> None:
    strategy = xla_trainer().strategy
    with pytest.raises(IncompatibleTrainer, match=r"the Trainer has 2 devices. Use Trainer\(strategy='xla_syncfree'\)"):
        strategy.parallel_devices = [torch.device("xla", 0), torch.device("xla", 1)]


def test_several_nodes_are_refused_by_the_strategy_for_one() -> None:
    """Each would train a model of its own."""
    with pytest.raises(IncompatibleTrainer, match=r"has 2 nodes\. Use Trainer\(strategy='xla_syncfree'\)"):
        xla_trainer(SINGLE, num_nodes=2)


@pytest.mark.parametrize("strategy", ["auto", "ddp", "layerwise_ddp"])
def test_a_strategy_that_is_not_for_xla_is_an_error(strategy: str) -> None:
    """Lightning's; docs/xla.md quotes it."""
    with pytest.raises(ValueError, match="can only be used with a `SingleDeviceXLAStrategy` or `XLAStrategy`, found"):
        trainer(accelerator="pjrt", strategy=strategy)


@BOTH
@pytest.mark.parametrize("precision", ["16-true", "16-mixed", "64-true"])
def test_other_precisions_are_refused(precision: str, strategy: str) -> None:
    # Lightning refuses those that it does not know for XLA before the strategy is asked.
    with pytest.raises(ValueError, match=f"precision='{precision}'"):
        xla_trainer(strategy, precision=precision)
    with pytest.raises(
        IncompatibleTrainer, match=r"'32-true' or 'bf16-true', or plugins=XLASyncFreePrecision\('bf16-m"
    ):
        XLASyncFreePrecision(precision)  # type: ignore[arg-type]
    assert "XLA_USE_F16" not in os.environ


@BOTH
def test_another_plugin_is_refused(strategy: str) -> None:
    with pytest.raises(IncompatibleTrainer, match="with the plugin MixedPrecision, which does not know XLA"):
        xla_trainer(strategy, plugins=MixedPrecision("bf16-mixed", "cuda"))


def test_lightnings_own_strategy_takes_the_accelerator() -> None:
    accelerator = PJRTAccelerator()
    run = xla_trainer(SingleDeviceXLAStrategy(torch.device("xla", 0)), max_steps=5)
    assert type(run.accelerator) is type(accelerator)
    module = LitTokens(optim="adamw_torch_xla", lr=1e-2)
    run.fit(module, loader())
    assert module.losses[-1] < module.losses[0]


def test_the_monitor_of_devices_runs(tmp_path: Path) -> None:
    """PJRT on CPU does not count its memory."""
    run = xla_trainer(max_steps=1, logger=True, default_root_dir=tmp_path, callbacks=[DeviceStatsMonitor()])
    run.fit(LitTokens(optim="adamw_torch_xla"), loader())
    assert run.accelerator.get_device_stats(torch.device("xla", 0)) == {}


# --- what depends on the process -------------------------------------------------------------------------------------

PROBE = """
import os, sys
import lightning as L
import lightning_optim
assert "torch_xla" not in sys.modules
from lightning_optim import IncompatibleTrainer
from tests.models import LitTokens, loader, trainer

def make(strategy="single_xla_syncfree"):
    return trainer(accelerator="pjrt", strategy=strategy, max_steps=1)
"""


def _prints(code: str, **environment: str) -> str:
    """What a fresh process prints, also one that fails."""
    without = {name: value for name, value in os.environ.items() if not name.startswith(("PJRT_", "XLA_"))}
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**without, **environment}, cwd=root, timeout=300
    )
    return done.stdout + done.stderr


NOT_ASKED_FOR = "torch_xla finds no TPU and would train on the CPU. Set PJRT_DEVICE"


def test_a_cpu_that_nobody_asked_for_is_refused() -> None:
    assert NOT_ASKED_FOR in _prints(PROBE + "make()")


def test_a_cpu_that_torch_xla_has_chosen_before_is_refused() -> None:
    """Any Trainer of Lightning's imports torch_xla, which writes PJRT_DEVICE."""
    code = """
trainer(accelerator="cpu")
assert os.environ["PJRT_DEVICE"] == "CPU"
for attempt in (1, 2):
    try:
        make()
    except IncompatibleTrainer as error:
        print(attempt, error)
os.environ["PJRT_DEVICE"] = "CPU"
print("then on", make().strategy.root_device)
"""
    printed = _prints(PROBE + code)
    assert printed.count(NOT_ASKED_FOR) == 2
    assert "then on xla:0" in printed


def test_who_chose_is_not_known_if_torch_xla_came_first() -> None:
    printed = _prints("import torch_xla\n" + PROBE.replace("assert", "#") + "print('made', make())", PJRT_DEVICE="CPU")
    assert "made" in printed
    assert "PJRT_DEVICE=CPU was set by you or by torch_xla, which was imported before lightning_optim" in printed


def test_a_cpu_that_was_asked_for_is_no_warning() -> None:
    printed = _prints(PROBE + "import torch_xla; print('made', make())", PJRT_DEVICE="CPU")
    assert "made" in printed
    assert "PJRT_DEVICE=CPU was set" not in printed


def test_a_backward_before_the_device_was_opened_is_refused() -> None:
    """Otherwise an internal assertion of torch: it makes its threads once, for the devices that there are then."""
    code = """
trainer(accelerator="cpu", max_steps=1).fit(LitTokens(optim="adamw"), loader())
for strategy in ("single_xla_syncfree", "xla_syncfree"):
    make(strategy).validate(LitTokens(), loader(batches=1))
    try:
        make(strategy).fit(LitTokens(optim="adamw"), loader())
    except IncompatibleTrainer as error:
        print(error)
"""
    printed = _prints(PROBE + code, PJRT_DEVICE="CPU")
    assert printed.count("Start a new process, or call torch_xla.device() before the first backward") == 2


def test_a_process_whose_floats_are_narrow_is_refused() -> None:
    """Lightning's own bf16-true makes them so for good."""
    code = """
import torch
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
flags = {"accelerator": "pjrt", "max_steps": 1}
run = trainer(strategy=SingleDeviceXLAStrategy(torch.device("xla", 0)), precision="bf16-true", **flags)
run.fit(LitTokens(optim="adamw_torch"), loader())
print("Lightning's own run is over.")
trainer(strategy="single_xla_syncfree", **flags).fit(LitTokens(optim="adamw_torch_xla"), loader())
"""
    printed = _prints(PROBE + code, PJRT_DEVICE="CPU")
    assert "Lightning's own run is over." in printed
    assert "torch_xla stores float32 in 16 bits in this process" in printed


def test_a_variable_that_was_not_read_yet_is_taken_out() -> None:
    """It would contradict ``Trainer(precision="32-true")``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_USE_BF16", "1")
        xla_trainer()
        assert "XLA_USE_BF16" not in os.environ
