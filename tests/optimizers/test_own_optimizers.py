"""What every optimizer that we own must do, whatever its algorithm: shapes, dtypes, refusals, state, buckets."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.optim import Optimizer

from lightning_optim import REGISTRY, InvalidOption, InvalidParamGroups
from lightning_optim.build._memory import measured_bytes, state_bytes
from lightning_optim.layerwise._split_step import SplitStep
from lightning_optim.optimizers._base import OwnOptimizer
from lightning_optim.table.rows import ROWS
from lightning_optim.testing import PROMISES, Subject
from tests.processes import run_fresh
from tests.trainer.test_resume import assert_equal

OWN = tuple(row.name for row in ROWS if row.availability() and issubclass(row.load(), OwnOptimizer))
EXPECTED = {
    "adafactor",
    "adalomo",
    "adam_mini",
    "adamw_anyprecision",
    "adan",
    "adopt",
    "apollo_adamw",
    "apollo_mini",
    "came",
    "galore_adafactor",
    "galore_adamw",
    "galore_adamw_8bit",
    "grokadamw",
    "lamb",
    "lars",
    "lomo",
    "muon",
    "normuon",
    "prodigy",
    "scale",
    "soap",
}

# From 0 to 5 dimensions, none of them empty; stacks of equal shapes that are batched, and odd ones that are not.
SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (1,),
    (7,),
    (16, 16),
    (16, 16),
    (16, 16),
    (33, 17),
    (33, 17),
    (1, 40),
    (40, 1),
    (96, 64),
    (64, 96),
    (8, 4, 3, 3),
    (8, 4, 3, 3),
    (2, 3, 2, 2, 2),
    (5, 4, 3),
    (5, 16, 24),
)


def build(name: str, parameters: list[Tensor], **options: Any) -> Optimizer:
    """The optimizer with settings under which every path is taken within a few steps."""
    spec = REGISTRY[name]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if spec.projects:
        options = {"rank": 4, "update_proj_gap": 2, **options}
        # Every other one that is no matrix: as a stack of matrices, with states of the parameter's dtype.
        other = [p for index, p in enumerate(parameters) if index % 2 and p.ndim != 2]
        rest = [p for index, p in enumerate(parameters) if not (index % 2 and p.ndim != 2)]
        groups = [{"params": rest}, {"params": other, "stack_dims": 1, "state_dtype": "parameter"}][: 1 + bool(other)]
    if name == "galore_adamw_8bit":
        options = {"min_8bit_size": 64, **options}
    if name == "lars":
        # The rate below is a small one for it.
        options = {"trust_coeff": 1.0, **options}
    if name == "prodigy":
        options = {"d0": 0.1, **options}
    if name == "soap":
        options = {"precondition_frequency": 2, "max_precondition_dim": 70, **options}
    if name == "scale":
        options = {"momentum": 0.9, **options}
    if spec.takes != "all":
        # Every other stack of matrices as one.
        other = [p for index, p in enumerate(parameters) if index % 2 and p.ndim > 2]
        rest = [p for p in parameters if not any(p is one for one in other)]
        groups = [{"params": rest}, {"params": other, "stack_dims": 1}][: 1 + bool(other)]
    return spec.load()(groups, lr=1e-2, weight_decay=0.1, **spec.fixed, **options)


def parameters(dtype: torch.dtype = torch.float32, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    taken = [shape for shape in shapes if len(shape) >= LEAST_DIMENSIONS]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in taken]


# Of the parameters that the optimizer under test takes.
LEAST_DIMENSIONS = 0


@pytest.fixture(autouse=True)
def only_what_it_takes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name in REGISTRY and REGISTRY[name].takes != "all":
        monkeypatch.setattr(sys.modules[__name__], "LEAST_DIMENSIONS", 2)


def give_gradients(params: list[Tensor], step: int, missing: Callable[[int], bool] = lambda index: False) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for index, parameter in enumerate(params):
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = None if missing(index) else gradient


def train(optimizer: Optimizer, params: list[Tensor], steps: range, **kwargs: Any) -> None:
    for step in steps:
        give_gradients(params, step, **kwargs)
        optimizer.step()


def test_the_algorithms_of_the_table_are_all_here() -> None:
    assert set(OWN) == EXPECTED


class Given(nn.Module):
    """The parameters of these tests."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.given = nn.ParameterList(parameters(dtype))


