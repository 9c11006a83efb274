"""``adamw_apex_fused`` without a GPU: refusals, and our adapter over a stand-in of NVIDIA's apex.

The stand-in (``stand_ins/nvidia_apex``) computes in plain torch what the kernel computes. ``gpu/test_apex.py`` does the
same with the real one.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_optim import (
    REGISTRY,
    IncompatibleTrainer,
    InvalidOption,
    Layerwise,
    MissingDependency,
    build_optimizer,
)
from tests.models import LitTokens, TokenModel, fp16_mixed, loader, trainer
from tests.processes import run_fresh
from tests.stand_in import STAND_INS, assert_real_one_prints_the_same, imported_anew
from tests.table.test_availability import install
from tests.trainer.test_resume import assert_equal, assert_plain

NAME = "adamw_apex_fused"
ON_CPU = "apex_stand_in"
STAND_IN = STAND_INS / "nvidia_apex"
BUILD = (
    "git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
    "pip install -v --no-build-isolation ./"
)
INSTEAD = "; and it is not for parameters on cpu. Or use optim='adamw'"
INSTALLED = importlib.util.find_spec("amp_C") is not None
ARGUMENTS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
Build = Callable[..., Optimizer]


def apex_anew(monkeypatch: pytest.MonkeyPatch) -> AbstractContextManager[None]:
    return imported_anew(monkeypatch, "_apex", "apex", "amp_C")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that comes first on the path, as another environment's site-packages would."""
    monkeypatch.syspath_prepend(tmp_path)
    with apex_anew(monkeypatch):
        yield tmp_path


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in's kernel module; its apex is installed."""
    monkeypatch.syspath_prepend(STAND_IN)
    with apex_anew(monkeypatch):
        yield importlib.import_module("amp_C")


@pytest.fixture
def ours(kernel: ModuleType) -> Build:
    """Our class."""
    return REGISTRY[NAME].load()


@pytest.fixture
def theirs(kernel: ModuleType) -> Build:
    """The class that ours derives from."""
    return importlib.import_module("apex.optimizers").FusedAdam


