"""LOMO and AdaLomo against the reference of their authors, and what of it is deliberately not followed."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_optim.build._memory import measured_bytes, parameter_bytes
from lightning_optim.optimizers._adalomo import AdaLomo
from lightning_optim.optimizers._lomo import LOMO
from lightning_optim.table._options import parse
from lightning_optim.table.rows._adafactor_lomo import ROWS
from tests.optimizers.test_adafactor import assert_close
from tests.trainer.test_resume import assert_equal

# The reference takes one and two dimensions.
SHAPES = ((7,), (1,), (32,), (32, 32), (32, 32), (33, 17), (1, 9), (9, 1), (96, 64))
MORE = ((), (8, 4, 3, 3), (8, 4, 3, 3), (2, 3, 2, 2, 2), (5, 4, 3))
SCHEDULE = [1e-2 * (1 - step / 25) for step in range(25)]


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The package, which cannot build AdaLomo on a machine without CUDA."""
    package = pytest.importorskip("lomo_optim")
    monkeypatch.setattr(Tensor, "cuda", lambda tensor: tensor)
    return package


def weights(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> nn.ParameterList:
    generator = torch.Generator().manual_seed(0)
    return nn.ParameterList([nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes])


def loss(params: nn.ParameterList, step: int) -> Tensor:
    """A loss whose gradients do not depend on the weights."""
    generator = torch.Generator().manual_seed(100 + step)
    terms = [(p * torch.randn(p.shape, generator=generator).to(p.dtype)).sum().float() for p in params]
    return torch.stack(terms).sum()


def train(optimizer: LOMO | AdaLomo, params: nn.ParameterList, steps: range = range(25)) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = SCHEDULE[step]
        optimizer.zero_grad()
        loss(params, step).backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lomo_equals_its_authors(weight_decay: float, dtype: torch.dtype, reference: types.ModuleType) -> None:
    """Bit for bit."""
    ours, theirs = weights(SHAPES + MORE, dtype), weights(SHAPES + MORE, dtype)
    train(LOMO(ours.parameters(), weight_decay=weight_decay), ours)
    other = reference.Lomo(theirs, weight_decay=weight_decay)
    for step, lr in enumerate(SCHEDULE):
        other.fused_backward(loss(theirs, step), lr)
    assert_equal(list(ours), list(theirs), "weights")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "clip_threshold": 0.5, "eps": (1e-20, 0.9)}], ids=str)
def test_adalomo_equals_its_authors(options: dict[str, float], dtype: torch.dtype, reference: types.ModuleType) -> None:
    ours, theirs = weights(dtype=dtype), weights(dtype=dtype)
    train(AdaLomo(ours.parameters(), **options), ours)
    other = reference.AdaLomo(theirs, loss_scale=None, **options)
    for step, lr in enumerate(SCHEDULE):
        other.fused_backward(loss(theirs, step), lr)
    assert_close(ours, theirs)


class TestDeliberateDifferences:
    @pytest.mark.parametrize("shape", [(), (8, 4, 3, 3)])
    def test_adalomo_steps_every_shape(self, shape: tuple[int, ...], reference: types.ModuleType) -> None:
        ours = weights([shape])
        before = ours[0].detach().clone()
        train(AdaLomo(ours.parameters()), ours)
        assert (ours[0] != before).all()

        def step_theirs() -> None:
            theirs = weights([shape])
            reference.AdaLomo(theirs, loss_scale=None).fused_backward(loss(theirs, 0), 1e-2)

        with pytest.raises((IndexError, RuntimeError)):
            step_theirs()

    def test_adalomo_keeps_its_moments_in_the_state_dict(self, reference: types.ModuleType) -> None:
        ours, theirs = weights(), weights()
        optimizer = AdaLomo(ours.parameters())
        train(optimizer, ours, range(1))
        assert len(optimizer.state_dict()["state"]) == len(SHAPES)
        other = reference.AdaLomo(theirs, loss_scale=None)
        other.fused_backward(loss(theirs, 0), 1e-2)
        assert not other.state_dict()["state"]

    @pytest.mark.parametrize("name", ["Lomo", "AdaLomo"])
    def test_the_groups_lr_counts(self, name: str, reference: types.ModuleType) -> None:
        """Schedulers write there; the reference takes a rate of its own with each backward."""
        ours, theirs = weights(), weights()
        optimizer = {"Lomo": LOMO, "AdaLomo": AdaLomo}[name](ours.parameters(), lr=1e-2)
        other = getattr(reference, name)(theirs, **({"loss_scale": None} if name == "AdaLomo" else {}))
        before = [parameter.detach().clone() for parameter in ours]
        for group in (*optimizer.param_groups, *other.param_groups):
            group["lr"] = 0.0
        loss(ours, 0).backward()
        optimizer.step()
        other.fused_backward(loss(theirs, 0), 1e-2)
        for old, left, right in zip(before, ours, theirs, strict=True):
            assert torch.equal(old, left)
            assert not torch.equal(old, right)


def test_lomo_has_no_state() -> None:
    spec = next(row for row in ROWS if row.name == "lomo")
    params = weights(SHAPES + MORE)
    optimizer = LOMO(params.parameters())
    train(optimizer, params, range(2))
    assert all(state == {"step": 2} for state in optimizer.state.values())
    assert measured_bytes(optimizer.state_dict()) == 0
    assert parameter_bytes(spec, parse(spec.options, None, "lomo"), (32, 32), 4) == 0