@dataclass(frozen=True)
class Own(Subject):
    """An algorithm of ours with the shapes and settings of these tests."""

    dtype: torch.dtype = torch.float32

    def module(self, *_: Any) -> nn.Module:
        return Given(self.dtype)

    def resolve(self, module: nn.Module, **_: Any) -> Any:
        optimizer, spec = build(self.name, list(module.parameters())), self.row
        size = state_bytes(spec, spec.options(), optimizer.param_groups)
        return SimpleNamespace(optimizer=optimizer, state_bytes=size, spec=spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", OWN)
def test_promises_hold_for_any_shape_and_dtype(name: str, dtype: torch.dtype) -> None:
    subject = Own(name, dtype=dtype)
    states = ("resume", "weights_only", "deepcopy", "pickle", "state_bytes")
    narrow = ("missing_gradients", "accumulation", "closure", *states) if dtype is not torch.float64 else ()
    for promise in ("shapes", *narrow):
        PROMISES[promise](subject)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", OWN)
class TestShapesAndDtypes:
    def test_float32_states_for_half_weights(self, name: str, dtype: torch.dtype) -> None:
        params = parameters(dtype)
        optimizer = build(name, params)
        train(optimizer, params, range(2))
        states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        working = torch.promote_types(dtype, torch.float32)
        # Eight-bit moments are codes, and AnyPrecision's states have the dtypes that they are given.
        exempt = {torch.uint8} if name != "adamw_anyprecision" else {torch.float32}
        exempt |= {dtype} if REGISTRY[name].projects else set()
        assert {state.dtype for state in states} <= {working, torch.float32} | exempt

    def test_noncontiguous_parameters_are_stepped_as_contiguous_ones(self, name: str, dtype: torch.dtype) -> None:
        plain = parameters(dtype, ((12, 20), (6, 8, 4, 4)))
        swapped = [p.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for p in plain]
        assert not any(parameter.is_contiguous() for parameter in swapped)
        for params in (plain, swapped):
            train(build(name, params), params, range(4))
        for one, other in zip(plain, swapped, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", OWN)
class TestMissingAndEmpty:
    def test_without_a_gradient_nothing_moves(self, name: str) -> None:
        params = parameters()
        optimizer = build(name, params)
        before = [parameter.detach().clone() for parameter in params]
        train(optimizer, params, range(3), missing=lambda index: index % 2 == 0)
        for index, (old, new) in enumerate(zip(before, params, strict=True)):
            assert torch.equal(old, new) == (index % 2 == 0)
            assert bool(optimizer.state.get(new)) == (index % 2 == 1)

    def test_empty_tensors(self, name: str) -> None:
        params = parameters(shapes=((0,), (0, 4), (4, 0, 3), (4, 4)))
        optimizer = build(name, params)
        train(optimizer, params, range(3))
        assert list(optimizer.state) == params[-1:]
        optimizer.load_state_dict(optimizer.state_dict())

    def test_no_gradient_at_all(self, name: str) -> None:
        optimizer = build(name, parameters())
        optimizer.step()
        assert not optimizer.state


@pytest.mark.parametrize("name", OWN)
class TestRefusals:
    def test_complex_parameters(self, name: str) -> None:
        with pytest.raises(InvalidParamGroups, match="view_as_real"):
            build(name, [torch.zeros(4, 4, dtype=torch.complex64, requires_grad=True)])
        optimizer = build(name, parameters())
        with pytest.raises(InvalidParamGroups, match="complex64"):
            optimizer.add_param_group({"params": [torch.zeros(2, dtype=torch.complex64, requires_grad=True)]})

    def test_sparse_gradients(self, name: str) -> None:
        embedding = torch.nn.Embedding(8, 4, sparse=True)
        optimizer = build(name, [embedding.weight])
        embedding(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(InvalidParamGroups, match="sparse=False"):
            optimizer.step()

    def test_state_of_another_optimizer(self, name: str) -> None:
        params = parameters()
        optimizer = build(name, params)
        train(optimizer, params, range(1))
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(InvalidOption, match="another optimizer wrote"):
            optimizer.load_state_dict(torch.optim.SGD(params, lr=0.1).state_dict())
        newer = copy.deepcopy(before)
        newer["param_groups"][0]["format"] = f"{type(optimizer).__name__}/999"
        with pytest.raises(InvalidOption, match="/999"):
            optimizer.load_state_dict(newer)
        assert_equal(optimizer.state_dict(), before, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OWN)
class TestState:
    def test_the_optimizer_does_not_write_into_what_it_loaded(self, name: str, dtype: torch.dtype) -> None:
        params = parameters(dtype)
        optimizer = build(name, params)
        train(optimizer, params, range(2))
        saved = copy.deepcopy(optimizer.state_dict())
        kept = copy.deepcopy(saved)
        optimizer.load_state_dict(saved)
        train(optimizer, params, range(2, 4))
        assert_equal(saved, kept, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("buckets", [1, 2, 5])
@pytest.mark.parametrize("name", [name for name in OWN if not REGISTRY[name].coupled])
def test_any_partition_steps_to_the_same_bits(name: str, buckets: int, dtype: torch.dtype) -> None:
    """What the layerwise engine relies on: stacks and lists give a parameter what it gets alone."""
    together, apart = parameters(dtype), parameters(dtype)
    one, other = build(name, together), build(name, apart)
    for step in range(6):
        for params in (together, apart):
            give_gradients(params, step, missing=lambda index, step=step: (index + step) % 7 == 0)  # type: ignore[misc]
        one.step()
        split = SplitStep(other)
        alive = [parameter for parameter in apart if parameter.grad is not None]
        # Interleaved, so that equal shapes fall into different buckets.
        for start in range(buckets):
            split.inner(alive[start::buckets]).step()
        split.commit()
    assert_equal(other.state_dict(), one.state_dict(), name)
    for left, right in zip(together, apart, strict=True):
        assert torch.equal(left, right), tuple(left.shape)


# Ranks for which products of stacks are rounded otherwise than products of matrices.
@pytest.mark.parametrize("rank", [1, 2, 5, 7, 9, 15, 17, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in OWN if REGISTRY[name].projects])
def test_any_rank_steps_to_the_same_bits(name: str, dtype: torch.dtype, rank: int) -> None:
    shapes = ((64, 64),) * 3 + ((48, 336),) * 3 + ((128, 32),) * 3
    for proj_type in ("std", "reverse_std"):
        together, apart = parameters(dtype, shapes), parameters(dtype, shapes)
        one, other = (build(name, params, rank=rank, proj_type=proj_type) for params in (together, apart))
        for step in range(4):
            for params in (together, apart):
                give_gradients(params, step)
            one.step()
            split = SplitStep(other)
            for parameter in apart:
                split.inner([parameter]).step()
            split.commit()
        for left, right in zip(together, apart, strict=True):
            assert torch.equal(left, right), (proj_type, tuple(left.shape))


# The settings of each row under which a matrix decides something by itself: its rate, its clipping, its growth.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("galore_adamw", {"proj_type": "full"}),
        # A moment of each is a block of codes.
        ("galore_adamw_8bit", {"min_8bit_size": 64}),
        ("galore_adafactor", {"scale_parameter": True, "beta1": 0.9}),
        ("apollo_adamw", {"scale_type": "tensor"}),
        ("apollo_adamw", {"proj": "svd"}),
    ],
)
@pytest.mark.parametrize("counts", [(5,), (2, 3)], ids=str)
def test_a_stack_is_stepped_as_its_matrices(name: str, options: dict[str, Any], counts: tuple[int, ...]) -> None:
    shape = (16, 64)
    (stack,) = parameters(shapes=((*counts, *shape),))
    matrices = [matrix.detach().clone().requires_grad_() for matrix in stack.view(-1, *shape)]
    groups = [{"params": [stack], "stack_dims": len(counts)}], [{"params": matrices}]
    arguments: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "rank": 4, "update_proj_gap": 3, **options}
    one, other = (REGISTRY[name].load()(each, **arguments) for each in groups)
    for step in range(7):
        give_gradients([stack], step)
        assert stack.grad is not None
        if step in (0, 1, 3):
            stack.grad.view(-1, *shape)[2] = 0  # an expert without tokens, when the subspaces are due
        for matrix, gradient in zip(matrices, stack.grad.view(-1, *shape), strict=True):
            matrix.grad = gradient.clone()
        one.step()
        other.step()
    for matrix, expected in zip(stack.view(-1, *shape), matrices, strict=True):
        assert torch.equal(matrix, expected)
    sizes = [measured_bytes(optimizer.state_dict()) for optimizer in (one, other)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", [name for name in OWN if REGISTRY[name].projects])
def test_checkpoints_from_before_there_were_stacks_go_on(name: str) -> None:
    old, new = parameters(shapes=((16, 24), (5, 16, 24))), parameters(shapes=((16, 24), (5, 16, 24)))
    one, other = (REGISTRY[name].load()(params, rank=4, update_proj_gap=2) for params in (old, new))
    train(one, old, range(3))
    saved = copy.deepcopy(one.state_dict())
    for group in saved["param_groups"]:
        del group["stack_dims"], group["state_dtype"]
    for parameter, trained in zip(new, old, strict=True):
        parameter.data.copy_(trained.data)
    other.load_state_dict(saved)
    for optimizer, params in ((one, old), (other, new)):
        train(optimizer, params, range(3, 6))
    assert_equal(other.state_dict(), one.state_dict(), name)
    for left, right in zip(old, new, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", OWN)
class TestSurroundings:
    """The same bits whatever a program sets around a step; Lightning steps inside training_step if that is manual."""

    def result(self, name: str, shapes: tuple[tuple[int, ...], ...] = ((64, 64), (16, 96), (40,))) -> dict[str, Any]:
        params = parameters(shapes=shapes)
        optimizer = build(name, params)
        train(optimizer, params, range(3))
        return {"weights": params, "state": optimizer.state_dict()}

    def test_autocast(self, name: str) -> None:
        expected = self.result(name)
        params = parameters(shapes=((64, 64), (16, 96), (40,)))
        optimizer = build(name, params)
        for step in range(3):
            give_gradients(params, step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                optimizer.step()
        assert_equal({"weights": params, "state": optimizer.state_dict()}, expected, name)

    @pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
    def test_default_dtype(self, name: str, default: torch.dtype) -> None:
        expected = self.result(name)
        params = parameters(shapes=((64, 64), (16, 96), (40,)))
        gradients = []
        for step in range(3):
            give_gradients(params, step)
            gradients.append([parameter.grad for parameter in params])
        torch.set_default_dtype(default)
        try:
            optimizer = build(name, params)
            for step in range(3):
                for parameter, gradient in zip(params, gradients[step], strict=True):
                    parameter.grad = gradient
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        assert_equal({"weights": params, "state": optimizer.state_dict()}, expected, name)

    def test_default_device(self, name: str) -> None:
        params = parameters(shapes=((64, 64), (40,)))
        optimizer = build(name, params)
        give_gradients(params, 0)
        with torch.device("meta"):
            optimizer.step()
        assert all(torch.isfinite(parameter).all() for parameter in params)

    def test_gradients_of_another_dtype(self, name: str) -> None:
        weight = torch.ones(8, 8, dtype=torch.float64, requires_grad=True)
        weight.grad_dtype = None
        weight.grad = torch.ones(8, 8)
        build(name, [weight]).step()
        assert torch.isfinite(weight).all()


@pytest.mark.parametrize("name", OWN)
def test_hooks_see_and_may_translate_what_is_loaded(name: str) -> None:
    params = parameters(shapes=((16, 16), (12,)))
    saved = build(name, params)
    train(saved, params, range(2))
    optimizer = build(name, params)

    def translate(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        zeroed = {
            index: {key: torch.zeros_like(value) if isinstance(value, Tensor) else 7 for key, value in state.items()}
            for index, state in state_dict["state"].items()
        }
        return {**state_dict, "state": zeroed}

    seen: list[dict[str, Any]] = []
    optimizer.register_load_state_dict_pre_hook(translate)
    optimizer.register_load_state_dict_post_hook(lambda loaded: seen.append(loaded.state_dict()))
    optimizer.load_state_dict(saved.state_dict())
    for states in (optimizer.state_dict(), *seen):
        for state in states["state"].values():
            assert all(not value.any() if isinstance(value, Tensor) else value == 7 for value in state.values())
            assert state.keys() == saved.state_dict()["state"][0].keys() or len(states["state"]) > 1


@pytest.mark.parametrize("name", OWN)
def test_groups_added_later_have_hyperparameters_of_their_own(name: str) -> None:
    first, second = parameters(shapes=((16, 16), (16, 16)))
    second.data.copy_(first.data)
    optimizer = build(name, [first])
    train(optimizer, [first], range(1))
    optimizer.add_param_group({"params": [second], "lr": 0.0, "weight_decay": 0.0})
    before = second.detach().clone()
    train(optimizer, [first, second], range(1, 3))
    assert torch.equal(second, before)
    assert optimizer.state[second]["step"] == 2
    assert optimizer.state[first]["step"] == 3


@pytest.mark.parametrize("name", OWN)
def test_sharded_parameters_are_stepped_or_refused(name: str, tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    spec = REGISTRY[name]
    (weight,) = parameters(shapes=((16, 16),))
    sharded = torch.nn.Parameter(distribute_tensor(weight.detach().clone(), mesh, [Replicate()]))
    if not spec.sharded:
        with pytest.raises(InvalidParamGroups, match="DTensor"):
            build(name, [sharded])
        return
    optimizers = build(name, [weight]), build(name, [sharded])
    for step in range(3):
        give_gradients([weight], step)
        assert weight.grad is not None
        sharded.grad = distribute_tensor(weight.grad, mesh, [Replicate()])
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(sharded.full_tensor(), weight)


def test_building_them_imports_no_optional_package() -> None:
    names = sorted(EXPECTED - {"galore_adamw_8bit"})
    code = (
        "import sys, torch, lightning_optim as lo\n"
        # torchmetrics, which lightning imports, imports transformers where it is installed.
        "before = set(sys.modules)\n"
        f"for name in {names}:\n"
        "    model = torch.nn.Linear(8, 8)\n"
        "    optimizer = lo.build_optimizer(model, name)\n"
        "    model(torch.ones(2, 8)).sum().backward()\n"
        "    optimizer.step()\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'transformers', 'bitsandbytes', 'torchao', 'optimi', 'schedulefree', 'galore_torch', "
        "'apollo_torch', 'lomo_optim', 'grokadamw'}), 'bitsandbytes' in sys.modules)\n"
    )
    done = run_fresh("-c", code)
    assert done.stdout.strip() == "[] False", done.stderr