@pytest.fixture
def on_cpu(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row under another name, allowed on every device."""
    row = dataclasses.replace(REGISTRY[NAME], name=ON_CPU, devices=None)
    monkeypatch.setitem(REGISTRY._specs, ON_CPU, row)


class TestRefusals:
    @pytest.mark.skipif(INSTALLED, reason="NVIDIA's apex is installed here")
    def test_without_apex_the_build_command_is_named(self) -> None:
        assert not REGISTRY[NAME].availability()
        with pytest.raises(MissingDependency) as caught:
            build_optimizer(nn.Linear(2, 2), NAME)
        assert str(caught.value).startswith(
            f"optim={NAME!r} cannot run here: the package 'apex' is not installed: {BUILD}{INSTEAD}"
        )

    @pytest.mark.skipif(INSTALLED, reason="NVIDIA's apex is installed here")
    def test_fit_is_refused_before_it_starts(self) -> None:
        model = LitTokens(optim=NAME)
        with pytest.raises(MissingDependency, match="use optim='adamw'"):
            trainer(max_steps=1).fit(model, loader())
        assert model.losses == []

    @pytest.mark.skipif(INSTALLED, reason="NVIDIA's apex is installed here")
    def test_the_project_that_pypi_calls_apex_is_told_apart(self, site: Path) -> None:
        install(site, "apex", "0.9.10dev")
        (site / "apex.py").write_text("raise RuntimeError('checking must not import')\n")
        with pytest.raises(MissingDependency) as caught:
            build_optimizer(nn.Linear(2, 2), NAME)
        assert str(caught.value).startswith(
            f"optim={NAME!r} cannot run here: the package 'apex' that is installed is not NVIDIA's, or was built "
            f"without its CUDA kernels (module amp_C): {BUILD}{INSTEAD}"
        )

    @pytest.mark.parametrize(
        ("kernels", "optimizers", "text"),
        [
            ("", "class FusedAdam: pass\n", "the module 'amp_C' has no multi_tensor_adam"),
            ("multi_tensor_adam = print\n", "", "the module 'apex.optimizers' has no FusedAdam"),
            ("raise ImportError('undefined symbol: _ZN3c10')\n", "", "undefined symbol: _ZN3c10"),
        ],
    )
    def test_kernels_that_are_not_there_are_noticed_when_it_is_built(
        self, site: Path, kernels: str, optimizers: str, text: str
    ) -> None:
        install(site, "apex", "0.1")
        (site / "apex").mkdir()
        (site / "apex" / "__init__.py").touch()
        (site / "apex" / "optimizers.py").write_text(optimizers)
        (site / "amp_C.py").write_text(kernels)
        assert REGISTRY[NAME].availability()
        assert "amp_C" not in sys.modules
        with pytest.raises(MissingDependency) as caught:
            REGISTRY[NAME].load()
        start = f"optim={NAME!r} cannot run here: its package is installed, but importing it fails ({text}"
        assert str(caught.value).startswith(start)
        assert caught.value.text.endswith(f"): {BUILD}")

    def test_the_kernels_are_looked_for_without_importing(self, kernel: ModuleType) -> None:
        code = (
            f"import sys; sys.path.insert(0, {str(STAND_IN)!r})\n"
            "from lightning_optim import REGISTRY\n"
            f"assert REGISTRY[{NAME!r}].availability()\n"
            "assert not {'apex', 'amp_C'} & set(sys.modules)"
        )
        done = run_fresh("-c", code)
        assert done.returncode == 0, done.stderr

    def test_parameters_on_a_cpu_are_refused(self, kernel: ModuleType) -> None:
        with pytest.raises(IncompatibleTrainer, match=f"optim='{NAME}' runs on cuda, but parameters are on cpu"):
            build_optimizer(nn.Linear(2, 2), NAME)

    @pytest.mark.parametrize(
        ("parameter", "text"),
        [
            (torch.zeros(3, 2, dtype=torch.float64), r"of shape \(3, 2\) is torch.float64. Use optim='adamw_torch_"),
            (torch.zeros(3, 2).T, r"of shape \(2, 3\) has strides \(1, 2\). Use optim='adamw_torch_fused', or nn.Par"),
        ],
    )
    def test_what_the_kernel_cannot_read_is_refused(self, parameter: Tensor, text: str, ours: Build) -> None:
        fine = nn.Parameter(torch.zeros(4))
        with pytest.raises(IncompatibleTrainer, match=text):
            ours([fine, nn.Parameter(parameter)])
        optimizer = ours([fine])
        with pytest.raises(IncompatibleTrainer, match=text):
            optimizer.add_param_group({"params": [nn.Parameter(parameter)]})
        assert len(optimizer.param_groups) == 1

    @pytest.mark.parametrize("option", ["amsgrad", "maximize"])
    def test_a_state_with_what_the_kernel_lacks_is_refused(self, option: str, ours: Build) -> None:
        parameter = nn.Parameter(torch.zeros(4))
        saved = AdamW([parameter], **{option: True}).state_dict()
        with pytest.raises(InvalidOption, match=f"saved with {option}=True.* lacks.*optim='adamw_torch_fused'"):
            ours([parameter]).load_state_dict(saved)


def models(count: int, dtype: torch.dtype = torch.float32) -> list[TokenModel]:
    torch.manual_seed(0)
    first = TokenModel().to(dtype)
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


def groups(model: nn.Module, **arguments: Any) -> list[dict[str, Any]]:
    """Matrices decay, the others do not."""
    arguments = {**ARGUMENTS, **arguments}
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return [{**arguments, "params": matrices}, {**arguments, "params": others, "weight_decay": 0.0}]


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(parameter.device, parameter.dtype)


def walk(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    """Steps along the same gradients and learning rates every time."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        give_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def assert_close(left: nn.Module, right: nn.Module, tolerance: float = 1e-6) -> None:
    for one, other in zip(left.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


class TestNumbers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("bias_correction", [True, False])
    def test_equal_to_upstream_bit_for_bit(
        self, dtype: torch.dtype, bias_correction: bool, ours: Build, theirs: Build, kernel: ModuleType
    ) -> None:
        here, there = models(2, dtype)
        # Upstream's zero_grad takes no argument.
        upstream = theirs(groups(there), bias_correction=bias_correction)
        upstream.zero_grad = lambda set_to_none: None  # type: ignore[method-assign]
        walk(there, upstream, range(20))
        kernel.calls.clear()
        walk(here, ours(groups(here), bias_correction=bias_correction), range(20))
        assert all(map(torch.equal, here.parameters(), there.parameters()))
        # Nothing is stepped in pieces: one launch per group and step.
        assert kernel.calls == [3, 4] * 20

    def test_equal_to_torch(self, ours: Build) -> None:
        here, there = models(2)
        walk(here, ours(groups(here)), range(20))
        walk(there, AdamW(groups(there)), range(20))
        assert_close(here, there)
        assert not torch.equal(here.linear.weight, models(1)[0].linear.weight)

    def test_a_parameter_counts_its_own_steps(self, ours: Build) -> None:
        """As in torch; upstream would correct the bias of the late one as if it had been stepped all the time."""
        here, there = ([nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))] for _ in range(2))
        for parameters, optimizer in ((here, ours(here, **ARGUMENTS)), (there, AdamW(there, **ARGUMENTS))):
            for step in range(6):
                parameters[0].grad = torch.full((4,), 1.0 + step)
                parameters[1].grad = torch.full((3,), 1.0 + step) if step > 2 else None
                optimizer.step()
        torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-6)

    def test_a_group_that_is_added_later_is_stepped(self, ours: Build, theirs: Build) -> None:
        for build, steps in ((ours, True), (theirs, False)):
            first, late = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
            optimizer = build([first])
            optimizer.add_param_group({"params": [late]})
            first.grad, late.grad = torch.ones(4), torch.ones(4)
            optimizer.step()
            assert bool((first != 1).all())
            assert bool((late != 1).all()) == steps

    def test_memory_layouts_of_gradients_do_not_matter(self, ours: Build) -> None:
        here, there = (nn.Parameter(torch.ones(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)) for _ in "ab")
        gradient = torch.randn(4, 3, 2, 2)
        for parameter, optimizer in ((here, ours([here])), (there, AdamW([there], weight_decay=0.0))):
            for _ in range(3):
                parameter.grad = gradient.clone()
                optimizer.step()
        torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-6)
        assert here.grad is not None
        assert torch.equal(here.grad, gradient)

    def test_the_loss_of_the_closure_is_returned(self, ours: Build) -> None:
        model = models(1)[0]
        optimizer = ours(model.parameters())
        losses = []
        with torch.no_grad():

            def closure() -> Tensor:
                optimizer.zero_grad()
                losses.append(model(torch.arange(8).view(1, 8)).square().mean())
                losses[-1].backward()
                return losses[-1]

            first, second = optimizer.step(closure), optimizer.step(closure)
        assert [first, second] == losses
        assert second < first

    def test_hooks_run_once_per_step(self, theirs: Build) -> None:
        """Also where an object of upstream's own class was built before, whose step torch has wrapped then."""
        parameter = nn.Parameter(torch.ones(4))
        theirs([parameter])
        ours: Build = REGISTRY[NAME].load()
        optimizer = ours([parameter])
        seen: list[int] = []
        optimizer.register_step_post_hook(lambda *_: seen.append(len(optimizer.param_groups)))
        parameter.grad = torch.ones(4)
        optimizer.step()
        assert seen == [1]

    def test_zero_grad_as_torch_has_it(self, ours: Build, theirs: Build) -> None:
        parameter = nn.Parameter(torch.ones(4))
        optimizer = ours([parameter])
        parameter.grad = torch.ones(4)
        optimizer.zero_grad(set_to_none=False)
        assert parameter.grad is not None
        assert not parameter.grad.any()
        optimizer.zero_grad()
        assert parameter.grad is None
        with pytest.raises(TypeError, match="set_to_none"):
            theirs([parameter]).zero_grad(set_to_none=True)  # type: ignore[call-arg]


