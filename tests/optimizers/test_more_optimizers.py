"""What the references of these algorithms leave out: first steps, zeros, lengths of steps, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim import REGISTRY, InvalidOption, InvalidParamGroups, UnknownOptimizer
from tests.optimizers import references


def stepped(name: str, start: torch.Tensor, gradient: torch.Tensor, steps: int = 1, **options: Any) -> torch.Tensor:
    weight = nn.Parameter(start.clone())
    optimizer = REGISTRY[name].load()([weight], **options)
    for _ in range(steps):
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def test_adopt_bounds_what_a_small_first_gradient_would_make_long() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = REGISTRY["adopt"].load()([weight], lr=1.0, betas=(0.0, 0.5))
    for value in (1e-4, 1.0):
        weight.grad = torch.full((2,), value)
        optimizer.step()
    assert torch.equal(weight.detach(), torch.full((2,), -1.0))


def test_a_block_of_adam_mini_has_one_rate() -> None:
    gradient = torch.randn(6, 4)
    for blocks, rows in ((None, 1), (3, 2), (24, 0)):
        moved = stepped("adam_mini", torch.zeros(6, 4), gradient, lr=0.1, weight_decay=0.0, blocks=blocks)
        pieces = gradient.view(-1, rows * 4 or 1)
        expected = -0.1 * pieces / pieces.square().mean(1, keepdim=True).sqrt()
        torch.testing.assert_close(moved, expected.view(6, 4), rtol=1e-4, atol=0)
    with pytest.raises(InvalidParamGroups, match="blocks=5 does not divide the 24 elements of a parameter of shape"):
        stepped("adam_mini", torch.zeros(6, 4), gradient, blocks=5)


def test_adam_mini_with_a_block_per_weight_is_adamw() -> None:
    start, gradient = torch.randn(24), torch.randn(24)
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
    expected = stepped("adamw_torch", start, gradient, steps=5, **options)
    torch.testing.assert_close(stepped("adam_mini", start, gradient, steps=5, blocks=24, **options), expected)


def soap(params: list[torch.Tensor], **options: Any) -> torch.optim.Optimizer:
    settings = {"lr": 0.1, "precondition_frequency": 2, **options}
    return REGISTRY["soap"].load()(params, **settings)


def test_soap_steps_a_stack_as_its_matrices() -> None:
    experts = nn.Parameter(torch.randn(3, 6, 8))
    pieces = [nn.Parameter(piece.clone()) for piece in experts.detach()]
    one, other = soap([experts], stack_dims=1), soap(pieces)
    for _ in range(6):
        experts.grad = torch.randn(3, 6, 8)
        for piece, gradient in zip(pieces, experts.grad, strict=True):
            piece.grad = gradient.clone()
        one.step()
        other.step()
    for piece, expected in zip(experts.detach(), pieces, strict=True):
        assert torch.equal(piece, expected)


def test_soap_without_bases_is_adamw_and_long_sides_keep_their_axes() -> None:
    start, gradient = torch.randn(8, 6), torch.randn(8, 6)
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    expected = stepped("adamw_torch", start, gradient, steps=5, **options)
    torch.testing.assert_close(stepped("soap", start, gradient, steps=5, max_precondition_dim=5, **options), expected)
    weight = nn.Parameter(start.clone())
    optimizer = soap([weight], max_precondition_dim=6)
    weight.grad = gradient
    optimizer.step()
    assert torch.equal(weight.detach(), start), "the first step only looks"
    assert optimizer.state[weight].keys() == {"step", "exp_avg", "exp_avg_sq", "gram_right", "right"}


def test_soap_turns_with_its_gradients() -> None:
    """Rotated weights and gradients give rotated steps: it does not depend on the axes, as Adam does."""
    # Square, or some eigenvectors would be arbitrary.
    left, right = (torch.linalg.qr(torch.randn(side, side, dtype=torch.float64)).Q for side in (6, 6))
    start = torch.randn(6, 6, dtype=torch.float64)
    plain, turned = nn.Parameter(start.clone()), nn.Parameter(left @ start @ right)
    one, other = soap([plain]), soap([turned])
    for _ in range(6):
        plain.grad = torch.randn(6, 6, dtype=torch.float64)
        turned.grad = left @ plain.grad @ right
        one.step()
        other.step()
    torch.testing.assert_close(turned.detach(), left @ plain.detach() @ right, rtol=1e-6, atol=1e-6)


def prodigy(params: Any, **options: Any) -> torch.optim.Optimizer:
    return REGISTRY["prodigy"].load()(params, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.5, "weight_decay": 0.1, "use_bias_correction": True, "d0": 1e-3, "beta3": 0.9},
        {"betas": (0.8, 0.95), "safeguard_warmup": True, "d0": 1e-2, "d_coef": 2.0, "growth_rate": 1.1, "lr": 0.3},
    ],
    ids=str,
)
def test_prodigy_equals_the_reference_of_all_parameters_as_one(options: dict[str, Any]) -> None:
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((7,), (12, 20), (3, 5, 4))]
    start = torch.cat([parameter.detach().flatten() for parameter in params])
    optimizer = prodigy([{"params": params[:2]}, {"params": params[2:]}], **options)
    gradients = []
    for _ in range(30):
        for parameter in params:
            parameter.grad = parameter.detach() - 3 + torch.randn_like(parameter) / 10
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in params]))  # type: ignore[union-attr]
        optimizer.step()
    first, second = optimizer.param_groups
    assert first["d"] == second["d"] > 2 * first["d0"]
    settings = {"lr": 1.0, "weight_decay": 0.0, **optimizer.defaults, **options}
    expected = references.prodigy(start, gradients, SimpleNamespace(**settings))
    found = torch.cat([parameter.detach().flatten() for parameter in params])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_prodigy_s_estimate_is_the_optimizer_s_and_comes_back() -> None:
    weight, later = (nn.Parameter(torch.zeros(8)) for _ in range(2))
    optimizer = prodigy([weight], d0=1e-3, slice_p=3)
    for _ in range(5):
        weight.grad = weight.detach() - 1
        optimizer.step()
    estimate = optimizer.param_groups[0]["d"]
    assert estimate > 1e-3
    assert optimizer.used_rate(optimizer.param_groups[0]) == estimate  # type: ignore[attr-defined]
    assert optimizer.state[weight]["s"].shape == optimizer.state[weight]["p0"].shape == (3,)
    optimizer.add_param_group({"params": [later]})
    assert optimizer.param_groups[1]["d"] == estimate
    again = prodigy([{"params": [weight]}, {"params": [later]}], d0=1e-3, slice_p=3)
    again.load_state_dict(optimizer.state_dict())
    assert {group["d"] for group in again.param_groups} == {estimate}


def test_prodigy_does_not_move_without_a_rate() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = prodigy([weight], lr=0.0)
    for _ in range(2):
        weight.grad = torch.ones(4)
        optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(4))
    assert optimizer.param_groups[0]["d"] == 1e-6


def test_prodigy_has_no_layerwise_form() -> None:
    assert "prodigy_layerwise" not in REGISTRY
    with pytest.raises(UnknownOptimizer, match="one estimate of the step size from all parameters"):
        REGISTRY["prodigy_layerwise"]


@pytest.mark.parametrize(("name", "fraction"), [("lamb", 0.1), ("lars", 0.1 * 1e-3)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_layer_moves_by_a_fraction_of_its_norm(name: str, fraction: float, size: float) -> None:
    start = torch.randn(8, 12)
    moved = stepped(name, start, torch.randn(8, 12) * size, lr=0.1, weight_decay=0.0) - start
    torch.testing.assert_close(moved.norm(), start.norm() * fraction, rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_zero_weights_move_and_zero_gradients_decay_without_nan(name: str) -> None:
    moved = stepped(name, torch.zeros(4, 4), torch.ones(4, 4), lr=0.1, weight_decay=0.1)
    torch.testing.assert_close(moved, torch.full((4, 4), -0.1), rtol=1e-4, atol=0)
    kept = stepped(name, torch.ones(4, 4), torch.zeros(4, 4), lr=0.1, weight_decay=0.0)
    assert torch.equal(kept, torch.ones(4, 4))
    decayed = stepped(name, torch.ones(4, 4), torch.zeros(4, 4), lr=0.1, weight_decay=0.1)
    assert (decayed < 1).all()


def test_vectors_are_adapted_only_if_asked() -> None:
    start, gradient = torch.ones(4), torch.full((4,), 2.0)
    plain = stepped("lars", start, gradient, lr=0.1)
    assert torch.equal(plain, torch.full((4,), 0.8))
    adapted = stepped("lars", start, gradient, lr=0.1, trust_coeff=0.5, adapt="all")
    torch.testing.assert_close(adapted, torch.full((4,), 0.95))


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("adopt", {"clip_exp": -1.0}, "clip_exp=-1.0 of Adopt is out of range"),
        ("adan", {"betas": (0.9, 1.0, 0.9)}, "betas=.* of Adan is out of range"),
        ("adam_mini", {"blocks": 0}, "blocks=0 of AdamMini is not a whole number"),
        ("lamb", {"adapt": "layers"}, "adapt='layers' of Lamb is unknown; use one of 'matrices', 'all', 'none'"),
        ("soap", {"precondition_frequency": 0}, "precondition_frequency=0 of SOAP is not a whole number >= 1"),
        ("soap", {"shampoo_beta": 1.0}, "shampoo_beta=1.0 of SOAP is out of range"),
        ("prodigy", {"d0": 0.0}, "d0=0.0 of Prodigy is out of range"),
        ("prodigy", {"growth_rate": 0.5}, "growth_rate=0.5 of Prodigy is out of range"),
        ("prodigy", {"slice_p": 0}, "slice_p=0 of Prodigy is not a whole number"),
        ("lars", {"momentum": 1.0}, "momentum=1.0 of Lars is out of range"),
        ("lars", {"trust_coeff": 0.0}, "trust_coeff=0.0 of Lars is out of range"),
        ("lars", {"momentum": 0.0, "nesterov": True}, "nesterov=True needs momentum"),
    ],
    ids=str,
)
def test_refusals(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidOption, match=text):
        REGISTRY[name].load()([torch.zeros(2, 2, requires_grad=True)], **options)
