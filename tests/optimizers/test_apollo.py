"""APOLLO against apollo-torch, its random projections, and what the package promises of every optimizer."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_optim.build._memory import measured_bytes, parameter_bytes
from lightning_optim.errors import InvalidOption
from lightning_optim.layerwise._split_step import SplitStep
from lightning_optim.optimizers import _apollo as apollo
from lightning_optim.optimizers._apollo import ApolloAdamW
from lightning_optim.optimizers._projection import gaussian
from lightning_optim.table._options import parse
from lightning_optim.table.rows._apollo import ROWS, ApolloOptions
from tests.models import TOKENS, TokenModel

MINI = {"rank": 1, "scale": 128.0, "scale_type": "tensor"}
SHAPES = ((24, 40), (40, 24), (16, 16))
BOTH = pytest.mark.parametrize("scale_type", ["channel", "tensor"])
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


def random_gradients(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) * (1 + step % 3) for step in range(count)]


def follow(optimizer: Optimizer, parameter: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


class TestApolloTorch:
    """The package's deterministic ``proj="svd"``.

    Different on purpose:
    - the epsilon: ours is torch's, added to the corrected denominator;
    - the decay: ours is torch's, before the update; the package multiplies weights and update by ``1 - lr * decay``;
    - the limiter: ours compares updates as the paper defines them; the package compares them before the bias
      correction, whose growth it then limits, too;
    - a zero update: the package compares with it and never moves again;
    - the package adds 1e-8 to every norm it divides by: gradients of 1e-8 hardly move its weights;
    - the package cannot project the longer side.
    """

    @staticmethod
    def theirs(parameter: Tensor, *, limited: bool = False, **group: Any) -> Optimizer:
        package = pytest.importorskip("apollo_torch")
        return package.APOLLOAdamW([{"params": [parameter], "proj": "svd", **group}], disable_nl=not limited)

    @EACH_SHAPE
    @BOTH
    def test_without_limiter(self, shape: tuple[int, int], scale_type: str) -> None:
        start, gradients = torch.randn(shape), random_gradients(12, *shape)
        lr, decay, eps, betas, scale = 0.01, 0.1, 1e-2, (0.8, 0.95), 4.0
        group = {"rank": 4, "update_proj_gap": 5, "proj_type": "std", "scale_type": scale_type, "betas": betas}
        one, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        theirs = self.theirs(one, lr=lr, weight_decay=decay, eps=eps, scale=scale, **group)
        # The decay of their update.
        scale *= (1 - lr * decay) ** 2
        ours = ApolloAdamW([other], lr=lr, weight_decay=decay, scale=scale, proj="svd", norm_growth_limit=None, **group)
        for step, gradient in enumerate(gradients, start=1):
            # Their epsilon.
            ours.param_groups[0]["eps"] = eps / math.sqrt(1 - betas[1] ** step)
            torch.testing.assert_close(
                follow(ours, other, [gradient]), follow(theirs, one, [gradient]), rtol=1e-5, atol=1e-6
            )

    @EACH_SHAPE
    @BOTH
    def test_with_limiter(self, shape: tuple[int, int], scale_type: str) -> None:
        start, gradients = torch.randn(shape), random_gradients(12, *shape)
        before = random_gradients(60, *shape)
        group = {"rank": 4, "update_proj_gap": 7, "proj_type": "std", "scale_type": scale_type, "betas": (0.5, 0.6)}
        one, other, unlimited = (nn.Parameter(start.clone()) for _ in range(3))
        theirs = self.theirs(one, limited=True, lr=0.0, weight_decay=0.0, eps=0.0, scale=1.0, **group)
        ours = ApolloAdamW([other], lr=0.0, eps=0.0, proj="svd", **group)
        plain = ApolloAdamW([unlimited], lr=0.0, eps=0.0, proj="svd", norm_growth_limit=None, **group)
        pairs = ((theirs, one), (ours, other), (plain, unlimited))
        for optimizer, parameter in pairs:
            # Until the bias corrections have gone, and down to an update that no limiter touches.
            follow(optimizer, parameter, [*before, 1e-3 * gradients[0]])
            optimizer.param_groups[0]["lr"] = 0.01
            follow(optimizer, parameter, gradients[1:])
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
        assert (other - start).norm() < 0.9 * (unlimited - start).norm(), "the limiter has to bind in this test"

    def test_the_update_is_multiplied_by_the_root_of_scale(self) -> None:
        gradients, moved = random_gradients(1, 8, 16), []
        group = {"rank": 4, "update_proj_gap": 9, "proj_type": "std", "scale_type": "channel"}
        for scale in (1.0, 4.0):
            parameter = nn.Parameter(torch.zeros(8, 16))
            moved.append(follow(self.theirs(parameter, scale=scale, **group), parameter, gradients))
        torch.testing.assert_close(moved[1], 2 * moved[0])

    def test_a_zero_update_stops_only_theirs(self) -> None:
        gradients = random_gradients(4, 8, 16)
        gradients[1].zero_()
        one, other = nn.Parameter(torch.zeros(8, 16)), nn.Parameter(torch.zeros(8, 16))
        group = {"rank": 4, "update_proj_gap": 9, "proj_type": "std", "scale": 1.0, "scale_type": "channel", "lr": 1.0}
        for optimizer, parameter in (
            (self.theirs(one, limited=True, **group), one),
            (ApolloAdamW([other], proj="svd", **group), other),
        ):
            follow(optimizer, parameter, gradients[:2])
            moved = parameter.detach().clone()
            follow(optimizer, parameter, gradients[2:])
            assert (parameter - moved).norm() < 1e-6 if parameter is one else (parameter - moved).norm() > 1


class TestRandomProjections:
    def test_norms_are_the_same_in_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gradients, outcomes = random_gradients(3, 50, 70), []
        for block in (apollo._BLOCK, 200, 1):
            monkeypatch.setattr(apollo, "_BLOCK", block)
            parameter = nn.Parameter(torch.zeros(50, 70))
            outcomes.append(follow(ApolloAdamW([parameter], rank=4), parameter, gradients))
        torch.testing.assert_close(outcomes[1], outcomes[0])
        torch.testing.assert_close(outcomes[2], outcomes[0])

    def test_random_projections_preserve_norms_in_the_mean(self) -> None:
        side, rank, seeds = 24, 16, 400
        projections = torch.stack([gaussian(seed, side, rank, torch.empty(())) for seed in range(seeds)]) / rank**0.5
        torch.testing.assert_close((projections @ projections.mT).mean(0), torch.eye(side), rtol=0, atol=0.07)
        vector = torch.randn(side)
        ratios = (projections.mT @ vector).norm(dim=1).square() / vector.norm().square()
        assert ratios.mean() == pytest.approx(1, abs=0.06)
        assert ratios.std() == pytest.approx(math.sqrt(2 / rank), rel=0.2)

    def test_a_refresh_draws_another_projection(self) -> None:
        parameters = [nn.Parameter(torch.zeros(16, 32)) for _ in range(2)]
        gradient = torch.randn(16, 32)
        optimizer = ApolloAdamW(parameters, rank=4, update_proj_gap=2, betas=(0.0, 0.9), seed=3)
        seen = []
        for step in range(4):
            for parameter in parameters:
                parameter.grad = gradient.clone()
            optimizer.step()
            states = [optimizer.state[parameter] for parameter in parameters]
            assert {state["seed"] for state in states} == {3 + step // 2}
            assert torch.equal(states[0]["exp_avg"], states[1]["exp_avg"])
            seen.append(states[0]["exp_avg"].clone())
        assert torch.equal(seen[0], seen[1])
        assert torch.equal(seen[2], seen[3])
        assert not torch.allclose(seen[1], seen[2])

    def test_a_projection_is_drawn_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn = []
        monkeypatch.setattr(apollo, "gaussian", lambda seed, *args: drawn.append(seed) or gaussian(seed, *args))
        # Of one kind: their shorter sides are equal.
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((16, 32), (16, 32), (48, 16))]
        optimizer = ApolloAdamW(parameters, rank=4, update_proj_gap=5)
        before = torch.get_rng_state()
        for _ in range(10):
            split = SplitStep(optimizer)
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
                split.inner([parameter]).step()
            split.commit()
        assert drawn == [0, 1]
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("lr", "options"), [(1e-2, {"rank": 16}), (1e-2, MINI), (1e-2, {"rank": 16, "proj": "svd"})], ids=str
)
def test_learns(lr: float, options: dict[str, Any]) -> None:
    model = TokenModel()
    matrices = [model.linear.weight, model.head.weight]
    others = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in matrices)]
    optimizer = ApolloAdamW([{"params": matrices, **options}, {"params": others}], lr=lr)
    losses = []
    for _ in range(60):
        tokens = torch.randint(0, TOKENS, (16, 8))
        loss = F.cross_entropy(model(tokens).flatten(0, 1), ((3 * tokens + 1) % TOKENS).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


MIXED = ((16, 32), (16, 32), (16, 32), (32, 16), (64, 64), (64, 64), (7, 5), (5, 160), (5, 160), (300, 200),
         (128, 256), (128, 256), (8, 3, 3, 3), (16, 4, 2, 2), (16, 4, 2, 2), (9,), (32,), ())  # fmt: skip


def mixed(**options: Any) -> tuple[list[nn.Parameter], ApolloAdamW]:
    torch.manual_seed(1)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in MIXED]
    parameters.append(nn.Parameter(torch.randn(16, 32, dtype=torch.bfloat16)))
    parameters.append(nn.Parameter(torch.randn(16, 32, dtype=torch.float64)))
    groups = [{"params": parameters[1::2]}, {"params": parameters[::2], "rank": None, "weight_decay": 0.2}]
    groups[1]["rank"] = 3
    return parameters, ApolloAdamW(groups, **{"lr": 0.01, "rank": 8, "update_proj_gap": 3, **options})


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    """Some parameters get none in some steps, so that their projections change at different steps."""
    generator = torch.Generator().manual_seed(step)
    for index, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = None if (index * step) % 7 == 3 else gradient


def outcome(parameters: list[nn.Parameter], optimizer: Optimizer) -> list[Any]:
    states = [value for p in parameters for _, value in sorted(optimizer.state[p].items())]
    return [*(parameter.detach().clone() for parameter in parameters), *copy.deepcopy(states)]


def assert_same(one: list[Any], other: list[Any]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left, right) if isinstance(left, Tensor) else left == right


class TestPartition:
    @pytest.mark.parametrize("size", [1, 2, 5])
    @pytest.mark.parametrize(
        "options", [{}, {"scale_type": "tensor"}, {"proj": "svd"}, {"proj_type": "reverse_std"}], ids=str
    )
    @pytest.mark.parametrize("threads", [1, 2])
    def test_any_buckets(self, size: int, options: dict[str, Any], threads: int) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            whole, plain = mixed(**options)
            parts, layerwise = mixed(**options)
            for step in range(8):
                give_gradients(whole, step)
                plain.step()
                give_gradients(parts, step)
                split = SplitStep(layerwise)
                order = torch.randperm(len(parts)).tolist()
                for start in range(0, len(parts), size):
                    split.inner([parts[index] for index in order[start : start + size]]).step()
                split.commit()
            assert_same(outcome(whole, plain), outcome(parts, layerwise))
        finally:
            torch.set_num_threads(before)

    def test_the_gap_changes_while_some_have_no_gradient(self) -> None:
        """Parameters of one shape at one step have different projections then."""
        pairs = [[nn.Parameter(torch.ones(16, 32)) for _ in range(2)] for _ in range(2)]
        together = ApolloAdamW(pairs[0], rank=4, update_proj_gap=2)
        alone = [ApolloAdamW([parameter], rank=4, update_proj_gap=2) for parameter in pairs[1]]
        for step in range(12):
            for parameters in pairs:
                give_gradients(parameters, 0)
                if step in (2, 3, 4):
                    parameters[0].grad = None
                elif step in (8, 9, 10):
                    parameters[1].grad = None
            for optimizer in (together, *alone):
                optimizer.param_groups[0]["update_proj_gap"] = 2 if step < 5 else 100
                optimizer.step()
        first, second = (together.state[parameter] for parameter in pairs[0])
        assert first["step"] == second["step"]
        assert first["seed"] != second["seed"]
        for one, other in zip(*pairs, strict=True):
            assert torch.equal(one, other)


class TestParameters:
    @pytest.mark.parametrize("shape", [(1, 5), (7, 1), (1, 1), (3, 200), (200, 3), (2, 3, 5), (0, 4)], ids=str)
    @pytest.mark.parametrize("options", [{"rank": 4}, MINI, {"rank": 4, "proj": "svd"}], ids=str)
    def test_odd_shapes(self, shape: tuple[int, ...], options: dict[str, Any]) -> None:
        parameter = nn.Parameter(torch.ones(shape))
        follow(ApolloAdamW([parameter], **options), parameter, random_gradients(3, *shape))
        assert parameter.isfinite().all()
        assert (parameter != 1).all()

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_convolutions_are_matrices(self, memory_format: torch.memory_format) -> None:
        weight = torch.randn(16, 8, 3, 3)
        kernel = nn.Parameter(weight.clone(memory_format=memory_format))
        matrix = nn.Parameter(weight.flatten(1).clone())
        gradients = random_gradients(4, 16, 8, 3, 3)
        follow(ApolloAdamW([kernel], rank=4), kernel, [g.contiguous(memory_format=memory_format) for g in gradients])
        follow(ApolloAdamW([matrix], rank=4), matrix, [gradient.flatten(1) for gradient in gradients])
        assert torch.equal(kernel.flatten(1), matrix)

    @pytest.mark.parametrize(("shape", "rank"), [((9,), 4), ((), 4), ((4, 6), None)], ids=str)
    def test_others_are_stepped_by_adamw(self, shape: tuple[int, ...], rank: int | None) -> None:
        one, other = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
        gradients = random_gradients(5, *shape)
        follow(ApolloAdamW([one], lr=0.1, weight_decay=0.1, rank=rank, scale=9.0), one, gradients)
        follow(torch.optim.AdamW([other], lr=0.1, weight_decay=0.1), other, gradients)
        torch.testing.assert_close(one, other)

    def test_gradients_are_left_alone(self) -> None:
        parameters, optimizer = mixed()
        give_gradients(parameters, 1)
        before = [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
        optimizer.step()
        for parameter, gradient in zip(parameters, before, strict=True):
            assert gradient is None if parameter.grad is None else torch.equal(gradient, parameter.grad)


class TestGradients:
    @pytest.mark.parametrize("options", [{"rank": 4}, MINI, {"rank": 4, "proj": "svd"}], ids=str)
    def test_zero(self, options: dict[str, Any]) -> None:
        gradients = random_gradients(5, 16, 32)
        gradients[0].zero_()
        gradients[3].zero_()
        parameter = nn.Parameter(torch.ones(16, 32))
        optimizer = ApolloAdamW([parameter], lr=0.1, weight_decay=0.5, **options)
        for gradient in gradients:
            before = parameter.detach().clone()
            after = follow(optimizer, parameter, [gradient])
            assert torch.equal(after, before * (1 - 0.1 * 0.5)) is (not gradient.any())
            assert after.isfinite().all()

    @pytest.mark.parametrize("shape", [(16, 32), (300, 200), (32, 16)], ids=str)
    def test_a_channel_of_zeros_stays(self, shape: tuple[int, int]) -> None:
        parameter = nn.Parameter(torch.ones(shape))
        optimizer = ApolloAdamW([parameter], rank=4)
        wide = shape[0] < shape[1]
        for step, gradient in enumerate(random_gradients(3, *shape)):
            channels = gradient if wide else gradient.T
            channels[:, 2] *= step == 0
            before = parameter.detach().clone()
            change = follow(optimizer, parameter, [gradient]) - before
            change = change if wide else change.T
            assert (change[:, 1] != 0).all()
            assert bool((change[:, 2] != 0).all()) is (step == 0)

    @pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
    def test_of_any_size_make_the_same_updates(self, scale: float) -> None:
        gradients = random_gradients(3, 16, 32, dtype=torch.float64)
        one, other = (nn.Parameter(torch.zeros(16, 32, dtype=torch.float64)) for _ in range(2))
        follow(ApolloAdamW([one], rank=4, eps=0.0), one, gradients)
        follow(ApolloAdamW([other], rank=4, eps=0.0), other, [scale * gradient for gradient in gradients])
        torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("broken", [math.nan, math.inf])
    @pytest.mark.parametrize("proj", ["random", "svd"])
    def test_not_finite(self, broken: float, proj: str) -> None:
        parameters = [nn.Parameter(torch.ones(16, 32)) for _ in range(2)]
        optimizer = ApolloAdamW(parameters, rank=4, update_proj_gap=2, proj=proj)
        for parameter in parameters:
            parameter.grad = torch.randn(16, 32)
        optimizer.step()
        optimizer.step()
        before = copy.deepcopy(optimizer.state[parameters[0]])
        weights = [parameter.detach().clone() for parameter in parameters]
        parameters[0].grad[3, 4] = broken
        with pytest.warns(RuntimeWarning, match="ApolloAdamW: 1 .* non-finite"):
            optimizer.step()
        after = optimizer.state[parameters[0]]
        assert after["skipped"] == 1
        assert_same(
            [value for name, value in before.items() if name != "skipped"],
            [value for name, value in after.items() if name != "skipped"],
        )
        assert torch.equal(parameters[0], weights[0])
        assert not torch.equal(parameters[1], weights[1])


class TestCopies:
    @pytest.mark.parametrize("proj", ["random", "svd"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_checkpoints_are_exact(self, proj: str, dtype: torch.dtype) -> None:
        def make() -> tuple[nn.Parameter, ApolloAdamW]:
            torch.manual_seed(2)
            parameter = nn.Parameter(torch.randn(16, 32, dtype=dtype))
            return parameter, ApolloAdamW([parameter], lr=0.01, rank=4, update_proj_gap=3, proj=proj, seed=5)

        gradients = [gradient.to(dtype) for gradient in random_gradients(10, 16, 32)]
        parameter, optimizer = make()
        follow(optimizer, parameter, gradients[:5])
        file = io.BytesIO()
        torch.save({"weights": parameter.detach(), "optimizer": optimizer.state_dict()}, file)
        follow(optimizer, parameter, gradients[5:])

        file.seek(0)
        checkpoint = torch.load(file, weights_only=True)
        resumed, fresh = make()
        resumed.data.copy_(checkpoint["weights"])
        fresh.load_state_dict(checkpoint["optimizer"])
        tensors = {name: value for name, value in fresh.state[resumed].items() if isinstance(value, Tensor)}
        assert {value.dtype for value in tensors.values()} == {torch.float32}
        assert tensors.keys() == {"exp_avg", "exp_avg_sq", "update_norm", *(["left"] if proj == "svd" else [])}
        follow(fresh, resumed, gradients[5:])
        assert_same(outcome([parameter], optimizer), outcome([resumed], fresh))

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
    def test_copies_go_on_as_the_original(self, copied: Any) -> None:
        parameters, optimizer = mixed()
        give_gradients(parameters, 1)
        optimizer.step()
        others, other = copied((parameters, optimizer))
        before = outcome(parameters, optimizer)
        for step in range(2, 6):
            give_gradients(others, step)
            other.step()
        assert_same(before, outcome(parameters, optimizer))
        for step in range(2, 6):
            give_gradients(parameters, step)
            optimizer.step()
        assert_same(outcome(others, other), outcome(parameters, optimizer))


class TestTheRow:
    @pytest.mark.parametrize("shape", [(256, 1024), (1024, 256), (64, 64, 3, 3)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        ("options", "per_column"),
        [("rank=32", 64), ("rank=1,scale=128,scale_type=tensor", 2), ("rank=32,norm_growth_limit=none", 64)],
    )
    def test_state_bytes(self, shape: tuple[int, ...], dtype: torch.dtype, options: str, per_column: int) -> None:
        parsed = parse(ApolloOptions, options, "apollo_adamw")
        parameter = nn.Parameter(torch.ones(shape, dtype=dtype))
        optimizer = ApolloAdamW([parameter], **parsed.select("group"))
        follow(optimizer, parameter, [torch.ones_like(parameter)])
        measured = measured_bytes(optimizer.state_dict())
        assert measured == parameter_bytes(ROWS[0], parsed, shape, dtype.itemsize)
        rows, columns = shape[0], math.prod(shape[1:])
        assert measured == pytest.approx(4 * per_column * max(rows, columns), rel=0.01)

    @pytest.mark.parametrize("group", [{"proj": "svd", "rank": 8}, {"rank": None}], ids=str)
    @pytest.mark.parametrize("shape", [(48, 32), (7,)], ids=str)
    def test_state_bytes_of_others(self, shape: tuple[int, ...], group: dict[str, Any]) -> None:
        parameter = nn.Parameter(torch.ones(shape))
        optimizer = ApolloAdamW([{"params": [parameter], **group}])
        follow(optimizer, parameter, random_gradients(1, *shape))
        assert measured_bytes(optimizer.state_dict()) == parameter_bytes(ROWS[0], ApolloOptions(**group), shape, 4)

    def test_defaults_are_the_class_defaults_but_for_the_rank(self) -> None:
        group = ApolloAdamW([nn.Parameter(torch.ones(2, 2))]).param_groups[0]
        assert group["rank"] is None
        assert {name: group[name] for name in ApolloOptions().select("group")} == {
            **ApolloOptions().select("group"),
            "rank": None,
        }
        assert ApolloOptions().rank == 128

    @pytest.mark.parametrize("name", ["proj", "proj_type", "scale_type"])
    def test_choices(self, name: str) -> None:
        with pytest.raises(InvalidOption, match=rf"{name}='full' .*'(random|std|channel)'"):
            ApolloAdamW([nn.Parameter(torch.ones(2, 2))], rank=1, **{name: "full"})
        with pytest.raises(InvalidOption, match=rf"{name}='full' .*'(random|std|channel)'"):
            parse(ApolloOptions, {name: "full"}, "apollo_adamw")
