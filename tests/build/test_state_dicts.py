"""State dicts of another dtype, with other entries or with counters of another type: taken as torch takes them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim import build_optimizer
from lightning_optim.stepping._averaging import KeepsTrainingPoint
from tests.cases import CASES, Case
from tests.models import LitTokens, loader, trainer

# One for each class.
CLASSES = tuple({case.upstream: case for case in CASES}.values())
# bitsandbytes' and torchao's kernels have no float64.
WIDE = tuple(case for case in CLASSES if case.upstream.split(".")[0] in ("lightning_optim", "optimi", "schedulefree"))
OWN = tuple(case for case in WIDE if case.upstream.startswith("lightning_optim"))


def built(case: Case, model: nn.Module) -> Optimizer:
    options = {**case.options, "rank": 8} if case.projects else case.options
    optimizer = build_optimizer(model, case.plain, lr=1e-2, optim_args=options)
    if isinstance(optimizer, KeepsTrainingPoint):
        optimizer.train()
    return optimizer


def step(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


def small_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16)).to(dtype)


def states(optimizer: Optimizer) -> list[dict[str, object]]:
    return [optimizer.state[parameter] for group in optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize(
    ("saved_in", "loaded_in"),
    [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
def test_a_state_goes_on_with_parameters_of_another_dtype(
    case: Case, saved_in: torch.dtype, loaded_in: torch.dtype
) -> None:
    model = small_model(saved_in)
    first = built(case, model)
    for seed in range(2):
        step(model, first, seed)
    saved = copy.deepcopy(first.state_dict())
    other = copy.deepcopy(model).to(loaded_in)
    second = built(case, other)
    second.load_state_dict(saved)
    step(model, first, 2)
    step(other, second, 2)

    quantized = "min_8bit_size" in case.options
    tolerance = 2**-7 if loaded_in is torch.bfloat16 else 3e-3 if quantized else 1e-6
    for expected, parameter in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected.to(loaded_in), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", OWN, ids=lambda case: case.name)
def test_loaded_states_have_the_dtypes_of_new_ones(case: Case) -> None:
    model = small_model(torch.float32)
    first = built(case, model)
    step(model, first, 0)
    wide = small_model(torch.float64)
    new, loaded = built(case, wide), built(case, wide)
    loaded.load_state_dict(first.state_dict())
    step(wide, new, 0)

    def dtypes(optimizer: Optimizer) -> list[dict[str, object]]:
        return [
            {name: value.dtype if isinstance(value, Tensor) else type(value) for name, value in state.items()}
            for state in states(optimizer)
        ]

    assert dtypes(loaded) == dtypes(new)


@pytest.mark.parametrize("case", CLASSES, ids=lambda case: case.name)
def test_entries_that_belong_to_no_parameter_are_carried_over(case: Case) -> None:
    model = small_model(torch.float32)
    first = built(case, model)
    if case.averages:
        # As while a Trainer saves.
        first.saves_averages = True  # type: ignore[attr-defined]
    step(model, first, 0)
    first.state["note"], first.state["notes"] = 7, {"n": torch.ones(2)}  # type: ignore[index, assignment]
    second = built(case, model)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state["note"] == 7  # type: ignore[index]
    assert second.state["notes"]["n"].tolist() == [1.0, 1.0]  # type: ignore[index]
    assert second.state_dict()["state"]["note"] == 7


@pytest.mark.parametrize("case", OWN, ids=lambda case: case.name)
def test_a_counter_may_be_a_tensor(case: Case) -> None:
    model, other = small_model(torch.float32), small_model(torch.float32)
    first, second = built(case, model), built(case, other)
    step(model, first, 0)
    step(other, second, 0)
    saved = copy.deepcopy(first.state_dict())
    for state in saved["state"].values():
        state["step"] = torch.tensor(float(state["step"]))
    second.load_state_dict(saved)
    step(model, first, 1)
    step(other, second, 1)
    for expected, parameter in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(expected, parameter)


@pytest.mark.parametrize("case", CLASSES, ids=lambda case: case.name)
def test_a_state_that_is_not_finite_is_said_once(case: Case) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    optimizer = built(case, model)

    def said() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.state_dict()
        return [str(warning.message) for warning in caught if "NaN or infinite" in str(warning.message)]

    assert not said()
    step(model, optimizer, 0)
    assert not said()
    model[0].weight.grad[3, 5] = float("nan")
    optimizer.step()
    # torchao's and bitsandbytes' quantized tensors have scales.
    state = (getattr(value, "scale", value) for value in optimizer.state.get(model[0].weight, {}).values())
    broken = any(
        isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any()) for value in state
    )
    messages = said()
    assert len(messages) == broken
    assert all("the state of '0.weight' has become" in message for message in messages)
    assert not said()


def test_a_checkpoint_says_that_lion_stands_still(tmp_path: Path) -> None:
    module = LitTokens(optim="lion_32bit")
    fit = trainer(max_steps=1)
    fit.fit(module, loader(2))
    fit.save_checkpoint(tmp_path / "before.ckpt")
    optimizer = fit.optimizers[0]
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    with pytest.warns(
        RuntimeWarning, match=r"the state of 'model\.\S+' and of \d+ more .*since the state dict.*Resume"
    ):
        fit.save_checkpoint(tmp_path / "after.ckpt")
