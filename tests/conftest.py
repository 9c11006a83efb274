"""What all tests share."""

from __future__ import annotations

import warnings

import pytest
import torch

# Small models are faster so, and sums do not depend on the machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """Silences what libraries say about this machine (few workers, no GPU), not about the code under test."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching.*")
