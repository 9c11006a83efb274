"""``flash_adamw`` and ``flash_lion`` without a GPU: refusals, and our adapter over a stand-in of flashoptim.

The stand-in (``stand_ins/flash``) keeps what the original keeps and computes in plain torch. ``gpu/test_flash.py`` does
the same with the real one.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_optim import (
    REGISTRY,
    IncompatibleTrainer,
    InvalidOption,
    Layerwise,
    MissingDependency,
    build_optimizer,
)
from lightning_optim.build._memory import measured_bytes, state_bytes
from tests.models import LitTokens, fp16_mixed, loader, trainer
from tests.stand_in import STAND_INS, assert_real_one_prints_the_same, imported_anew
from tests.trainer.test_apex import give_gradients, groups, models
from tests.trainer.test_resume import assert_equal, assert_plain

CLASSES = {"flash_adamw": "FlashAdamW", "flash_lion": "FlashLion"}
# Lion's learning rate is another by default in bitsandbytes: nothing takes its place by itself.
NEAREST = {"flash_adamw": ". Or use optim='adamw_bnb_8bit'", "flash_lion": ""}
STAND_IN = STAND_INS / "flash"
IMPORTABLE = all(importlib.util.find_spec(name) is not None for name in ("flashoptim", "triton"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in, installed."""
    monkeypatch.syspath_prepend(STAND_IN)
    with imported_anew(monkeypatch, "_flashoptim", "flashoptim"):
        yield importlib.import_module("flashoptim")