class TestStateDicts:
    def test_torchs_layout(self, ours: Build) -> None:
        here, there = models(2)
        optimizer, reference = ours(groups(here)), AdamW(groups(there))
        walk(here, optimizer, range(2))
        walk(there, reference, range(2))
        saved, expected = optimizer.state_dict(), reference.state_dict()
        assert_plain(saved, "state dict")
        torch.testing.assert_close(saved["state"], expected["state"], rtol=1e-6, atol=1e-6)
        assert set(saved["param_groups"][0]) - set(expected["param_groups"][0]) == {"bias_correction"}

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("direction", ["to torch", "from torch"])
    def test_moves_between_torch_and_apex(self, direction: str, fused: bool, ours: Build) -> None:
        here, there = models(2)

        def torchs(model: nn.Module) -> Optimizer:
            return AdamW(groups(model), fused=fused)

        first, second = (ours, torchs) if direction == "to torch" else (torchs, ours)
        make = {ours: lambda model: ours(groups(model)), torchs: torchs}
        before, after = make[first](here), make[second](here)
        walk(here, before, range(5))
        after.load_state_dict(before.state_dict())
        walk(here, after, range(5, 10))
        walk(there, torchs(there), range(10))
        assert_close(here, there)

    def test_reads_what_upstreams_class_saved(self, ours: Build, theirs: Build) -> None:
        here, there = models(2)
        upstream = theirs(groups(here))
        upstream.zero_grad = lambda set_to_none: None  # type: ignore[method-assign]
        walk(here, upstream, range(5))
        saved = upstream.state_dict()
        assert saved["param_groups"][0]["step"] == 5
        optimizer = ours(groups(here))
        optimizer.load_state_dict(saved)
        assert saved["param_groups"][0]["step"] == 5
        assert "step" not in optimizer.param_groups[0]
        walk(here, optimizer, range(5, 10))
        walk(there, ours(groups(there)), range(10))
        assert all(map(torch.equal, here.parameters(), there.parameters()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_resumes_exactly_with_float32_moments(self, dtype: torch.dtype, ours: Build) -> None:
        here, there = models(2, dtype)
        before, after = ours(groups(here)), ours(groups(here))
        walk(here, before, range(5))
        saved, kept = (copy.deepcopy(before.state_dict()) for _ in range(2))
        after.load_state_dict(saved)
        assert_equal(saved, after.state_dict(), "loaded")
        walk(here, after, range(5, 10))
        walk(there, ours(groups(there)), range(10))
        assert all(map(torch.equal, here.parameters(), there.parameters()))
        assert after.state[here.linear.weight]["exp_avg"].dtype is torch.float32
        # The loaded state is a copy.
        assert_equal(saved, kept, "saved")

    def test_other_groups_are_refused_as_torch_does(self, ours: Build) -> None:
        model = models(1)[0]
        with pytest.raises(ValueError, match="different number of parameter groups"):
            ours(model.parameters()).load_state_dict(ours(groups(model)).state_dict())


class TestLayerwise:
    @pytest.mark.parametrize("bucket_mb", [0, 0.02, 1000])
    def test_bit_for_bit(self, bucket_mb: float, ours: Build) -> None:
        here, there = models(2)
        optimizer, reference = ours(groups(here)), ours(groups(there))
        layerwise = Layerwise(optimizer, bucket_mb)
        for tokens, targets in loader():
            for model, backward in ((here, layerwise.backward), (there, Tensor.backward)):
                backward(nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()))
            reference.step()
            reference.zero_grad()
            assert here.linear.weight.grad is None
        assert_equal(reference.state_dict(), optimizer.state_dict(), "state")
        assert all(map(torch.equal, here.parameters(), there.parameters()))
        assert int(optimizer.state[here.linear.weight]["step"]) == 10


MODES: dict[str, dict[str, Any]] = {
    "32-true": {},
    "bf16-true": {"precision": "bf16-true"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed clip_norm": {"plugins": [fp16_mixed], "gradient_clip_val": 0.5},
    "accumulate": {"accumulate_grad_batches": 4},
}


@pytest.mark.usefixtures("on_cpu")
class TestLightning:
    @pytest.mark.parametrize("mode", MODES)
    def test_trains_and_equals_layerwise(self, mode: str) -> None:
        states = []
        for name in (ON_CPU, f"{ON_CPU}_layerwise"):
            flags = {**MODES[mode], "plugins": [make() for make in MODES[mode].get("plugins", ())] or None}
            torch.manual_seed(0)
            model = LitTokens(optim=name, lr=1e-2, optim_args="betas=(0.8, 0.95)", lr_scheduler="linear")
            run = trainer(max_steps=30, **flags)
            run.fit(model, loader())
            first, last = sum(model.losses[:5]) / 5, sum(model.losses[-5:]) / 5
            assert last < 0.8 * first
            states.append({"weights": model.state_dict(), "optimizer": run.optimizers[0].state_dict()})
        if "clip_norm" in mode:
            torch.testing.assert_close(states[0]["weights"], states[1]["weights"], rtol=1e-4, atol=1e-4)
        else:
            assert_equal(*states, mode)

    @pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
    def test_resumes_exactly(self, precision: str, tmp_path: Path) -> None:
        outcomes = []
        for path in (None, tmp_path / "half-step=10.ckpt"):
            torch.manual_seed(0)
            model = LitTokens(optim=ON_CPU, lr=1e-2, lr_scheduler="linear")
            saver = ModelCheckpoint(tmp_path, filename="half-{step}", every_n_train_steps=10, save_top_k=-1)
            run = trainer(max_steps=20, precision=precision, callbacks=[saver], enable_checkpointing=True)
            run.fit(model, loader(), ckpt_path=path, weights_only=True)
            outcomes.append({"weights": model.state_dict(), "optimizer": run.optimizers[0].state_dict()})
        assert_equal(*outcomes, precision)


@pytest.mark.skipif(not INSTALLED, reason="needs NVIDIA's apex, built with its CUDA kernels")
def test_the_stand_in_has_the_real_signatures() -> None:
    code = (
        "import inspect, torch, amp_C, apex.optimizers\n"
        "c = apex.optimizers.FusedAdam\n"
        "print(hasattr(amp_C, 'multi_tensor_adam'), [inspect.signature(f) for f in (c.__init__, c.step, c.zero_grad)])"
    )
    assert_real_one_prints_the_same(STAND_IN, code)


def test_the_row_passes_what_the_constructor_takes(theirs: Build) -> None:
    spec = REGISTRY[NAME]
    passed = {**spec.options().select("group", "constructor"), **spec.fixed}
    signature = inspect.signature(theirs)
    assert set(passed) | {"lr", "weight_decay"} <= set(signature.parameters)
    assert all(signature.parameters[name].default == value for name, value in passed.items())
    assert issubclass(spec.load(), theirs)  # type: ignore[arg-type]
