"""Stepped during backward, nothing of the collections differs in silence."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
from torch import nn

from lightning_optim import REGISTRY, IncompatibleTrainer, build_optimizer
from lightning_optim.table import COLLECTIONS
from lightning_optim.testing import held

COUPLED = {
    "pytorch_optimizer.AdaGC": {},
    "pytorch_optimizer.Adai": {},
    "pytorch_optimizer.AdamS": {"weight_decay": 0.1},
    "pytorch_optimizer.MADGRAD": {},
    "pytorch_optimizer.SPAM": {},
    "timm.optim.Lamb": {},
}
RANDOM = ("pytorch_optimizer.Gravity", "pytorch_optimizer.Kron", "timm.optim.kron.Kron")


def needs_package(path: str) -> None:
    """Skips where a collection is not installed; one that is and cannot be imported fails the test."""
    package = path.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed here: `make test-collections` has an environment with it")


@pytest.mark.parametrize("path", COUPLED)
def test_coupled_ones_are_refused(path: str) -> None:
    needs_package(path)
    with pytest.raises(IncompatibleTrainer, match="cannot be stepped layer by layer"):
        build_optimizer(nn.Linear(8, 8), f"{path}_layerwise", lr=1e-2, **COUPLED[path])


@pytest.mark.parametrize("path", RANDOM)
def test_random_ones_are_told(path: str) -> None:
    needs_package(path)
    with pytest.warns(UserWarning, match="draws random numbers while it steps"):
        build_optimizer(nn.Linear(8, 8), f"{path}_layerwise", lr=1e-2)


def test_an_option_decides_in_lamb() -> None:
    needs_package("timm.optim.Lamb")
    build_optimizer(nn.Linear(8, 8), "timm.optim.Lamb_layerwise", lr=1e-2, optim_args={"max_grad_norm": None})


@pytest.mark.parametrize("path", [*COUPLED, *RANDOM, "pytorch_optimizer.DASH", "pytorch_optimizer.SOAP"])
def test_layerwise_is_kept_or_refused(path: str) -> None:
    needs_package(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (result,) = held(path, {"lr": 1e-2}, promises=["layerwise"])
    assert result.status == ("refused" if path in COUPLED else "kept"), result.text
    assert ("random numbers" in result.text) == (path in RANDOM)
    # Its inverse roots amplify rounding.
    assert ("rounded otherwise" in result.text) <= (path == "pytorch_optimizer.DASH")


@pytest.mark.parametrize(
    ("name", "path", "least"),
    [("timm:lamb", "timm.optim.Lamb", 60), ("pytorch_optimizer:soap", "pytorch_optimizer.SOAP", 120)],
)
def test_short_names_mean_classes(name: str, path: str, least: int) -> None:
    needs_package(path)
    row = REGISTRY.find(name)
    assert row.implementation == path
    assert len(COLLECTIONS[name.partition(":")[0]].members(name)) > least
    build_optimizer(nn.Linear(8, 8), name, lr=1e-2)
