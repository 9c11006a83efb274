"""GaLore: equal to galore-torch where that is right, its subspaces, and what happens when a gradient is not usable."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from galore_torch import GaLoreAdafactor as UpstreamAdafactor
from galore_torch import GaLoreAdamW as UpstreamAdamW
from torch import Tensor, nn

from lightning_optim import REGISTRY, InvalidOption, OptimConfig, build_optimizer
from lightning_optim.build._factory import resolve
from lightning_optim.build._memory import measured_bytes, state_bytes
from lightning_optim.optimizers import _low_rank as low_rank
from lightning_optim.optimizers._galore import GaLoreAdamW
from lightning_optim.optimizers._galore_adafactor import GaLoreAdafactor
from lightning_optim.optimizers._projection import find_bases
from lightning_optim.optimizers.adapters._galore import GaLoreAdamW8bit
from lightning_optim.stepping import Together, alone
from lightning_optim.trainer import _report as report

PROJECTIONS = ("std", "reverse_std", "right", "left", "full")
SHAPES = ((24, 24), (16, 40), (40, 16))
RANK, GAP, STEPS = 4, 5, 20
# Both sides round in another order; singular vectors of upstream's SVD are ours.
TOLERANCE = 2e-5


def weights(shapes: tuple[tuple[int, ...], ...] = SHAPES, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def give_gradients(step: int, *models: list[Tensor]) -> None:
    """The same gradients to every model; with a spectrum that falls, so that the leading subspace is well defined."""
    for index, parameter in enumerate(models[0]):
        generator = torch.Generator().manual_seed(1000 * step + index)
        gradient = torch.randn(parameter.shape, generator=generator)
        if gradient.ndim == 2:
            gradient = gradient * torch.logspace(0, -2, parameter.shape[1])
        for model in models:
            model[index].grad = gradient.to(parameter.dtype)


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def basis_of(state: dict[str, Any]) -> Tensor:
    return state["right"] if "right" in state else state["left"]


def projected(params: list[Tensor], proj_type: str, **options: Any) -> list[dict[str, Any]]:
    return [{"params": params, "rank": RANK, "update_proj_gap": GAP, "scale": 0.5, "proj_type": proj_type, **options}]


@pytest.mark.parametrize("proj_type", PROJECTIONS)
class TestEqualToGaloreTorch:
    """Contract C2, over several projections, with betas and decay that Hugging Face never hands on."""

    def both(self, proj_type: str, eps: float | None, decay: float, size: float = 1.0, **options: Any) -> float:
        ours, theirs = weights((*SHAPES, (30,))), weights((*SHAPES, (30,)))
        hyperparameters: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": decay}
        hyperparameters |= {} if eps is None else {"eps": eps}
        groups = [[*projected(model[:-1], proj_type), {"params": model[-1:]}] for model in (ours, theirs)]
        one = GaLoreAdamW(groups[0], projection="svd", **options, **hyperparameters)
        other = UpstreamAdamW(groups[1], no_deprecation_warning=True, **hyperparameters)
        for step in range(STEPS):
            give_gradients(step, ours, theirs)
            for parameter in (*ours, *theirs):
                parameter.grad.mul_(size)  # type: ignore[union-attr]
            one.step()
            other.step()
        return difference(ours, theirs)

    def test_with_its_semantics(self, proj_type: str) -> None:
        """Also of what is not projected."""
        assert self.both(proj_type, 1e-3, 0.1, match_galore_torch=True) < TOLERANCE

    def test_with_its_default_epsilon(self, proj_type: str) -> None:
        """1e-6 counts beside gradients of 1e-5; torch's 1e-8 does not."""
        if proj_type == "full":
            return  # as below: rounding noise, of the size of this epsilon
        assert self.both(proj_type, None, 0.1, size=1e-5, match_galore_torch=True) < TOLERANCE

    def test_ours_differ_in_the_epsilon_and_the_order_of_the_decay_alone(self, proj_type: str) -> None:
        """Torch's AdamW corrects the bias of the denominator before epsilon is added, and decays before the update."""
        if proj_type == "full":
            # Projected from both sides the first gradient is diagonal but for rounding, which no epsilon damps here.
            return
        assert self.both(proj_type, 0.0, 0.0) < TOLERANCE
        assert self.both(proj_type, 1e-3, 0.0) > 10 * TOLERANCE
        assert self.both(proj_type, 0.0, 5.0) > 10 * TOLERANCE

    @pytest.mark.parametrize("scale_parameter", [False, True])
    @pytest.mark.parametrize("beta1", [None, 0.9])
    def test_adafactor(self, proj_type: str, beta1: float | None, scale_parameter: bool) -> None:
        ours, theirs = weights(), weights()
        hyperparameters = {"lr": 1e-2, "beta1": beta1, "weight_decay": 0.1, "scale_parameter": scale_parameter}
        one = GaLoreAdafactor(projected(ours, proj_type, projection="svd"), **hyperparameters)
        other = UpstreamAdafactor(projected(theirs, proj_type), relative_step=False, **hyperparameters)
        for step in range(STEPS):
            give_gradients(step, ours, theirs)
            one.step()
            other.step()
        assert difference(ours, theirs) < TOLERANCE

    def test_adafactor_with_a_relative_step(self, proj_type: str) -> None:
        ours, theirs = weights(), weights()
        options = {"relative_step": True, "warmup_init": True, "scale_parameter": True}
        one = GaLoreAdafactor(projected(ours, proj_type, projection="svd"), **options)
        other = UpstreamAdafactor(projected(theirs, proj_type), **options)
        for step in range(STEPS):
            give_gradients(step, ours, theirs)
            one.step()
            other.step()
        assert difference(ours, theirs) < TOLERANCE


