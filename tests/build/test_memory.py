"""Bytes of optimizer state that rows tell equal those of the real state; in bfloat16: tests/choose/test_state.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import OptimConfig
from lightning_optim.build._factory import ResolvedOptimizer, resolve
from lightning_optim.build._memory import measured_bytes
from lightning_optim.trainer import _report as report
from tests.cases import BY_NAME, NAMES
from tests.models import TokenModel

# What state dicts hold beyond the optimizer's own state: bitsandbytes' lookup tables, which all parameters share, and
# the training point of schedule-free, which is the parameter itself while training.
SHARED = {"bitsandbytes": {"qmap1", "qmap2"}, "schedulefree": {"y"}}


class Experts(nn.Module):
    """A stack of matrices and a bias of each."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.ones(3, 65, 40))  # 7800 elements
        self.up_bias = nn.Parameter(torch.zeros(3, 65))


class Shapes(nn.Module):
    """Sizes at the edges of block-wise quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 256)
        self.whole = nn.Linear(64, 64)  # 4096 elements
        self.partial = nn.Linear(64, 65)  # 4160 elements, no multiple of 128
        self.small = nn.Linear(63, 65, bias=False)  # 4095 elements
        self.large = nn.Conv1d(64, 64, 3)  # 12288 elements
        self.experts = Experts()
        self.scale = nn.Parameter(torch.tensor(1.0))


def stepped(name: str, model: nn.Module, dtype: torch.dtype, **request: Any) -> ResolvedOptimizer:
    """Builds the optimizer and steps it once on random gradients."""
    model.to(dtype)
    resolved = resolve(model, OptimConfig(name, **request))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    if name in BY_NAME and BY_NAME[name].averages:
        resolved.optimizer.train()  # type: ignore[attr-defined]
    # torchao would compile for half a minute; what it stores is the same.
    with torch.compiler.set_stance("force_eager"):
        resolved.optimizer.step()
    return resolved


def own_state(name: str, resolved: ResolvedOptimizer) -> dict[str, Any]:
    """Returns the optimizer's state dict without what it shares."""
    shared = next((keys for package, keys in SHARED.items() if package in BY_NAME[name].upstream), set())

    def without(state: dict[Any, Any]) -> dict[Any, Any]:
        return {
            key: without(value) if isinstance(value, dict) else value
            for key, value in state.items()
            if key not in shared
        }

    return {"state": without(resolved.optimizer.state_dict()["state"])}


def assert_exact(name: str, resolved: ResolvedOptimizer) -> None:
    measured = measured_bytes(own_state(name, resolved))
    assert resolved.state_bytes == measured
    assert measured > 0 or name in ("sgd", "lomo")


@pytest.mark.parametrize("name", NAMES)
def test_estimate_is_exact_in_float32(name: str) -> None:
    """With options; tests/testing counts the states of defaults."""
    assert_exact(name, stepped(name, Shapes(), torch.float32, optim_args=BY_NAME[name].options))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("adamw_torch", "amsgrad=True"),
        ("adamw_torch_fused", "amsgrad=True"),
        ("sgd", ""),
        ("sgd", "momentum=0.9"),
        ("rmsprop", ""),
        ("rmsprop", "centered=True"),
        ("rmsprop", "momentum=0.9"),
        ("adagrad", "initial_accumulator_value=0.1"),
        ("adamw_torch_4bit", "block_size=64"),
        ("adamw_torch_4bit", "quantize_embeddings=True"),
        ("adamw_torch_8bit", "block_size=64"),
        ("adamw_torch_8bit", "quantize_embeddings=True,block_size=2048"),
        ("adamw_torch_fp8", "block_size=64"),
        ("adamw_8bit", "quantize_embeddings=True"),
        ("adamw_8bit", "min_8bit_size=1"),
        ("lion_8bit", "min_8bit_size=4161"),
        ("ademamix_8bit", "min_8bit_size=1,quantize_embeddings=True"),
        ("rmsprop_bnb_8bit", "min_8bit_size=65"),
        ("galore_adamw", "rank=7,proj_type=full"),
        ("galore_adamw_8bit", "rank=7,min_8bit_size=300"),
        ("galore_adafactor", "rank=7,beta1=0.9"),
        ("apollo_adamw", "rank=7,proj=svd"),
    ],
)
def test_estimate_follows_the_options(name: str, args: str) -> None:
    assert_exact(name, stepped(name, Shapes(), torch.float32, optim_args=args))


