"""The classes step as the algorithms are published, and the references that say how stay short enough to be read."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_optim import REGISTRY
from tests.optimizers import references
from tests.optimizers.test_own_optimizers import EXPECTED

ANY = ((7,), (12, 20), (20, 12), (3, 6, 5))
MATRICES = ((12, 20), (20, 12), (9, 9))
#: Matrices that Muon stacks, and others.
STACKED = (*MATRICES, (16, 24), (24, 16))
STEPS = 12
SUBSPACE = {"rank": 4, "update_proj_gap": 5, "scale": 0.5}
SVD = {**SUBSPACE, "projection": "svd"}
MOMENTS = {"betas": (0.8, 0.95), "eps": 1e-3}
MINI = {"rank": 1, "update_proj_gap": 5, "scale": 128.0, "scale_type": "tensor", "norm_growth_limit": None}
GROK = {**MOMENTS, "alpha_init": 0.9, "lamb": 1.5, "gamma": 0.2, "grokking_signal_decay_rate": 0.3}

MUON = {"momentum": 0.8, "ns_steps": 4, "ns_coefficients": (3.0, -3.2, 1.2)}

CASES: tuple[tuple[str, tuple[tuple[int, ...], ...], dict[str, Any]], ...] = (
    ("lomo", ANY, {}),
    ("adafactor", ANY, {}),
    ("adafactor", ANY, {"eps": (1e-8, 0.5), "clip_threshold": 0.9, "decay_rate": -0.7, "beta1": 0.9}),
    ("adafactor", ANY, {"lr": 1.0, "scale_parameter": True, "relative_step": True, "beta1": 0.8}),
    ("adafactor", ANY, {"lr": 1e3, "relative_step": True, "warmup_init": True}),
    ("adalomo", ANY, {}),
    ("adalomo", ANY, {"eps": (1e-30, 2.0), "clip_threshold": 0.9, "decay_rate": -0.7}),
    ("galore_adamw", MATRICES, {**SVD, **MOMENTS}),
    ("galore_adafactor", MATRICES, {**SVD, "clip_threshold": 0.9}),
    ("apollo_adamw", MATRICES, {**SUBSPACE, **MOMENTS, "seed": 7}),
    ("apollo_adamw", MATRICES, {**SUBSPACE, **MOMENTS, "norm_growth_limit": None}),
    ("apollo_adamw", MATRICES, {**MINI, **MOMENTS}),
    ("apollo_adamw", MATRICES, {**MINI, **MOMENTS, "norm_growth_limit": 1.01}),
    ("grokadamw", ANY, GROK),
    ("grokadamw", ANY, {**GROK, "train_loss": 0.5, "eval_loss": 2.0}),
    ("adopt", ANY, {}),
    ("adopt", ANY, {**MOMENTS, "clip_exp": None}),
    ("adan", ANY, {}),
    ("adan", ANY, {"betas": (0.8, 0.7, 0.95), "eps": 1e-3, "no_prox": True}),
    ("adam_mini", ANY, {}),
    ("adam_mini", ANY[1:], {**MOMENTS, "blocks": 3}),
    ("came", ANY, {}),
    ("came", ANY, {"betas": (0.8, 0.95, 0.9), "eps": (1e-8, 1e-4), "clip_threshold": 0.9}),
    ("lamb", ANY, {}),
    ("lamb", ANY, {**MOMENTS, "adapt": "all", "trust_clip": True}),
    ("lars", ANY, {"trust_coeff": 0.1}),
    ("lars", ANY, {"lr": 10.0, "momentum": 0.8, "adapt": "all", "nesterov": True}),
    ("lars", ANY, {"momentum": 0.0, "adapt": "none"}),
    ("muon", STACKED, {}),
    ("muon", STACKED, {**MUON, "nesterov": False, "lr_scale": "match_rms_adamw", "cautious": True}),
    ("normuon", STACKED, {**MUON, "beta2": 0.7}),
    ("soap", MATRICES, {}),
    ("soap", MATRICES, {**MOMENTS, "shampoo_beta": 0.9, "precondition_frequency": 3}),
    ("scale", MATRICES, {}),
    ("scale", MATRICES, {"momentum": 0.8}),
    ("scale", MATRICES, {"momentum": 0.8, "outputs": "columns"}),
)
#: A test of its own, bit for bit, for every combination of dtypes: test_anyprecision.py.
#: And one that couples its parameters: test_more_optimizers.py.
ELSEWHERE = {"adamw_anyprecision", "prodigy"}
#: No reference of its own: galore_adamw's moments in fewer bits, which test_galore.py compares with those.
QUANTIZED = {"galore_adamw_8bit"}
#: apollo_adamw with other defaults.
DEFAULTS = {"apollo_mini"}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize(("name", "shapes", "options"), CASES, ids=str)
def test_equals_the_reference(
    name: str, shapes: tuple[tuple[int, ...], ...], options: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    """Two parameters of each shape, which the class batches."""
    starts = [torch.randn(shape, dtype=dtype) for shape in shapes * 2]
    gradients = [[torch.randn_like(start) * (1 + step % 3) for step in range(STEPS)] for start in starts]
    params = [start.clone().requires_grad_() for start in starts]
    optimizer = REGISTRY[name].load()([{"params": params, "lr": 1e-2, "weight_decay": 0.1, **options}])
    for step in range(STEPS):
        for parameter, own in zip(params, gradients, strict=True):
            parameter.grad = own[step]
        optimizer.step()
    reference = getattr(references, name)
    for position, parameter in enumerate(params):
        group = SimpleNamespace(**optimizer.param_groups[0], position=position)
        expected = reference(starts[position], gradients[position], group)
        torch.testing.assert_close(parameter.detach(), expected, rtol=tolerance, atol=tolerance)
        assert not torch.allclose(expected, starts[position], rtol=0, atol=1e-2)


def test_every_algorithm_that_we_own_has_a_reference() -> None:
    assert {name for name, *_ in CASES} | ELSEWHERE | QUANTIZED | DEFAULTS == EXPECTED
    assert all(hasattr(references, name) for name in EXPECTED - QUANTIZED - DEFAULTS)


def test_references_have_at_most_25_lines() -> None:
    lines = {
        name: len(inspect.getsource(value).splitlines())
        for name, value in vars(references).items()
        if inspect.isroutine(value) and value.__module__ == references.__name__
    }
    assert lines.keys() >= EXPECTED - QUANTIZED - DEFAULTS
    assert {name: count for name, count in lines.items() if count > 25} == {}