def test_bfloat16_weights_have_the_moments_of_float32_ones_where_galore_torch_rounds_everything() -> None:
    """Deliberate: moments, bases and arithmetic are float32. With a decay of 0.999 bfloat16 moments stop moving."""
    exact, ours, theirs = weights(), weights(dtype=torch.bfloat16), weights(dtype=torch.bfloat16)
    kwargs: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6}
    one, other, upstream = (
        GaLoreAdamW(projected(exact, "std", projection="svd"), **kwargs),
        GaLoreAdamW(projected(ours, "std", projection="svd"), **kwargs),
        UpstreamAdamW(projected(theirs, "std"), no_deprecation_warning=True, **kwargs),
    )
    for step in range(STEPS):
        give_gradients(step, ours, theirs)
        for parameter, half in zip(exact, ours, strict=True):
            parameter.grad = half.grad.float()  # type: ignore[union-attr]
        for optimizer in (one, other, upstream):
            optimizer.step()
    for full, half, rounded in zip(exact, ours, theirs, strict=True):
        moment = one.state[full]["exp_avg_sq"]
        assert torch.equal(other.state[half]["exp_avg_sq"], moment)
        assert (upstream.state[rounded]["exp_avg_sq"] - moment).norm() > 1e-3 * moment.norm()
        # The weights are near: each step is rounded to eight bits on both sides.
        torch.testing.assert_close(half, rounded, rtol=2e-2, atol=1e-2)


def test_the_default_epsilon_is_reported_as_it_trains() -> None:
    def text(**request: Any) -> str:
        return report.describe(resolve(nn.Linear(8, 8), OptimConfig("galore_adamw", **request)), "galore_adamw", "none")

    assert "eps=1e-08," in text()
    assert "eps=1e-06," in text(optim_args="match_galore_torch=true")
    assert "eps=0.001," in text(optim_args="match_galore_torch=true,eps=1e-3")
    patterned = text(param_groups={"weight": {"match_galore_torch": True}})
    assert patterned.count("eps=1e-06") == patterned.count("match_galore_torch=True") == 1


