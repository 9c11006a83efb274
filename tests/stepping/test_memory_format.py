"""Parameters that lie in memory otherwise than their shape says: every row steps them right and leaves them so."""

from __future__ import annotations

import copy
import functools
import io
from typing import Literal, get_args

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import Self

from lightning_optim import Layerwise, build_optimizer
from tests.cases import LAYERWISE, NAMES, case_of

STEPS = 4
When = Literal["from the start", "after two steps", "resumed"]


class Layers(nn.Module):
    """A kernel and a matrix large enough to be quantized, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 64, bias=False)
        self.conv = nn.Conv2d(16, 32, 3)

    def lie_otherwise(self) -> Self:
        """The kernel becomes channels_last, the matrix the transpose of a contiguous one."""
        self.linear.weight.data = self.linear.weight.data.t().contiguous().t()
        return self.to(memory_format=torch.channels_last)


def build(name: str) -> tuple[Layers, Optimizer]:
    case = case_of(name)
    model = Layers()
    modules = {"optim_target_modules": ["conv", "linear"]} if case.projects else {}
    optimizer = build_optimizer(model, name, lr=1e-2, optim_args=case.options, **modules)
    getattr(optimizer, "train", lambda: None)()
    return model, optimizer


def train(name: str, when: When | None) -> Layers:
    """Steps with given gradients; the parameters lie otherwise ``when``, which may be in the model that resumes."""
    model, optimizer = build(name)
    if when == "from the start":
        model.lie_otherwise()
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        if step == 2 and when == "after two steps":
            model.lie_otherwise()
        if step == 2 and when == "resumed":
            saved = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict()], saved)
            saved.seek(0)
            model, optimizer = build(name)
            for one, state in zip((model.lie_otherwise(), optimizer), torch.load(saved), strict=True):
                one.load_state_dict(state)
        loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in model.parameters())
        layerwise = Layerwise.of(optimizer)
        if layerwise is not None:
            layerwise.backward(loss)
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


@functools.cache
def contiguous(name: str) -> Layers:
    return train(name, None)


@pytest.mark.parametrize("when", get_args(When))
@pytest.mark.parametrize(
    ("name", "suffix"), [*((name, "") for name in NAMES), *((name, "_layerwise") for name in LAYERWISE)]
)
def test_parameters_that_lie_otherwise_are_stepped_right_and_stay_so(name: str, suffix: str, when: When) -> None:
    # torchao would compile for every layout, which takes a minute.
    with torch.compiler.set_stance("force_eager"):
        expected = contiguous(case_of(name).plain)
        model = train(name + suffix, when)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=1e-7)
    laid_out = copy.deepcopy(expected).lie_otherwise()
    assert [p.stride() for p in model.parameters()] == [p.stride() for p in laid_out.parameters()]
