"""Paged optimizers where the memory of the GPU does not hold their states: they step, and to the same values."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import build_optimizer
from tests.cases import BY_NAME, NAMES
from tests.gpu.device import DEVICE, cuda_only

pytestmark = cuda_only

PAGED = [name for name in NAMES if BY_NAME[name].arguments.get("is_paged")]
ELEMENTS = 2**25
# The smallest state, Lion's in 8 bits, has 32 MiB.
LEFT = 24 * 2**20
HYPERPARAMETERS = {"lr": 1e-3, "weight_decay": 0.1}
Fill = Callable[[], None]


@pytest.fixture
def fill() -> Iterator[Fill]:
    """Leaves hardly any memory on the GPU until the test ends."""
    hogs: list[Tensor] = []

    def take_all() -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        hogs.append(torch.empty(free - LEFT, dtype=torch.uint8, device=DEVICE))

    yield take_all
    hogs.clear()
    torch.cuda.empty_cache()


def gradients() -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [torch.randn(ELEMENTS, generator=generator, device=DEVICE) for _ in range(3)]


def step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, along: list[Tensor]) -> None:
    for gradient in along:
        parameter.grad = gradient
        optimizer.step()
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", PAGED)
def test_steps_under_pressure_equal_unpaged_ones(name: str, fill: Fill) -> None:
    case = BY_NAME[name]
    along = gradients()
    plain, paged = (nn.Parameter(torch.ones(ELEMENTS, device=DEVICE)) for _ in range(2))
    arguments = {**case.arguments, "is_paged": False, **case.options, **HYPERPARAMETERS}
    step(case.load()([plain], **arguments), plain, along)
    # Bare parameters of one dimension do not decay by themselves.
    optimizer = build_optimizer(
        [paged], name, optim_args=case.options, param_groups={".*": {"weight_decay": 0.1}}, **HYPERPARAMETERS
    )
    fill()
    step(optimizer, paged, along)
    held = sum(value.nbytes for value in optimizer.state[paged].values() if getattr(value, "is_paged", False))
    assert held > LEFT
    assert torch.equal(plain, paged)
    assert bool((paged != 1).any())


def test_without_paging_the_pressure_is_real(fill: Fill) -> None:
    """Otherwise the test above would show nothing."""
    parameter = nn.Parameter(torch.ones(ELEMENTS, device=DEVICE))
    optimizer = build_optimizer([parameter], "lion_32bit")
    parameter.grad = torch.ones(ELEMENTS, device=DEVICE)
    fill()
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