def test_8_bit_moments_follow_float32_ones() -> None:
    full, quantized = (weights(((64, 256), (256, 64), (96,))) for _ in range(2))
    groups = [[*projected(model[:2], "std"), {"params": model[2:]}] for model in (full, quantized)]
    optimizers = [
        GaLoreAdamW(groups[0], lr=1e-2, weight_decay=0.1),
        GaLoreAdamW8bit(groups[1], lr=1e-2, weight_decay=0.1, min_8bit_size=256),
    ]
    assert isinstance(optimizers[1], GaLoreAdamW8bit)
    start = [parameter.detach().clone() for parameter in full]
    for step in range(STEPS):
        give_gradients(step, full, quantized)
        for optimizer in optimizers:
            optimizer.step()
    state = optimizers[1].state
    assert state[quantized[0]]["exp_avg"].dtype is torch.uint8
    # One-dimensional and small states move, too: galore-torch's do not with bitsandbytes 0.50 (its arguments slip).
    assert state[quantized[2]]["exp_avg"].dtype is torch.float32
    for before, one, other in zip(start, full, quantized, strict=True):
        moved = (one - before).norm()
        assert (one - other).norm() < 0.1 * moved
    assert torch.equal(full[2], quantized[2])


def test_8_bit_groups_may_keep_32_bits() -> None:
    (weight,) = weights(((64, 64),))
    optimizer = GaLoreAdamW8bit([{"params": [weight], "optim_bits": 32}], min_8bit_size=0)
    give_gradients(0, [weight])
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].dtype is torch.float32


class TestSubspace:
    @pytest.mark.parametrize("shape", [(200, 300), (300, 200), (256, 256)])
    def test_randomized_captures_what_exact_does(self, shape: tuple[int, int]) -> None:
        generator = torch.Generator().manual_seed(0)
        # A gradient's spectrum: falling, without a gap at the rank.
        left, right = (torch.linalg.qr(torch.randn(side, 200, generator=generator))[0] for side in shape)
        gradient = left * torch.arange(1, 201) ** -0.5 @ right.mT
        exact, randomized = (alone(find_bases(gradient, 32, method)) for method in ("svd", "randomized"))
        for name in ("left", "right"):
            energies = []
            for bases in (exact, randomized):
                basis = bases[name]
                assert torch.allclose(basis.mT @ basis, torch.eye(32), atol=1e-5)
                matrix = gradient if name == "left" else gradient.mT
                energies.append((basis.mT @ matrix).square().sum())
            assert energies[1] > 0.99 * energies[0]

    def test_it_is_found_anew_after_the_gap(self) -> None:
        (weight,) = weights(((32, 24),))
        optimizer = GaLoreAdamW(projected([weight], "std"))
        bases = []
        for step in range(2 * GAP + 1):
            give_gradients(step, [weight])
            optimizer.step()
            bases.append(optimizer.state[weight]["right"])
        changes = [step for step in range(1, len(bases)) if not torch.equal(bases[step], bases[step - 1])]
        assert changes == [GAP, 2 * GAP]

    def test_the_global_generator_is_left_alone(self) -> None:
        (weight,) = weights(((64, 64),))
        optimizer = GaLoreAdamW(projected([weight], "std"))
        give_gradients(0, [weight])
        before = torch.get_rng_state()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_convolution_is_the_matrix_of_its_outputs(self) -> None:
        (filters,) = weights(((16, 3, 5, 5),))
        matrix = filters.detach().flatten(1).clone().requires_grad_()
        optimizers = [GaLoreAdamW(projected([parameter], "std")) for parameter in (filters, matrix)]
        for step in range(3):
            give_gradients(step, [filters])
            matrix.grad = filters.grad.flatten(1)  # type: ignore[union-attr]
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(filters.flatten(1), matrix)

    def test_what_has_one_dimension_is_stepped_as_adamw_steps_it(self) -> None:
        ours, theirs = weights(((12,), ())), weights(((12,), ()))
        one = GaLoreAdamW(projected(ours, "std"), lr=1e-2, weight_decay=0.1)
        other = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, fused=True)
        for step in range(5):
            give_gradients(step, ours, theirs)
            one.step()
            other.step()
        assert difference(ours, theirs) == 0.0

    def test_a_rank_beyond_the_matrix_is_its_full_rank(self) -> None:
        (weight,) = weights(((6, 10),))
        optimizer = GaLoreAdamW([{"params": [weight], "rank": 128}])
        give_gradients(0, [weight])
        optimizer.step()
        assert optimizer.state[weight]["left"].shape == (6, 6)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("rank", 0), ("rank", 2.5), ("update_proj_gap", 0), ("proj_type", "both"), ("projection", "exact")),
            *(("lr", -1.0), ("eps", -1.0), ("betas", (0.9, 1.0)), ("weight_decay", -0.1)),
        ],
    )
    def test_nonsense_is_refused(self, name: str, value: Any) -> None:
        with pytest.raises(InvalidOption, match=name):
            GaLoreAdamW([{"params": weights(), name: value}])


