"""What all tests share."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

# Small models are faster so, and sums do not depend on the machine. Processes that tests start inherit the variable:
# two of them with two threads each spend most of their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
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


@pytest.fixture(autouse=True)
def _no_overrides_left() -> Iterator[None]:
    """Undoes what a test told bitsandbytes' manager, which upstream's optimizers ask in the whole process."""
    yield
    # A test may have taken it away, or put something else in its place.
    manager = getattr(sys.modules.get("bitsandbytes.optim"), "GlobalOptimManager", None)
    if manager:
        manager.get_instance().initialize()


@pytest.fixture(autouse=True)
def _no_process_group_left() -> Iterator[None]:
    """Undoes what Lightning leaves behind: with its environment a subprocess would take itself for a rank.

    Its ddp also raises the number of threads, and sums would differ from those before.
    """
    yield
    torch.set_num_threads(1)
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
