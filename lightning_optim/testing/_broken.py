"""How a promise says that it does not hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lightning_optim.errors import said


class BrokenPromise(AssertionError):
    """An optimizer does not do what its users rely on.

    Args:
        expected: What was to happen.
        happened: What happened.
        optim: The optimizer; empty until it is known whose promise it is.
        promise: The promise.
    """

    def __init__(self, expected: str, happened: str, optim: str = "", promise: str = "") -> None:
        whose = f"optim={optim!r} breaks the promise {promise!r}: " if promise else ""
        super().__init__(f"{whose}expected {expected}; {happened}")
        self.expected, self.happened, self.optim, self.promise = expected, happened, optim, promise


class NotSaid(Exception):
    """The row says nothing that could be compared; the text says what is missing."""


def expect(holds: bool, expected: str, happened: str) -> None:
    """Raises :class:`BrokenPromise` unless ``holds``."""
    if not holds:
        raise BrokenPromise(expected, happened)


def expect_same(left: Any, right: Any, expected: str) -> None:
    """Raises :class:`BrokenPromise` unless both are the same, tensors bit for bit and of the same dtype."""
    where = difference(left, right)
    expect(not where, expected, where)


@contextmanager
def expecting(what: str) -> Iterator[None]:
    """Raises :class:`BrokenPromise` if something else is raised inside: here a refusal is none."""
    try:
        yield
    except BrokenPromise:
        raise
    except CheckpointException as error:
        # No Exception, and its text has all stacks: of the processes there is one.
        cause = next((failure for failure, _ in error.failures.values()), error)
        raise BrokenPromise(what, f"{type(cause).__name__}: {said(cause)}") from error
    except Exception as error:
        raise BrokenPromise(what, f"{type(error).__name__}: {said(error)}") from error


def difference(left: Any, right: Any, where: str = "") -> str:
    """Returns the first place where two nested values differ, or an empty text."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.dtype is not right.dtype or left.shape != right.shape:
            return f"{where} is {_kind(left)} instead of {_kind(right)}"
        if torch.equal(left, right) or torch.allclose(left, right, rtol=0, atol=0, equal_nan=True):
            return ""
        return f"{where} differs by {float((left.detach().double() - right.detach().double()).abs().max()):.3g}"
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return f"{where} has {sorted(map(str, left))} instead of {sorted(map(str, right))}"
        found = (difference(left[key], right[key], f"{where}[{key!r}]" if where else str(key)) for key in left)
        return next(filter(None, found), "")
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        if len(left) != len(right):
            return f"{where} has {len(left)} items instead of {len(right)}"
        pairs = enumerate(zip(left, right, strict=True))
        return next(filter(None, (difference(one, other, f"{where}[{i}]") for i, (one, other) in pairs)), "")
    if type(left) is type(right) and (left == right or (left != left and right != right)):
        return ""
    return f"{where} is {left!r} instead of {right!r}"


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
