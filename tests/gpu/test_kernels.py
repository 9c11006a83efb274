"""The same numbers on GPU and CPU: every optimizer is stepped along the same gradients on both.

For the rows of other libraries this tests what we hand to their kernels; for the algorithms we own it tests that pure
torch does the same on CUDA.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim import REGISTRY, build_optimizer
from tests.cases import BY_NAME, NAMES
from tests.gpu.device import DEVICE
from tests.models import TokenModel

STEPS = 10


def stepped(name: str, model: nn.Module) -> Optimizer:
    case = BY_NAME[name]
    optimizer = build_optimizer(model, case.plain, lr=case.lr, optim_args=case.options, weight_decay=0.1)
    if case.averages:
        optimizer.train()  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator) / 10
            parameter.grad = gradient.to(parameter.device, parameter.dtype)
        optimizer.step()
    return optimizer


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().cpu().float().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_the_cpu(name: str, dtype: torch.dtype) -> None:
    here = TokenModel().to(dtype)
    there = copy.deepcopy(here).to(DEVICE)
    start = flat(here)
    expected, found = stepped(name, here), stepped(name, there)
    moved = (flat(here) - start).abs().mean()
    assert moved > 0
    difference = (flat(there) - flat(here)).abs().mean() / moved
    # A code or a bfloat16 that is rounded the other way now and then, against rounding of the last bit.
    rounded = REGISTRY[name].bits is not None or dtype is torch.bfloat16
    assert difference < (2e-2 if rounded else 1e-3)
    for one, other in zip(here.parameters(), there.parameters(), strict=True):
        assert other.device.type == DEVICE.type
        left, right = expected.state[one], found.state[other]
        assert left.keys() == right.keys()
        for key, value in left.items():
            if isinstance(value, Tensor):
                assert (value.dtype, value.shape) == (right[key].dtype, right[key].shape), key
