"""Ascend NPUs without the hardware: refusals here; training on a stand-in device in processes of their own.

Nothing here runs torch_npu. ``stand_ins/ascend`` has its place: a device "npu" in Python, and its fused optimizer with
the real one's signature and traps. What we rely on is compared with the source of the real wheel where there is one.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn
from torch.utils import backend_registration

from lightning_optim import (
    REGISTRY,
    IncompatibleTrainer,
    MissingDependency,
    NPUAccelerator,
    build_optimizer,
)
from tests.models import LitTokens, loader, trainer
from tests.npu_worker import DDP_RUNS, FUSED, RESUMED
from tests.processes import free_ports, run_fresh

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests" / "stand_ins" / "ascend"
VERSION = ".".join(torch.__version__.split(".")[:2])
INSTALL = f", then pip install 'torch-npu=={VERSION}.*'"
ABSENT = not hasattr(torch, "npu")
without_npu = pytest.mark.skipif(not ABSENT, reason="this torch knows the device: these are the errors without it")


# --- without the device -----------------------------------------------------------------------------------------------


@without_npu
def test_the_identifier_says_what_to_install() -> None:
    assert not REGISTRY[FUSED].availability()
    with pytest.raises(MissingDependency) as error:
        build_optimizer(nn.Linear(2, 2), FUSED)
    assert INSTALL in str(error.value)
    assert "install Ascend's CANN toolkit first (without it torch-npu breaks `import torch`" in str(error.value)
    assert "set TORCH_DEVICE_BACKEND_AUTOLOAD=0, or pip uninstall torch-npu" in str(error.value)
    assert "Or use optim='adamw' (optim_fallback=True does so by itself)" in str(error.value)


@without_npu
def test_the_fallback_trains_here() -> None:
    model = LitTokens(optim=FUSED, optim_fallback=True)
    run = trainer(max_steps=1)
    run.fit(model, loader())
    assert run.optimizers[0].defaults["fused"]


def test_layerwise_is_refused() -> None:
    with pytest.raises(IncompatibleTrainer, match=f"moves parameters, gradients and states.* Use optim='{FUSED}'"):
        LitTokens(optim=f"{FUSED}_layerwise")


@without_npu
def test_the_accelerator_says_what_to_install() -> None:
    assert not NPUAccelerator.is_available()
    with pytest.raises(MissingDependency) as error:
        trainer(accelerator="npu", strategy="npu")
    assert str(error.value).startswith("Trainer(accelerator='npu') cannot run here: the package 'torch-npu' is not")
    assert INSTALL in str(error.value)


@without_npu
def test_the_accelerator_says_that_torch_npu_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.syspath_prepend(installed(tmp_path))
    with pytest.raises(MissingDependency, match="not loaded: unset TORCH_DEVICE_BACKEND_AUTOLOAD, or import torch_npu"):
        trainer(accelerator="npu")
    assert "torch_npu" not in sys.modules


@without_npu
def test_the_accelerator_says_that_there_is_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.syspath_prepend(installed(tmp_path))
    monkeypatch.setattr(torch, "npu", types.SimpleNamespace(is_available=lambda: False), raising=False)
    with pytest.raises(MissingDependency, match=r"torch_npu finds no NPU: see what `npu-smi info` says"):
        trainer(accelerator="npu")


@without_npu
def test_torch_npu_for_another_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.syspath_prepend(installed(tmp_path, "2.99.0"))
    with pytest.raises(MissingDependency, match=r"torch-npu 2\.99\.0 needs torch of the same version"):
        build_optimizer(nn.Linear(2, 2), FUSED)


@pytest.mark.parametrize("strategy", ["npu", "npu_ddp"])
def test_the_strategies_never_train_on_the_cpu(strategy: str) -> None:
    for flags in ({"accelerator": "cpu"}, {"accelerator": "auto"}):
        with pytest.raises(IncompatibleTrainer, match=rf"Use Trainer\(accelerator='npu', strategy='{strategy}'\)"):
            trainer(strategy=strategy, devices=1, **flags)


def test_the_flags_are_registered() -> None:
    assert "npu" in AcceleratorRegistry.available_accelerators()
    assert {"npu", "npu_ddp"} <= set(StrategyRegistry.available_strategies())


# --- on the stand-in device -------------------------------------------------------------------------------------------


def installed(folder: Path, version: str = f"{VERSION}.0") -> Path:
    """Writes what pip would: a distribution whose entry point has torch load it when it is imported."""
    info = folder / f"torch_npu-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: torch-npu\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return folder


@pytest.fixture(scope="module")
def with_npu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the device."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} takes no device in Python: needs torch 2.13")
    path = [str(STAND_IN), str(installed(tmp_path_factory.mktemp("site"))), str(ROOT)]
    return {"PYTHONPATH": os.pathsep.join(path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}


def test_the_suite_passes_on_the_stand_in(with_npu: dict[str, str]) -> None:
    suite = str(ROOT / "tests" / "npu_suite.py")
    done = run_fresh("-m", "pytest", suite, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", environment=with_npu)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    assert "skipped" not in summary
    assert int(summary.split(" passed")[0].split()[-1]) > 80, summary


@pytest.fixture(scope="module")
def resumed(with_npu: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one fresh process has trained 20 steps of each, and another the last ten from the checkpoints."""
    folder = tmp_path_factory.mktemp("resume")
    for task in ("train", "resume"):
        done = run_fresh("-m", "tests.npu_worker", task, str(folder), environment=with_npu)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("name", "precision"), RESUMED)