@pytest.mark.parametrize(
    ("name", "args", "share"),
    [
        ("galore_adamw", "rank=7", 0.5),
        ("galore_adafactor", "rank=7,beta1=0.9", 0.6),
        ("apollo_adamw", "rank=7,proj=svd", 0.51),
        ("galore_adamw_8bit", "rank=7,min_8bit_size=300", 0.75),
        ("galore_adamw_8bit", "rank=7,quantize_embeddings=True", 0.75),
    ],
)
def test_states_of_the_parameters_dtype_take_half_of_the_bytes(name: str, args: str, share: float) -> None:
    """But for what is quantized, the factors of Adafactor and the norms of APOLLO's updates."""
    wide, narrow = (
        stepped(name, Shapes(), torch.bfloat16, optim_args=f"{args},state_dtype={dtype}")
        for dtype in ("float32", "parameter")
    )
    assert_exact(name, wide)
    assert_exact(name, narrow)
    assert wide.state_bytes is not None
    assert narrow.state_bytes is not None
    assert wide.state_bytes / 2 <= narrow.state_bytes <= share * wide.state_bytes


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("adamw_torch", {"amsgrad": True}),
        ("sgd", {"momentum": 0.9}),
        ("rmsprop", {"centered": True}),
        ("adamw_8bit", {"optim_bits": 32}),
        ("adamw_torch_4bit", {"optim_bits": 32}),
    ],
)
def test_estimate_follows_the_groups(name: str, override: dict[str, Any]) -> None:
    plain = stepped(name, Shapes(), torch.float32)
    overridden = stepped(name, Shapes(), torch.float32, param_groups={"large.weight": override})
    assert_exact(name, overridden)
    assert overridden.state_bytes is not None
    assert plain.state_bytes is not None
    assert overridden.state_bytes > plain.state_bytes


@pytest.mark.parametrize(
    ("name", "model", "request_", "line"),
    [
        # All moments of small tensors stay 32 bits.
        ("adamw_8bit", nn.Linear(32, 32), {}, "no memory is saved: 8.25 KiB of state, where 'adamw_torch' would keep"),
        ("adamw_8bit", nn.Linear(128, 128), {}, ""),
        ("galore_adamw", nn.Linear(64, 64), {"optim_args": "rank=64"}, "no memory is saved: 48.5 KiB of state, where"),
        ("galore_adamw", nn.Linear(64, 64), {"optim_args": "rank=8"}, ""),
        (
            "galore_adamw_layerwise",
            nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 64)),
            {"optim_args": "rank=8"},
            "hardly any memory is saved: 506.5 KiB of state, where 'adamw_torch' would keep 532.5 KiB",
        ),
        # AdamW's own states are bfloat16 there.
        ("galore_adamw", nn.Linear(64, 64).bfloat16(), {"optim_args": "rank=24"}, "no memory is saved: 18.5 KiB"),
        ("galore_adamw", nn.Linear(64, 64).bfloat16(), {"optim_args": "rank=24,state_dtype=parameter"}, ""),
        # Whoever promises none need not say so.
        ("adamw_torch", nn.Linear(8, 8), {}, ""),
        ("ademamix", nn.Linear(8, 8), {}, ""),
        ("torch.optim.NAdam", nn.Linear(8, 8), {}, ""),
    ],
)
def test_the_report_says_where_no_memory_is_saved(
    name: str, model: nn.Module, request_: dict[str, Any], line: str
) -> None:
    text = report.describe(resolve(model, OptimConfig(name, **request_)), name, "none")
    assert text.count("memory is saved: ") == bool(line)
    assert line in text


def test_bitsandbytes_shares_two_tables_of_one_kibibyte() -> None:
    resolved = stepped("adamw_8bit", Shapes(), torch.float32)
    tables: dict[int, Tensor] = {}
    for state in resolved.optimizer.state.values():
        tables.update({state[key].data_ptr(): state[key] for key in ("qmap1", "qmap2") if key in state})
    assert [table.nbytes for table in tables.values()] == [1024, 1024]
    assert measured_bytes(resolved.optimizer.state_dict()) == resolved.state_bytes + 2 * 1024  # type: ignore[operator]


@pytest.mark.parametrize("name", [name for name in NAMES if BY_NAME[name].averages])
def test_schedule_free_adds_a_copy_of_the_parameters_outside_of_training(name: str) -> None:
    model = Shapes()
    resolved = stepped(name, model, torch.float32)
    resolved.optimizer.eval()  # type: ignore[attr-defined]
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert measured_bytes(resolved.optimizer.state_dict()) == resolved.state_bytes + parameters  # type: ignore[operator]


def test_a_row_without_a_layout_has_no_estimate() -> None:
    assert stepped("torch.optim.NAdam", TokenModel(8), torch.float32).state_bytes is None


def test_measuring_counts_every_tensor_once() -> None:
    tensor = torch.zeros(10)
    state = {0: {"a": tensor, "step": 3, "nested": {"b": torch.zeros(4, dtype=torch.uint8)}}, 1: {"a": tensor}}
    assert measured_bytes({"state": state, "param_groups": [{"lr": torch.zeros(100)}]}) == 44


def test_eight_bits_take_a_quarter_of_the_bytes() -> None:
    """A check of the estimates against each other, with the numbers a user would expect per parameter."""
    model = nn.Linear(1024, 1024, bias=False)
    per_element = {
        name: resolve(model, OptimConfig(name)).state_bytes / 2**20  # type: ignore[operator]
        for name in (
            "adamw_torch",
            "adamw_8bit",
            "adamw_torch_8bit",
            "adamw_torch_fp8",
            "adamw_torch_4bit",
            "lion_32bit",
            "lion_8bit",
            "sgd",
        )
    }
    assert {name: round(value, 2) for name, value in per_element.items()} == {
        "adamw_torch": 8.0,
        "adamw_8bit": 2.03,
        "adamw_torch_8bit": 2.03,
        "adamw_torch_fp8": 2.03,
        "adamw_torch_4bit": 1.06,
        "lion_32bit": 4.0,
        "lion_8bit": 1.02,
        "sgd": 0.0,
    }
