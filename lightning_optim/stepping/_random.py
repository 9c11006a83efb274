"""Random numbers for trials: the same every time, and those of the program left alone."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.optim import Optimizer


def seed(number: int, optimizer: Optimizer | None = None) -> None:
    """Seeds all that an optimizer may draw from.

    Not by ``torch.manual_seed``: for each kind of device that is not in use that notes where it was called from.
    """
    torch.default_generator.manual_seed(number)
    if _uses_cuda():
        torch.cuda.manual_seed_all(number)
    random.seed(number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number)
    for value in vars(optimizer).values() if optimizer is not None else ():
        if isinstance(value, torch.Generator):
            value.manual_seed(number)
        elif isinstance(value, random.Random):
            value.seed(number)


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leaves the program's random numbers alone, and compiles nothing, which would take longer than a trial."""
    numpy = sys.modules.get("numpy")
    drawn, drawn_by_numpy = random.getstate(), numpy.random.get_state() if numpy else None
    devices = range(torch.cuda.device_count()) if _uses_cuda() else ()
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), torch.enable_grad():
        try:
            yield
        finally:
            random.setstate(drawn)
            if numpy:
                numpy.random.set_state(drawn_by_numpy)
