"""SCALE: lengths of its updates, where it keeps a state, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim import InvalidOption, InvalidParamGroups
from lightning_optim.optimizers import Scale
from tests.optimizers.test_own_optimizers import give_gradients, parameters, train

SHAPES = ((16, 16), (16, 16), (33, 17), (1, 40), (40, 1), (64, 96), (8, 4, 3, 3), (3, 5))


@pytest.mark.parametrize(("outputs", "dim"), [("rows", 1), ("columns", 0)])
def test_every_output_moves_by_the_learning_rate(outputs: str, dim: int) -> None:
    """A linear layer's outputs are its rows, and those of an embedding its columns."""
    weight = nn.Parameter(torch.zeros(12, 20))
    generator = torch.Generator().manual_seed(0)
    weight.grad = torch.randn(12, 20, generator=generator) * torch.logspace(-3, 3, 20)
    Scale([weight], lr=0.1, outputs=outputs).step()  # type: ignore[arg-type]
    moved = weight.detach().square().mean(dim).sqrt()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1))


def test_only_a_group_with_momentum_keeps_a_state() -> None:
    hidden, head = parameters(shapes=((16, 16), (32, 16)))
    optimizer = Scale([{"params": [hidden]}, {"params": [head], "momentum": 0.9}])
    train(optimizer, [hidden, head], range(2))
    assert optimizer.state[hidden] == {"step": 2}
    assert optimizer.state[head]["momentum_buffer"].shape == head.shape


def test_rows_without_a_gradient_stay() -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.tensor([[1.0], [0.0], [2.0]]).expand(3, 4).clone()
    Scale([weight], lr=0.1).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.9], [1.0], [0.9]]).expand(3, 4))


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "outputs": "columns"}], ids=str)
def test_a_stack_is_stepped_as_its_matrices(options: dict[str, Any]) -> None:
    (experts,) = parameters(shapes=((5, 7, 9),))
    pieces = [piece.clone().requires_grad_() for piece in experts.detach()]
    one, other = Scale([experts], stack_dims=1, **options), Scale(pieces, **options)
    for step in range(3):
        give_gradients([experts], step)
        assert experts.grad is not None
        for piece, gradient in zip(pieces, experts.grad, strict=True):
            piece.grad = gradient.clone()
        one.step()
        other.step()
    torch.testing.assert_close(experts.detach(), torch.stack([piece.detach() for piece in pieces]), rtol=1e-6, atol=0)


def test_refusals() -> None:
    layer = nn.Linear(4, 6)
    with pytest.raises(InvalidParamGroups, match=r"Scale steps matrices and cannot step 'layer\.bias' of shape \(6,\)"):
        Scale([{"params": [*layer.parameters()], "members": ["layer.weight", "layer.bias"]}])
    for options, text in (
        ({"momentum": 1.0}, "momentum=1.0 of Scale is out of range"),
        ({"outputs": "rows "}, "outputs='rows ' of Scale is unknown; use one of 'rows', 'columns'"),
        ({"stack_dims": -1}, "stack_dims=-1"),
    ):
        with pytest.raises(InvalidOption, match=text):
            Scale([layer.weight], **options)  # type: ignore[arg-type]
