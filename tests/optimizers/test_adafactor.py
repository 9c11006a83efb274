"""Adafactor against the Trainer's, and what it and AdaLomo do where upstream is deliberately not followed."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim import InvalidOption
from lightning_optim.build._memory import measured_bytes, parameter_bytes
from lightning_optim.optimizers._adafactor import Adafactor
from lightning_optim.optimizers._adalomo import AdaLomo
from lightning_optim.optimizers._factored import factored_update, moment_shapes, rms
from lightning_optim.stepping import Layout, alone
from lightning_optim.table._options import parse
from lightning_optim.table.rows._adafactor_lomo import ROWS, AdafactorOptions
from tests.trainer.test_resume import assert_equal


def _rms(stack: Tensor) -> Tensor:
    return alone(rms(stack, Layout(tuple(stack.shape[1:]))))


SPECS = {row.name: row for row in ROWS}
SHAPES = ((), (1,), (7,), (32,), (32,), *[(32, 32)] * 5, (33, 17), (33, 17), (1, 9), (9, 1), (16, 16, 16), (8, 4, 3, 3))
SHAPES += ((2, 3, 2, 2, 2),)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"beta1": 0.9},
    {"scale_parameter": True, "eps": (1e-20, 0.5)},
    {"clip_threshold": 0.3, "decay_rate": -0.5},
    {"scale_parameter": True, "relative_step": True},
    {"scale_parameter": True, "relative_step": True, "warmup_init": True},
    {"relative_step": True, "beta1": 0.8},
    {"scale_parameter": True, "relative_step": True, "beta1": 0.9, "clip_threshold": 0.5},
)

Make = Callable[[list[Tensor]], Optimizer]
BOTH = pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda params: Adafactor(params, lr=1e-2, beta1=0.9, weight_decay=0.1), id="adafactor"),
        pytest.param(lambda params: AdaLomo(params, lr=1e-2, weight_decay=0.1), id="adalomo"),
    ],
)


def weights(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def give_gradients(params: list[Tensor], step: int) -> None:
    """Gradients of very different rows and columns, a few of them zero, none that depends on the weights."""
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in params:
        gradient = torch.randn(parameter.shape, generator=generator) * torch.rand(
            parameter.shape[-1:], generator=generator
        )
        parameter.grad = torch.where(gradient.abs() < 0.01, 0, gradient).to(parameter.dtype)


def assert_close(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    """Sums are taken in another order: 1e-5 relative in float32; one of 200 bfloat16 elements is rounded otherwise."""
    left, right = (torch.cat([tensor.detach().flatten() for tensor in tensors]) for tensors in (ours, theirs))
    if left.dtype is torch.bfloat16:
        assert (left != right).float().mean() < 0.005
        torch.testing.assert_close(left, right, rtol=2**-7, atol=2**-9)
    else:
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_trainers(options: dict[str, Any], weight_decay: float, dtype: torch.dtype) -> None:
    reference = pytest.importorskip("transformers.optimization").Adafactor
    ours, theirs = weights(dtype=dtype), weights(dtype=dtype)
    relative = options.get("relative_step", False)
    one = Adafactor(ours, lr=1.0 if relative else 1e-2, weight_decay=weight_decay, **options)
    arguments = {"scale_parameter": False, "relative_step": False, **options}
    other = reference(theirs, lr=None if relative else 1e-2, weight_decay=weight_decay, **arguments)
    for step in range(25):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        one.step()
        other.step()
    assert_close(ours, theirs)
    for left, right in zip(ours, theirs, strict=True):
        for name, value in one.state[left].items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(value, other.state[right][name], rtol=1e-4, atol=1e-6)


def test_half_weights_get_the_float32_step_rounded_once() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        half = weights(dtype=dtype)
        full = [parameter.detach().float().requires_grad_() for parameter in half]
        for params in (half, full):
            give_gradients(params, 0)
        for parameter, rounded in zip(full, half, strict=True):
            assert rounded.grad is not None
            parameter.grad = rounded.grad.float()
        for params in (half, full):
            Adafactor(params, lr=1e-2, scale_parameter=True, beta1=0.9, weight_decay=0.1).step()
        for parameter, rounded in zip(full, half, strict=True):
            assert torch.equal(parameter.to(dtype), rounded)


class TestDeliberateDifferences:
    def test_states_stay_float32_when_loaded(self) -> None:
        """The Trainer's become bfloat16, so that a resumed run is another run."""
        reference = pytest.importorskip("transformers.optimization").Adafactor
        cases = (Adafactor, torch.float32), (reference, torch.bfloat16)
        for optimizer_class, loaded in cases:
            params = weights(dtype=torch.bfloat16)
            optimizer = optimizer_class(params, lr=1e-2, scale_parameter=False, relative_step=False)
            give_gradients(params, 0)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            assert {
                state["exp_avg_sq_row"].dtype for state in optimizer.state.values() if "exp_avg_sq_row" in state
            } == {loaded}

    def test_lr_is_a_factor_of_the_relative_step(self) -> None:
        """The Trainer's takes none beside relative_step, so that no schedule could act on it."""
        reference = pytest.importorskip("transformers.optimization").Adafactor
        with pytest.raises(ValueError, match="Cannot combine"):
            reference(weights(), lr=1.0, relative_step=True)
        (half,), (whole,) = weights([(4, 4)]), weights([(4, 4)])
        before = whole.detach().clone()
        for parameter, lr in ((half, 0.5), (whole, None)):
            give_gradients([parameter], 0)
            Adafactor([parameter], lr=lr, relative_step=True).step()
        torch.testing.assert_close(2 * (half - before), whole - before)
        assert _rms((whole - before).detach()[None]).item() == pytest.approx(1e-2, rel=1e-4)

    def test_large_matrices_do_not_lose_digits(self) -> None:
        """A single float32 sum over 4 million squares, which the Trainer's clipping takes, is off by 1e-4."""
        large = torch.randn(1, 2048, 2048) + 1
        exact = large.double().square().mean().sqrt().item()
        assert _rms(large).item() == pytest.approx(exact, rel=1e-6)