class TestUnusableGradients:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_one_that_is_not_finite_is_not_stepped(self, value: float) -> None:
        params = weights()
        optimizer = GaLoreAdamW(projected(params, "std"))
        for step in range(3):
            give_gradients(step, params)
            optimizer.step()
        before = copy.deepcopy(dict(optimizer.state[params[0]]))
        weight = params[0].detach().clone()
        give_gradients(3, params)
        params[0].grad[1, 2] = value  # type: ignore[index]
        with pytest.warns(RuntimeWarning, match="1 parameters with non-finite gradients were not stepped"):
            optimizer.step()
        state = optimizer.state[params[0]]
        assert torch.equal(params[0], weight)
        assert torch.equal(state["right"], before["right"])
        assert torch.equal(state["exp_avg"], before["exp_avg"])
        assert (state["step"], state["skipped"]) == (3, 1)
        assert optimizer.state[params[1]]["step"] == 4

    def test_a_first_gradient_that_is_not_finite(self) -> None:
        params = weights()
        optimizer = GaLoreAdamW(projected(params, "std"))
        give_gradients(0, params)
        params[0].grad.fill_(math.nan)  # type: ignore[union-attr]
        with pytest.warns(RuntimeWarning, match="not stepped"):
            optimizer.step()
        give_gradients(1, params)
        optimizer.step()
        assert (optimizer.state[params[0]]["step"], optimizer.state[params[0]]["skipped"]) == (1, 1)
        assert all(torch.isfinite(parameter).all() for parameter in params)

    def test_a_large_finite_gradient_whose_norm_overflows_is_stepped(self) -> None:
        params = weights(((4,), (8, 8)))
        optimizer = GaLoreAdamW(projected(params, "std"))
        give_gradients(0, params)
        params[0].grad.fill_(3e38)  # type: ignore[union-attr]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
        assert optimizer.state[params[0]]["step"] == 1

    def test_a_failed_decomposition_keeps_the_last_projection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        params = weights()
        optimizer = GaLoreAdamW(projected(params, "std"))
        for step in range(GAP):
            give_gradients(step, params)
            optimizer.step()
        bases = [basis_of(optimizer.state[parameter]) for parameter in params]

        def fails(*_: Any) -> None:
            raise torch.linalg.LinAlgError("did not converge")

        monkeypatch.setattr(low_rank, "find_bases", fails)
        before = [parameter.detach().clone() for parameter in params]
        give_gradients(GAP, params)
        with pytest.warns(RuntimeWarning, match="its last projection stays"):
            optimizer.step()
        for parameter, basis, old in zip(params, bases, before, strict=True):
            state = optimizer.state[parameter]
            assert state["kept"] == 1
            assert torch.equal(basis_of(state), basis)
            assert not torch.equal(parameter, old)

    @pytest.mark.parametrize("raises", [True, False])
    def test_a_first_decomposition_that_fails_takes_any_projection(
        self, raises: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        params = weights(((16, 16), (16, 16)))
        optimizer = GaLoreAdamW(projected(params, "std"))

        def fails(gradient: Tensor, rank: int, *_: Any) -> Together[dict[str, Tensor]]:
            yield []
            if raises:
                raise torch.linalg.LinAlgError("did not converge")
            return {name: torch.full((16, rank), math.nan) for name in ("left", "right")}

        monkeypatch.setattr(low_rank, "find_bases", fails)
        give_gradients(0, params)
        with pytest.warns(RuntimeWarning, match="decomposition"):
            optimizer.step()
        for parameter in params:
            basis = optimizer.state[parameter]["right"]
            assert torch.allclose(basis.mT @ basis, torch.eye(RANK), atol=1e-5)
            assert torch.isfinite(parameter).all()

    def test_a_zero_gradient_decides_no_subspace(self) -> None:
        """Outputs that start at zero and experts without tokens have one; the next gradient that is none decides."""
        (weight,) = weights(((16, 16),))
        optimizer = GaLoreAdamW(projected([weight], "std"))
        bases = []
        for step in range(4):
            give_gradients(step, [weight])
            if step < 2:
                weight.grad = torch.zeros_like(weight)
            optimizer.step()
            bases.append(optimizer.state[weight]["right"])
        assert torch.equal(bases[0], bases[1])
        assert not torch.equal(bases[1], bases[2])
        assert torch.equal(bases[2], bases[3])
        assert optimizer.state[weight]["found"] is True

    @pytest.mark.parametrize("change", [{"rank": 8}, {"rank": 2}, {"proj_type": "left"}])
    def test_a_rank_changed_after_the_first_step_is_refused(self, change: dict[str, Any]) -> None:
        """The kernels would write beyond the moments."""
        for cls in (GaLoreAdamW, GaLoreAdamW8bit):
            (weight,) = weights(((64, 48),))
            optimizer = cls([{"params": [weight], "rank": RANK, "update_proj_gap": 1}])
            give_gradients(0, [weight])
            optimizer.step()
            optimizer.param_groups[0].update(change)
            with pytest.raises(InvalidOption, match="rank or proj_type was changed after the first step"):
                optimizer.step()

    def test_the_state_of_other_shapes_is_refused(self) -> None:
        small, large = weights(((64, 48), (5,))), weights(((640, 480), (50,)))
        saved = GaLoreAdamW(projected(small, "std"))
        give_gradients(0, small)
        saved.step()
        optimizer = GaLoreAdamW(projected(large, "std"))
        optimizer.load_state_dict(saved.state_dict())
        give_gradients(0, large)
        with pytest.raises((InvalidOption, RuntimeError)):
            optimizer.step()


@pytest.mark.parametrize("shape", [(1024, 1024), (512, 2048), (2048, 512)])
def test_state_bytes_are_the_papers(shape: tuple[int, int]) -> None:
    """Table 1 of the paper: ``mr + 2nr`` elements for ``m <= n``; Adafactor keeps one factored moment instead."""
    rank, element = 128, 4
    m, n = min(shape), max(shape)
    model = nn.Linear(shape[1], shape[0], bias=False)
    formulas = {
        "galore_adamw": (m * rank + 2 * n * rank) * element,
        "galore_adamw_8bit": m * rank * element + 2 * n * rank * (1 + 4 / 256),
        "galore_adafactor": (m * rank + n + rank) * element,
    }
    for name, formula in formulas.items():
        spec = REGISTRY[name]
        optimizer = build_optimizer(model, name, optim_args={"rank": rank})
        model.weight.grad = torch.randn_like(model.weight)
        optimizer.step()
        measured = measured_bytes(optimizer.state_dict())
        assert measured == pytest.approx(formula, rel=0.01)
        assert state_bytes(spec, spec.options(rank=rank), optimizer.param_groups) == measured  # type: ignore[call-arg]
