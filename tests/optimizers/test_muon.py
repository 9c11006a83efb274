"""Muon against torch's own, in stacks and alone, and what its options mean."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_optim import InvalidOption, InvalidParamGroups
from lightning_optim.layerwise._split_step import SplitStep
from lightning_optim.optimizers import Muon
from lightning_optim.optimizers._newton_schulz import iteration_dtype, orthogonalize, stack_size
from tests.optimizers.test_own_optimizers import give_gradients, parameters, train
from tests.trainer.test_resume import assert_equal, assert_plain

# Square, wide and high ones; some that are stacked, some that are too large, not aligned or alone.
SHAPES = ((16, 16), (16, 16), (16, 16), (33, 17), (33, 17), (1, 40), (40, 1), (96, 64), (64, 96), (3, 5), (32, 64)) * 2
# The bits of torch.optim.Muon.
AS_TORCH: dict[str, Any] = {"ns_dtype": "bfloat16", "batched": False}


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left, right), tuple(left.shape)


def trained(optimizer: type[torch.optim.Optimizer], **options: Any) -> list[Tensor]:
    """Trains two groups under a schedule, with missing gradients."""
    params = parameters(shapes=SHAPES[:9])
    groups = [{"params": params[:4]}, {"params": params[4:], "lr": 0.05, "momentum": 0.8, "weight_decay": 0.0}]
    built = optimizer(groups, **options)
    schedule = LambdaLR(built, lambda step: 1 / (1 + step))
    for step in range(20):
        give_gradients(params, step, missing=lambda index, step=step: (index + step) % 5 == 0)  # type: ignore[misc]
        built.step()
        schedule.step()
    return params


# --- torch.optim.Muon ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("options", [{}, {"nesterov": False, "ns_steps": 3, "eps": 1e-2, "lr": 0.1}], ids=str)
def test_equals_torch_bit_for_bit(options: dict[str, Any], scale: str) -> None:
    expected = trained(torch.optim.Muon, adjust_lr_fn=scale, **options)
    assert_same(trained(Muon, lr_scale=scale, **options, **AS_TORCH), expected)


def test_the_defaults_are_those_of_torch() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    theirs, ours = torch.optim.Muon([weight]).defaults, Muon([weight]).defaults
    assert theirs.pop("adjust_lr_fn") is None
    assert {name: ours[name] for name in theirs} == theirs
    assert ours["lr_scale"] == "original"


def test_stacks_and_the_cpu_s_precision_stay_close_to_torch() -> None:
    alone = trained(Muon, batched=False)
    for left, right in zip(trained(Muon), alone, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    starts = parameters(shapes=SHAPES[:9])
    for ours, theirs, start in zip(alone, trained(torch.optim.Muon), starts, strict=True):
        # What bfloat16 rounds off, in the whole path.
        assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()
        assert not torch.equal(ours, theirs)


# --- the algorithm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 40), (16, 200), (200, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_become_about_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (found,) = orthogonalize(
        [matrix], size=1, dtype=dtype, steps=5, coefficients=(3.4445, -4.775, 2.0315), eps=1e-7
    ).float()
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    within = left.T @ found @ right.T
    values = within.diagonal()
    # The page of the algorithm says so of these coefficients; small singular values take longer.
    assert values.max() < 1.3
    assert values.sort().values[2:].min() > 0.5
    assert (within - values.diag()).norm() < 0.05 * values.norm()


@pytest.mark.parametrize("options", [{}, {"normalize": "neuron"}], ids=str)
class TestManyMatricesInOne:
    """Weights that hold several matrices are stepped as these, to the bit."""

    def compare(self, whole: Tensor, pieces: list[Tensor], group: dict[str, Any], options: dict[str, Any]) -> None:
        """``pieces`` views ``whole`` as its matrices."""
        own = [piece.detach().clone().requires_grad_() for piece in pieces]
        one, other = Muon([{"params": [whole], **group}], lr=0.1, **options), Muon(own, lr=0.1, **options)
        for step in range(4):
            give_gradients(own, step)
            whole.grad = torch.stack([p.grad for p in own if p.grad is not None]).reshape(whole.shape)
            one.step()
            other.step()
        for piece, expected in zip(whole.detach().reshape(len(own), *own[0].shape), own, strict=True):
            assert torch.equal(piece, expected)

    @pytest.mark.parametrize("shape", [(5, 16, 24), (2, 3, 16, 64)], ids=str)
    def test_experts(self, shape: tuple[int, ...], options: dict[str, Any]) -> None:
        (experts,) = parameters(shapes=(shape,))
        pieces = list(experts.detach().view(-1, *shape[-2:]))
        self.compare(experts, pieces, {"stack_dims": len(shape) - 2}, options)

    def test_a_fused_projection(self, options: dict[str, Any]) -> None:
        (projection,) = parameters(shapes=((48, 24),))
        self.compare(projection, list(projection.detach().chunk(3)), {"split": 3}, options)

    def test_fused_projections_of_experts(self, options: dict[str, Any]) -> None:
        (projections,) = parameters(shapes=((4, 32, 16),))
        pieces = list(projections.detach().view(8, 16, 16))
        self.compare(projections, pieces, {"split": 2, "stack_dims": 1}, options)

    def test_a_convolution(self, options: dict[str, Any]) -> None:
        (kernel,) = parameters(shapes=((8, 4, 3, 3),))
        self.compare(kernel, [kernel.detach().view(8, 36)], {}, options)


def test_neurons_get_equal_lengths_and_the_matrix_keeps_its_own() -> None:
    weight = torch.zeros(24, 16, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(24, 16, generator=generator) * torch.logspace(-2, 2, 24)[:, None]
    updates = []
    for normalize in ("none", "neuron"):
        weight.data.zero_()
        weight.grad = gradient.clone()
        Muon([weight], lr=1.0, normalize=normalize).step()  # type: ignore[arg-type]
        updates.append(-weight.detach())
    plain, equal = updates
    torch.testing.assert_close(equal.norm(), plain.norm())
    lengths = equal.norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(24))
    assert plain.norm(dim=1).std() > 0.1 * plain.norm(dim=1).mean()


def test_cautious_decay_spares_what_the_update_moves_away_from_zero() -> None:
    outcomes = {}
    for decay, cautious in ((0.0, False), (0.5, False), (0.5, True)):
        (weight,) = parameters(shapes=((16, 16),))
        start = weight.detach().clone()
        give_gradients([weight], 0)
        Muon([weight], lr=0.1, weight_decay=decay, cautious=cautious).step()
        outcomes[decay, cautious] = weight.detach() - start
    towards = outcomes[0.0, False] * start < 0
    assert 0 < towards.sum() < towards.numel()
    expected = torch.where(towards, outcomes[0.5, False], outcomes[0.0, False])
    torch.testing.assert_close(outcomes[0.5, True], expected)


def test_a_matrix_that_is_not_finite_or_zero_spoils_no_other_of_its_stack() -> None:
    params, clean = parameters(shapes=((16, 16),) * 4), parameters(shapes=((16, 16),) * 4)
    for own in (params, clean):
        give_gradients(own, 0)
    params[1].grad = torch.full((16, 16), torch.nan)
    params[2].grad = torch.zeros(16, 16)
    for own in (params, clean):
        Muon(own, normalize="neuron").step()
    assert_same([params[0], params[3]], [clean[0], clean[3]])
    assert params[1].isnan().all()
    assert params[2].isfinite().all()


# --- stacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"normalize": "neuron", "cautious": True}, {"ns_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("buckets", [2, 5, len(SHAPES)])
def test_any_partition_steps_to_the_same_bits(buckets: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    together, apart = parameters(dtype, SHAPES), parameters(dtype, SHAPES)
    one, other = Muon(together, lr=0.1, **options), Muon(apart, lr=0.1, **options)
    for step in range(3):
        for params in (together, apart):
            give_gradients(params, step, missing=lambda index, step=step: (index + step) % 7 == 0)  # type: ignore[misc]
        one.step()
        split = SplitStep(other)
        alive = [parameter for parameter in apart if parameter.grad is not None]
        for start in range(buckets):
            if alive[start::buckets]:
                split.inner(alive[start::buckets]).step()
        split.commit()
    assert_equal(other.state_dict(), one.state_dict(), "state")
    assert_same(together, apart)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_shape_alone_decides_how_many_are_stacked(kind: str) -> None:
    device = torch.device(kind)
    sizes = [stack_size((side, side), torch.float32, device) for side in (16, 32, 64, 256, 1024, 4096)]
    assert sizes == {"cpu": [16, 4, 1, 1, 1, 1], "cuda": [16, 16, 16, 16, 2, 1]}[kind]
    assert stack_size((64, 16), torch.float32, device) == stack_size((16, 64), torch.float32, device)
    # Not aligned, in one of the dtypes or in both.
    assert stack_size((12, 12), torch.float32, device) > stack_size((12, 12), torch.bfloat16, device) == 1
    assert stack_size((17, 33), torch.float32, device) == 1


def test_the_dtype_of_the_iteration() -> None:
    devices = [torch.device(kind) for kind in ("cpu", "mps", "xpu")]
    assert [iteration_dtype(torch.float32, device) for device in devices] == [torch.float32] * 2 + [torch.bfloat16]
    assert {iteration_dtype(torch.float64, device) for device in devices} == {torch.float64}


# --- shapes, dtypes and state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_are_float32_and_resume_exactly(dtype: torch.dtype) -> None:
    straight, resumed = parameters(dtype, SHAPES), parameters(dtype, SHAPES)
    options: dict[str, Any] = {"normalize": "neuron", "ns_dtype": torch.float32}
    one, other = Muon(straight, **options), Muon(resumed, **options)
    train(one, straight, range(4))
    train(other, resumed, range(2))
    file = io.BytesIO()
    torch.save({"optimizer": other.state_dict(), "weights": resumed}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert_plain(saved["optimizer"], "muon")
    fresh = [weight.detach().clone().requires_grad_() for weight in saved["weights"]]
    third = Muon(fresh)
    third.load_state_dict(saved["optimizer"])
    train(third, fresh, range(2, 4))
    assert_equal(third.state_dict(), one.state_dict(), "continued")
    assert_same(fresh, straight)
    assert {value.dtype for state in third.state.values() for value in state.values() if isinstance(value, Tensor)} == {
        torch.float32
    }


def test_half_weights_are_stepped_in_float32_and_rounded_once() -> None:
    half, wide = parameters(torch.bfloat16, SHAPES), parameters(torch.bfloat16, SHAPES)
    own = [parameter.detach().float().requires_grad_() for parameter in wide]
    give_gradients(half, 0)
    for parameter, given in zip(own, half, strict=True):
        assert given.grad is not None
        parameter.grad = given.grad.float()
    for params in (half, own):
        Muon(params, lr=0.1).step()
    assert_same(half, [parameter.detach().bfloat16() for parameter in own])


def test_other_layouts_and_empty_tensors() -> None:
    plain = parameters(shapes=((12, 20), (6, 8, 4, 4)))
    swapped = [p.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for p in plain]
    last = parameters(shapes=((12, 20), (6, 8, 4, 4)))
    last[1] = last[1].detach().to(memory_format=torch.channels_last).requires_grad_()
    for params in (plain, swapped, last):
        train(Muon(params), params, range(3))
    assert_same(plain, swapped)
    assert_same(plain, last)
    empty = parameters(shapes=((0, 4), (4, 0, 3), (4, 4)))
    optimizer = Muon(empty, normalize="neuron")
    train(optimizer, empty, range(2))
    assert list(optimizer.state) == empty[2:]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_is_no_matrix_is_refused_by_name() -> None:
    layer = nn.Linear(4, 6)
    with pytest.raises(InvalidParamGroups, match=r"cannot step 'layer\.bias' of shape \(6,\): .* torch\.optim\.AdamW"):
        Muon([{"params": [*layer.parameters()], "members": ["layer.weight", "layer.bias"]}])
    with pytest.raises(InvalidParamGroups, match=r"a parameter of shape \(6, 4\) with stack_dims=1: it takes 3 dim"):
        Muon([layer.weight], stack_dims=1)
    with pytest.raises(InvalidParamGroups, match=r"split=4 does not divide the 6 rows of a parameter"):
        Muon([layer.weight], split=4)
    optimizer = Muon([layer.weight])
    with pytest.raises(InvalidParamGroups, match=r"of shape \(6,\)"):
        optimizer.add_param_group({"params": [layer.bias]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "lr=-1"),
        ({"momentum": 1.0}, "momentum=1.0 of Muon is out of range: 0 <= value < 1"),
        ({"beta2": -0.1}, "beta2=-0.1"),
        ({"ns_steps": 100}, "ns_steps=100 of Muon is not a whole number from 1 to 99"),
        ({"split": 0}, "split=0 of Muon is not a whole number >= 1"),
        ({"stack_dims": 0.5}, "stack_dims=0.5"),
        ({"ns_coefficients": (1.0, 2.0)}, r"ns_coefficients=\(1.0, 2.0\) of Muon are not three numbers"),
        ({"lr_scale": "adamw"}, "lr_scale='adamw' of Muon is unknown; use one of"),
        ({"normalize": True}, "normalize=True"),
        ({"ns_dtype": torch.float16}, "ns_dtype='float16'"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidOption, match=text):
        Muon([nn.Parameter(torch.ones(4, 4))], **options)


def test_complex_and_sparse_are_refused() -> None:
    with pytest.raises(InvalidParamGroups, match="view_as_real"):
        Muon([torch.zeros(4, 4, dtype=torch.complex64, requires_grad=True)])
    embedding = nn.Embedding(8, 4, sparse=True)
    optimizer = Muon([embedding.weight])
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InvalidParamGroups, match="sparse=False"):
        optimizer.step()