@pytest.fixture(params=CLASSES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ours(name: str, upstream: ModuleType) -> Any:
    """Our class."""
    return REGISTRY[name].load()


@pytest.fixture
def on_cpu(name: str, upstream: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """The row under another name, allowed on every device."""
    row = dataclasses.replace(REGISTRY[name], name=f"{name}_stand_in", devices=None)
    monkeypatch.setitem(REGISTRY._specs, row.name, row)
    return row.name


def as_bytes(saved: dict[str, Any]) -> dict[str, Any]:
    """Returns a state dict to compare: corrections of two bytes are no numbers in the parameter's type."""
    states = {
        index: {key: value.view(torch.int16) if key == "error_bits" else value for key, value in state.items()}
        for index, state in saved["state"].items()
    }
    return {**saved, "state": states}


def walk(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.skipif(IMPORTABLE, reason="flashoptim is installed here, and this is what happens without it")
def test_without_flashoptim_the_command_is_named(name: str) -> None:
    with pytest.raises(MissingDependency) as caught:
        build_optimizer(nn.Linear(2, 2), name)
    assert str(caught.value).startswith(
        f"optim={name!r} cannot run here: the package 'flashoptim' is not installed: "
        f"pip install --upgrade 'flashoptim>=0.1.4'; and it is not for parameters on cpu{NEAREST[name]}"
    )


def test_parameters_on_a_cpu_are_refused(name: str, upstream: ModuleType) -> None:
    with pytest.raises(IncompatibleTrainer, match=f"optim='{name}' runs on cuda, but parameters are on cpu"):
        build_optimizer(nn.Linear(2, 2), name)


@pytest.mark.parametrize(
    ("parameter", "text"),
    [
        (torch.zeros(3, 2, dtype=torch.float64), r"of shape \(3, 2\) is torch.float64. Use optim='adamw_torch'"),
        (torch.zeros(3, 2).T, r"of shape \(2, 3\) has strides \(1, 2\). Use optim='adamw_8bit' or 'lion_8bit', or nn"),
    ],
)
def test_what_the_kernel_cannot_read_is_refused(parameter: Tensor, text: str, ours: Any) -> None:
    fine = nn.Parameter(torch.zeros(4))
    with pytest.raises(IncompatibleTrainer, match=text):
        ours([fine, nn.Parameter(parameter)])
    optimizer = ours([fine])
    with pytest.raises(IncompatibleTrainer, match=text):
        optimizer.add_param_group({"params": [nn.Parameter(parameter)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_to_upstream(dtype: torch.dtype, name: str, ours: Any, upstream: ModuleType) -> None:
    here, there = models(2, dtype)
    bits = None if dtype is torch.float32 else 24
    walk(here, ours(groups(here)), range(10))
    walk(there, getattr(upstream, CLASSES[name])(groups(there), master_weight_bits=bits), range(10))
    assert all(map(torch.equal, here.parameters(), there.parameters()))
    assert not torch.equal(here.linear.weight, models(1, dtype)[0].linear.weight)


def test_float32_weights_are_taken_and_upstream_refuses_its_own_default(
    name: str, ours: Any, upstream: ModuleType
) -> None:
    weight = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="has no effect when all parameters are fp32"):
        getattr(upstream, CLASSES[name])([weight])
    for parameters in ([weight], iter([weight]), [("weight", weight)], [{"params": weight}]):
        assert ours(parameters).param_groups[0]["params"] == [weight]


def test_schedules_keep_each_groups_own_peak(name: str, ours: Any, upstream: ModuleType) -> None:
    weight, other = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(4))
    there = getattr(upstream, CLASSES[name])
    peaks = {}
    for build in (ours, there):
        optimizer = build([{"params": [weight], "lr": 0.1}, {"params": [other]}], lr=0.5)
        peaks[build] = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0).base_lrs
    assert peaks == {ours: [0.1, 0.5], there: [0.5, 0.5]}
    optimizer = ours([weight], lr=0.1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert "initial_lr" not in optimizer.param_groups[0]


def test_memory_layouts_of_gradients_do_not_matter(ours: Any) -> None:
    here, there = (nn.Parameter(torch.ones(4, 3)) for _ in "ab")
    gradient = torch.randn(3, 4).T
    for parameter, grad in ((here, gradient), (there, gradient.contiguous())):
        optimizer = ours([parameter])
        parameter.grad = grad
        optimizer.step()
    assert torch.equal(here, there)


@pytest.mark.parametrize("bits", [24, 32, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resumes_exactly_and_keeps_the_bytes_that_the_row_says(
    dtype: torch.dtype, bits: int | None, name: str, ours: Any
) -> None:
    here, there = models(2, dtype)
    before, after = (ours(groups(here), master_weight_bits=bits) for _ in "ab")
    walk(here, before, range(5))
    saved, kept = (copy.deepcopy(before.state_dict()) for _ in "ab")
    assert_plain(saved, "state dict")
    after.load_state_dict(saved)
    assert_equal(as_bytes(saved), as_bytes(kept), "saved")
    assert_equal(as_bytes(saved), as_bytes(after.state_dict()), "loaded")
    walk(here, after, range(5, 10))
    walk(there, ours(groups(there), master_weight_bits=bits), range(10))
    assert all(map(torch.equal, here.parameters(), there.parameters()))

    row = REGISTRY[name]
    options: Any = row.options(master_weight_bits=bits)  # type: ignore[call-arg]
    expected = state_bytes(row, options, after.param_groups) or 0
    # In a state dict a correction of one byte is written in the parameter's type, of two.
    widened = sum(p.numel() for p in here.parameters()) if bits == 24 and dtype is not torch.float32 else 0
    assert measured_bytes(after.state_dict()) == expected + widened


def test_a_state_with_another_correction_is_refused(ours: Any) -> None:
    weight = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    saved = ours([weight], master_weight_bits=32).state_dict()
    with pytest.raises(InvalidOption, match=r"saved with master_weight_bits=32, and Flash\w+ has 24 here"):
        ours([weight]).load_state_dict(saved)
    with pytest.raises(InvalidOption, match=r"saved with master_weight_bits=32, and Flash\w+ has None here"):
        ours([nn.Parameter(torch.zeros(4))]).load_state_dict(saved)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_trains_on_by_itself_alone_or_as_a_part(through: Any, dtype: torch.dtype, on_cpu: str) -> None:
    model, reference = (model.to(dtype) for model in models(2, dtype))
    groups = {"head.*": {"optim": on_cpu}}
    for one, other in (({"optim": on_cpu}, model), ({"optim": "sgd", "lr": 0.1, "param_groups": groups}, reference)):
        optimizer = build_optimizer(other, **one)
        walk(other, optimizer, range(3))
        copied, again = through((other, optimizer))
        walk(other, optimizer, range(3, 6))
        assert not torch.equal(other.head.weight, copied.head.weight)
        walk(copied, again, range(3, 6))
        assert all(map(torch.equal, other.parameters(), copied.parameters()))
        assert_equal(as_bytes(optimizer.state_dict()), as_bytes(again.state_dict()), "state")


@pytest.mark.parametrize("bucket_mb", [0, 1000])
def test_layerwise_bit_for_bit(bucket_mb: float, ours: Any) -> None:
    here, there = models(2, torch.bfloat16)
    optimizer, reference = ours(groups(here)), ours(groups(there))
    layerwise = Layerwise(optimizer, bucket_mb)
    for tokens, targets in loader():
        for model, backward in ((here, layerwise.backward), (there, Tensor.backward)):
            backward(nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten()))
        reference.step()
        reference.zero_grad()
    assert_equal(reference.state_dict(), optimizer.state_dict(), "state")
    assert all(map(torch.equal, here.parameters(), there.parameters()))


MODES: dict[str, dict[str, Any]] = {
    "32-true": {},
    "bf16-true": {"precision": "bf16-true"},
    "16-mixed": {"plugins": fp16_mixed},
}


@pytest.mark.parametrize("mode", MODES)
def test_trains_resumes_and_equals_layerwise(mode: str, on_cpu: str, tmp_path: Path) -> None:
    outcomes = []
    for optim, path in ((on_cpu, None), (on_cpu, tmp_path / "step=10.ckpt"), (f"{on_cpu}_layerwise", None)):
        flags = dict(MODES[mode])
        if "plugins" in flags:
            flags["plugins"] = [flags["plugins"]()]
        torch.manual_seed(0)
        lr = 3e-3 if "lion" in on_cpu else 1e-2
        model = LitTokens(optim=optim, lr=lr, optim_args="betas=(0.8, 0.95)", lr_scheduler="linear")
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10, save_top_k=-1)
        saves = {"callbacks": [saver], "enable_checkpointing": True} if optim == on_cpu else {}
        run = trainer(max_steps=20, **flags, **saves)
        run.fit(model, loader(), ckpt_path=path, weights_only=True)
        if path is None:
            assert sum(model.losses[-5:]) < 0.9 * sum(model.losses[:5])
        outcomes.append({"weights": model.state_dict(), "optimizer": run.optimizers[0].state_dict()})
    for outcome in outcomes[1:]:
        assert_equal(outcomes[0], outcome, mode)


def test_the_row_passes_what_the_constructor_takes(name: str, upstream: ModuleType) -> None:
    spec = REGISTRY[name]
    passed = spec.options().select("group", "constructor")
    parameters = inspect.signature(getattr(upstream, CLASSES[name])).parameters
    assert set(passed) | {"lr", "weight_decay"} <= set(parameters)
    assert all(parameters[key].default == value for key, value in passed.items())
    assert parameters["lr"].default == spec.default_lr
    assert parameters["weight_decay"].default == spec.default_weight_decay
    assert issubclass(spec.load(), getattr(upstream, CLASSES[name]))


@pytest.mark.skipif(not IMPORTABLE, reason="needs flashoptim and triton, which can be imported without a GPU")
def test_the_stand_in_has_the_real_signatures() -> None:
    code = (
        "import inspect, flashoptim\n"
        "for c in (flashoptim.FlashAdamW, flashoptim.FlashLion):\n"
        "    assert issubclass(c, flashoptim.FlashOptimizer)\n"
        "    print([(p.name, p.default) for p in inspect.signature(c.__init__).parameters.values()])"
    )
    assert_real_one_prints_the_same(STAND_IN, code)
