"""AnyPrecisionAdamW: equal to the reference, written from its description, in every combination of dtypes."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from lightning_optim import InvalidOption, Layerwise
from lightning_optim.build._memory import measured_bytes, parameter_bytes
from lightning_optim.layerwise._split_step import SplitStep
from lightning_optim.optimizers._anyprecision import AnyPrecisionAdamW
from lightning_optim.table._options import parse
from lightning_optim.table.rows._adamw_variants import ROWS, AnyPrecisionAdamWOptions
from tests.optimizers import references

SHAPES = ((), (5,), (4, 3), (2, 3, 4), (2, 1, 3, 2), (2, 1, 2, 1, 3), (0, 3), (64, 33))
HALF = (torch.bfloat16, torch.float16)
KAHAN = {"use_kahan_summation": True}
ROW = next(row for row in ROWS if row.name == "adamw_anyprecision")


def make(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    # A column of a larger matrix: not contiguous.
    return [*made, nn.Parameter(torch.randn(6, 8, generator=generator).to(dtype)[:, ::3])]


def set_gradients(parameters: Sequence[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def train(optimizer: torch.optim.Optimizer, steps: int = 10, start: int = 0) -> list[Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in range(start, start + steps):
        set_gradients(parameters, step)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def assert_same(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.dtype is other.dtype
        assert torch.equal(one, other)


COMBINATIONS = list(
    itertools.product(
        ("float32", "bfloat16", "float16", "float64"),
        (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float64", "float32")),
        (None, "bfloat16", "float32"),
    )
)


@pytest.mark.parametrize(("dtype", "states", "compensation"), COMBINATIONS)
def test_equals_the_reference(dtype: str, states: tuple[str, str], compensation: str | None) -> None:
    """Bit for bit."""
    parameters = make(getattr(torch, dtype))
    starts = [parameter.detach().clone() for parameter in parameters]
    options: dict[str, Any] = {"momentum_dtype": states[0], "variance_dtype": states[1]}
    if compensation:
        options.update(use_kahan_summation=True, compensation_buffer_dtype=compensation)
    optimizer = AnyPrecisionAdamW(parameters, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, **options)
    gradients: list[list[Tensor]] = [[] for _ in parameters]
    for step in range(8):
        set_gradients(parameters, step)
        for parameter, given in zip(parameters, gradients, strict=True):
            assert parameter.grad is not None
            given.append(parameter.grad)
        optimizer.step()
    for parameter, start, given in zip(parameters, starts, gradients, strict=True):
        group = SimpleNamespace(**optimizer.param_groups[0])
        weight, *kept = references.adamw_anyprecision(start, given, group)
        assert_same([weight], [parameter.detach()])
        if parameter.numel():
            state = optimizer.state[parameter]
            names = ["exp_avg", "exp_avg_sq", "compensation"][: 3 if compensation else 2]
            assert state.keys() == {"step", *names}
            assert_same(kept[: len(names)], [state[name] for name in names])


@pytest.mark.parametrize("kahan", [False, True])
def test_is_adamw_in_float32(kahan: bool) -> None:
    """Up to rounding: 1e-6 after 50 steps at lr 1e-2."""
    reference = train(torch.optim.AdamW(make(), lr=1e-2, eps=1e-6, weight_decay=0.1), 50)
    options = {"use_kahan_summation": kahan, "compensation_buffer_dtype": "float32"}
    ours = train(AnyPrecisionAdamW(make(), lr=1e-2, eps=1e-6, weight_decay=0.1, **options), 50)
    for one, other in zip(reference, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_kahan_summation_is_ten_times_closer_to_float32() -> None:
    def weights(cls: type, dtype: torch.dtype, **options: Any) -> Tensor:
        parameter = nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype))
        optimizer = cls([parameter], lr=1e-3, weight_decay=0.0, **options)
        generator = torch.Generator().manual_seed(1)
        slope = torch.randn(1000, generator=generator)
        for _ in range(300):
            noise = torch.randn(1000, generator=generator)
            parameter.grad = (slope + noise).bfloat16().to(dtype)
            optimizer.step()
        return parameter.detach().float()

    start = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    exact = weights(torch.optim.AdamW, torch.float32) + (start.bfloat16().float() - start)

    def error(**options: Any) -> float:
        ours = weights(AnyPrecisionAdamW, torch.bfloat16, **options)
        return (ours - exact).square().mean().sqrt().item()

    assert error() > 0.02
    assert error(**KAHAN) < 0.1 * error()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("options", [{}, KAHAN, {**KAHAN, "variance_dtype": "bfloat16"}], ids=str)
def test_any_partition_gives_the_same_bits(options: dict[str, Any], dtype: torch.dtype) -> None:
    def build() -> AnyPrecisionAdamW:
        first, second = (parameters := make(dtype))[:4], parameters[4:]
        return AnyPrecisionAdamW([{"params": first}, {"params": second, "lr": 1e-2}], weight_decay=0.1, **options)

    plain, split = build(), build()
    expected = train(plain, 6)
    parameters = [parameter for group in split.param_groups for parameter in group["params"]]
    for step in range(6):
        set_gradients(parameters, step)
        order = torch.randperm(len(parameters), generator=torch.Generator().manual_seed(step)).tolist()
        run = SplitStep(split)
        for bucket in (order[:1], order[1:4], order[4:]):
            run.inner([parameters[index] for index in bucket]).step()
        run.commit()
    assert_same(expected, [parameter.detach() for parameter in parameters])


def test_layerwise_equals_plain() -> None:
    def outcome(layerwise: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).bfloat16()
        optimizer = AnyPrecisionAdamW(model.parameters(), lr=1e-2, **KAHAN)  # type: ignore[arg-type]
        attached = Layerwise(optimizer, bucket_mb=0) if layerwise else None
        for _ in range(5):
            loss = model(torch.randn(8, 8).bfloat16()).float().square().mean()
            if attached:
                attached.backward(loss)
            else:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return [parameter.detach() for parameter in model.parameters()]

    assert_same(outcome(False), outcome(True))


def through_a_file(optimizer: AnyPrecisionAdamW) -> AnyPrecisionAdamW:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copied = [nn.Parameter(p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    fresh = AnyPrecisionAdamW(copied, lr=0.5)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize("carry", [through_a_file, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_continues_exactly(carry: Any) -> None:
    options = {**KAHAN, "variance_dtype": torch.float64, "compensation_buffer_dtype": "float32"}
    optimizer = AnyPrecisionAdamW(make(torch.bfloat16), lr=1e-2, weight_decay=0.1, **options)
    train(optimizer, 5)
    other = carry(optimizer)
    assert_same(train(optimizer, 5, start=5), train(other, 5, start=5))
    for state in other.state.values():
        dtypes = {name: value.dtype for name, value in state.items() if isinstance(value, Tensor)}
        expected = {"exp_avg": torch.float32, "exp_avg_sq": torch.float64, "compensation": torch.float32}
        assert dtypes == expected
        assert type(state["step"]) is int


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ["", "use_kahan_summation=True", "momentum_dtype=bfloat16,variance_dtype=float64"])
def test_state_bytes_are_as_estimated(options: str, dtype: torch.dtype) -> None:
    parsed = parse(ROW.options, options, ROW.name)
    parameters = make(dtype)
    optimizer = ROW.load()(parameters, **parsed.select("group", "constructor"))
    train(optimizer, 1)
    expected = sum(parameter_bytes(ROW, parsed, tuple(p.shape), p.element_size()) for p in parameters)
    assert measured_bytes(optimizer.state_dict()) == expected > 0


class TestDtypes:
    @pytest.mark.parametrize("given", ["bfloat16", "torch.bfloat16", torch.bfloat16])
    def test_groups_hold_plain_names(self, given: Any) -> None:
        groups = [{"params": make()}, {"params": make(), "variance_dtype": given}]
        optimizer = AnyPrecisionAdamW(groups, momentum_dtype=given)
        assert [group["momentum_dtype"] for group in optimizer.param_groups] == ["bfloat16", "bfloat16"]
        assert [group["variance_dtype"] for group in optimizer.param_groups] == ["float32", "bfloat16"]
        assert parse(ROW.options, {"momentum_dtype": given}, "x") == AnyPrecisionAdamWOptions(momentum_dtype="bfloat16")

    @pytest.mark.parametrize("given", ["bf16", torch.int32, "torch.complex64", None, 16])
    def test_others_are_refused(self, given: Any) -> None:
        allowed = "'float32', 'bfloat16', 'float16', 'float64'"
        with pytest.raises(InvalidOption, match=rf"variance_dtype=.* allowed: {allowed}"):
            AnyPrecisionAdamW(make(), variance_dtype=given)
        with pytest.raises(InvalidOption, match="momentum_dtype="):
            AnyPrecisionAdamW([{"params": make(), "momentum_dtype": given}])

    def test_an_epsilon_that_float16_rounds_to_zero_is_refused(self) -> None:
        with pytest.raises(InvalidOption, match=r"eps=1e-08 rounds to 0 .* set eps=6e-08"):
            parse(ROW.options, "variance_dtype=float16", ROW.name)
        parse(ROW.options, "variance_dtype=float16,eps=6e-8", ROW.name)
        parse(ROW.options, "momentum_dtype=float16", ROW.name)

    @pytest.mark.parametrize("dtype", HALF)
    def test_zero_gradients_leave_half_weights_alone(self, dtype: torch.dtype) -> None:
        parameter = nn.Parameter(torch.ones(4, dtype=dtype))
        optimizer = AnyPrecisionAdamW([parameter])
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert torch.equal(parameter, torch.ones(4, dtype=dtype))


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, KAHAN])
def test_sharded_parameters_give_the_same_bits(options: dict[str, Any], dtype: torch.dtype) -> None:
    mesh = init_device_mesh("cpu", (1,))
    shapes = ((5,), (4, 3), (2, 3, 4))
    plain = make(dtype, shapes)
    sharded = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in plain]
    one, other = (AnyPrecisionAdamW(parameters, weight_decay=0.1, **options) for parameters in (plain, sharded))
    for step in range(4):
        set_gradients(plain, step)
        for parameter, shard in zip(plain, sharded, strict=True):
            assert parameter.grad is not None
            shard.grad = distribute_tensor(parameter.grad, mesh, [Shard(0)])
        one.step()
        other.step()
    assert_same([p.detach() for p in plain], [p.full_tensor().detach() for p in sharded])  # type: ignore[attr-defined]
