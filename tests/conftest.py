"""What all tests share."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.cases import BY_NAME


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """Silences what libraries say about this machine (few workers, no GPU), not about the code under test."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching.*")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the torchao tests in one worker: what it compiles once serves them all."""
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("name")
        if isinstance(name, str) and name in BY_NAME and "torchao" in BY_NAME[name].upstream:
            item.add_marker(pytest.mark.xdist_group("torchao"))
