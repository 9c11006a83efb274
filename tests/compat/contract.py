"""What a contract test says when a version of another package has moved something."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# The distribution of a door, where it is not of the door's name.
_DISTRIBUTIONS = {"kernels": "torch", "fake": "torch", "shards": "torch", "dcp": "torch"}


@contextmanager
def relied_on(name: str, needed_by: str) -> Iterator[Any]:
    """Yields what ``name`` ("door.function") names in ``_compat``; what goes wrong inside tells what to mend.

    Args:
        name: What the test is about.
        needed_by: What of ours does not work without it.
    """
    door, _, function = name.partition(".")
    try:
        yield getattr(importlib.import_module(f"lightning_optim._compat.{door}"), function)
    except Exception as error:
        distribution = _DISTRIBUTIONS.get(door, door)
        # Without what pytest adds to a bare assertion.
        what = str(error).partition("\n")[0]
        pytest.fail(
            f"{distribution} {importlib.metadata.version(distribution)} is not what lightning_optim relies on: "
            f"{type(error).__name__}: {what}\nMend {function} in lightning_optim/_compat/{door}.py; {needed_by} "
            "needs it.",
            pytrace=False,
        )