def test_a_resumed_run_is_exact(name: str, precision: str, resumed: Path) -> None:
    whole, outcome = (torch.load(resumed / f"{name}@{precision}.{end}", weights_only=True) for end in ("whole", "out"))
    assert all(torch.equal(outcome[key], value) for key, value in whole.items())


def test_npu_ddp_is_lightnings_ddp(with_npu: dict[str, str], tmp_path: Path) -> None:
    """Two processes, "hccl" over gloo: as Lightning's DDP on the CPU, the weights as each other's."""
    ports = free_ports(len(DDP_RUNS))
    done = run_fresh("-m", "tests.npu_worker", "ddp", str(tmp_path), *ports, ranks=2, environment=with_npu)
    assert done.returncode == 0, done.stderr

    outcomes = [
        [torch.load(tmp_path / f"{strategy}-{optim}.{rank}", weights_only=True) for rank in range(2)]
        for _, strategy, optim in DDP_RUNS
    ]
    reference = outcomes[0][0]["weights"]
    for (accelerator, _, optim), ranks in zip(DDP_RUNS, outcomes, strict=True):
        where = {(outcome["device"], outcome["backend"]) for outcome in ranks}
        assert where == {("npu:0", "hccl") if accelerator == "npu" else ("cpu", "gloo")}
        tolerance = 2.5e-7 if optim == FUSED else 0.0
        for name, value in reference.items():
            assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])
            assert (ranks[0]["weights"][name] - value).abs().max() <= tolerance, name


# --- the real wheel, read but not imported ----------------------------------------------------------------------------

# What lightning_optim.optimizers.adapters._npu, and its base class in _compat, call and override, read and set.
METHODS = (
    *("__init__", "step", "zero_grad", "clip_grad_norm_fused_", "_group_step"),
    *("_maybe_init_combined_params_and_grads", "_maybe_init_combined_states"),
)
ATTRIBUTES = {
    *("is_params_grads_combined", "is_states_combined", "is_grads_masks_combined", "is_fused_optimizer"),
    *("params_all_group_combined", "grads_all_group_combined", "combined_param_states_indexed_by_group"),
}
STATES = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


def real_source() -> str:
    """The source of the optimizer and of its base class, from a wheel or an installation; else the test is skipped."""
    names = ["torch_npu/optim/npu_fused_optim_base.py", "torch_npu/optim/npu_fused_adamw.py"]
    wheel = os.environ.get("TORCH_NPU_WHEEL")
    if wheel:
        with zipfile.ZipFile(wheel) as archive:
            return "\n".join(archive.read(name).decode() for name in names)
    try:
        distribution = importlib.metadata.distribution("torch-npu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("no torch-npu to read: run `make test-npu-contract`, which downloads its wheel")
    return "\n".join(Path(str(distribution.locate_file(name))).read_text() for name in names)


def contract(source: str) -> dict[str, Any]:
    """Signatures, attributes and state names of ``NpuFusedAdamW`` and its base class."""
    tree = ast.parse(source)
    methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    # A later one overrides: the base class comes first.
    signatures = {
        method.name: [ast.unparse(argument) for argument in method.args.args]
        + [ast.literal_eval(default) for default in method.args.defaults]
        for method in methods
    }
    nodes = list(ast.walk(tree))
    return {
        "signatures": {name: [str(part).split(":")[0] for part in signatures[name]] for name in METHODS},
        "attributes": ATTRIBUTES & {node.attr for node in nodes if isinstance(node, ast.Attribute)},
        "states": STATES & {node.value for node in nodes if isinstance(node, ast.Constant)},
    }


def test_the_stand_in_has_the_contract_of_the_real_one() -> None:
    ours = contract((STAND_IN / "torch_npu" / "optim.py").read_text())
    real = contract(real_source())
    assert real["attributes"] == ours["attributes"] == ATTRIBUTES
    assert real["states"] == ours["states"] == STATES
    assert real["signatures"] == ours["signatures"]


def test_what_is_mended_is_still_so_in_the_real_one() -> None:
    """When one of these fails, upstream may have mended it: look whether the adapter can go."""
    source = real_source()
    assert "set_to_none is not supported" in source
    assert "must be either float32 or float16" in source
    assert "if self.is_states_combined:\n            return" in source