class TestPureUpdate:
    @pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 4, 3), (2, 2, 4, 3, 5)])
    def test_a_stack_equals_its_members(self, shape: tuple[int, ...]) -> None:
        count = 1 if not shape else 3
        gradients = torch.randn(count, *shape)
        moments = {name: torch.rand(count, *each) for name, each in moment_shapes(shape).items()}
        apart = {name: moment.clone() for name, moment in moments.items()}
        arguments: dict[str, Any] = {"step": 3, "eps": 1e-30, "clip_threshold": 0.5, "decay_rate": -0.8}
        stacked = alone(factored_update(gradients, moments, Layout(shape), **arguments))
        each = [{name: moment[i : i + 1] for name, moment in apart.items()} for i in range(count)]
        single = [
            alone(factored_update(gradients[i : i + 1], own, Layout(shape), **arguments)) for i, own in enumerate(each)
        ]
        torch.testing.assert_close(stacked, torch.cat(single))
        torch.testing.assert_close(moments, apart)
        assert _rms(stacked).shape == (count, *(1,) * len(shape))
        assert (_rms(stacked) <= 0.5 + 1e-6).all()

    def test_zero_gradients_give_zero_updates(self) -> None:
        for shape in ((8,), (8, 8)):
            moments = {name: torch.zeros(1, *each) for name, each in moment_shapes(shape).items()}
            options: dict[str, Any] = {"step": 1, "eps": 1e-30, "clip_threshold": 1.0, "decay_rate": -0.8}
            update = alone(factored_update(torch.zeros(1, *shape), moments, Layout(shape), **options))
            assert torch.equal(update, torch.zeros(1, *shape))


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BOTH
def test_any_partition_steps_to_the_same_bits(make: Make, dtype: torch.dtype, threads: int) -> None:
    shapes = (
        *SHAPES,
        *[(32, 32)] * 30,
        *[(128, 256)] * 3,
        *[(128, 128)] * 3,
        *[(8, 16, 16)] * 3,
        *[(2048,)] * 3,
        (0, 5),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        outcomes = []
        for buckets in (1, 3, len(shapes)):
            params = weights(shapes, dtype)
            for index in (7, 10):
                params[index] = params[index].detach().t().requires_grad_()
            optimizers = [make(params[start::buckets]) for start in range(buckets)]
            for step in range(4):
                give_gradients(params, step)
                for parameter in params[step::5]:
                    parameter.grad = None
                for optimizer in optimizers:
                    optimizer.step()
            states = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
            outcomes.append([(parameter.detach(), states.get(parameter)) for parameter in params])
        assert_equal(outcomes[1], outcomes[0], "three buckets")
        assert_equal(outcomes[2], outcomes[0], "one parameter at a time")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BOTH
def test_saved_and_loaded_it_continues_exactly(make: Make, dtype: torch.dtype) -> None:
    straight = weights(dtype=dtype)
    one = make(straight)
    file = io.BytesIO()
    for step in range(6):
        if step == 3:
            torch.save((one.state_dict(), [parameter.detach() for parameter in straight]), file)
        give_gradients(straight, step)
        one.step()
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    resumed = [value.requires_grad_() for value in values]
    other = make(resumed)
    other.load_state_dict(state)
    for step in range(3, 6):
        give_gradients(resumed, step)
        other.step()
    assert_equal(other.state_dict(), one.state_dict(), "state")
    assert_equal(resumed, straight, "weights")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adafactor", "adalomo", "adafactor_beta1"])
def test_bytes(name: str, dtype: torch.dtype) -> None:
    """Four times (rows + columns) per matrix, whatever the weights' dtype, and the row of the table says so."""
    beta1 = 0.9 if name == "adafactor_beta1" else None
    spec = SPECS["adalomo" if name == "adalomo" else "adafactor"]
    options = parse(spec.options, {"beta1": 0.9} if beta1 else {}, spec.name)
    for shape in (*SHAPES, (0, 5), (5, 0), (1024, 512)):
        params = weights([shape], dtype)
        optimizer = spec.load()(params, **options.select("group"))
        give_gradients(params, 0)
        optimizer.step()
        elements = math.prod(shape)
        *stack, rows, columns = shape if len(shape) > 1 else (elements, 0)
        formula = 4 * math.prod(stack) * (rows + columns) if elements else 0
        formula += 4 * elements if beta1 else 0
        assert measured_bytes(optimizer.state_dict()) == formula, shape
        assert parameter_bytes(spec, options, shape, dtype.itemsize) == formula, shape


def test_warmup_init_needs_relative_step() -> None:
    with pytest.raises(InvalidOption, match="relative_step=True"):
        Adafactor(weights(), warmup_init=True)
    optimizer = Adafactor(weights())
    with pytest.raises(InvalidOption, match="relative_step=True"):
        optimizer.add_param_group({"params": weights(), "warmup_init": True})


def test_default_lr() -> None:
    assert AdafactorOptions().default_lr(1e-3) == 1e-3
    assert AdafactorOptions(relative_step=True).default_lr(1e-3) == 1.0
    assert Adafactor(weights()).param_groups[0]["lr"] == 1e-3
    assert Adafactor(weights(), relative_step=True).param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("text", ["eps=(0,1e-3)", "clip_threshold=0", "decay_rate=0.8", "beta1=1"])
def test_options_out_of_range(text: str) -> None:
    with pytest.raises(InvalidOption, match="out of range"):
        parse(AdafactorOptions, text, "adafactor")
