"""Classes named in code are imported; those that only a file names are not.

``load_from_checkpoint`` makes a module from arguments in a file. A dotted path among them would import, and so run, a
module chosen by whoever wrote the file. Lightning guards its own instantiators in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from lightning_optim.errors import UntrustedOptimizer
from lightning_optim.table import collection_of


@dataclass
class _Reading:
    """A file being read: words from the caller's code, and words from the file."""

    said: frozenset[str]
    held: set[str] = field(default_factory=set)


_reading: ContextVar[_Reading | None] = ContextVar("lightning_optim_reading", default=None)


@contextmanager
def reading(said: Any = (), held: Any = ()) -> Iterator[None]:
    """Names that only a file holds are not imported inside this context.

    Args:
        said: The caller's own arguments, whose words are trusted.
        held: What the file holds, if known in advance.
    """
    token = _reading.set(_Reading(frozenset(words(said)), set(words(held))))
    try:
        yield
    finally:
        _reading.reset(token)


def is_reading() -> bool:
    """Whether a file is being read."""
    return _reading.get() is not None


def note(arguments: Any) -> None:
    """Records what came from the file being read."""
    current = _reading.get()
    assert current is not None, "note() outside of reading()"
    current.held.update(words(arguments))


def only_a_file_says(word: str) -> bool:
    """Whether a word came from the file being read, and not from the caller."""
    current = _reading.get()
    return current is not None and word in current.held - current.said


def is_imported(path: str) -> bool:
    """Whether the class that a dotted path or short name means is already imported, so that finding it runs nothing."""
    collection = collection_of(path)
    if collection is not None:
        return collection.module in sys.modules
    module, _, name = path.rpartition(".")
    return name in vars(sys.modules.get(module, object))


def refusal(path: str) -> UntrustedOptimizer:
    """Returns the error for an optimizer that only a file names."""
    collection = collection_of(path)
    module = collection.module if collection else path.rpartition(".")[0]
    return UntrustedOptimizer(
        f"optim={path!r} is named by the checkpoint alone, and is not imported: that would run whatever the module "
        f"{module!r} holds. If you trust the checkpoint, name it yourself, "
        f"load_from_checkpoint(path, optim={path!r}) or --model.optim {path}, or import the module before.",
        code="LO110",
    )


def words(value: Any) -> Iterator[str]:
    """Yields the strings in nested mappings, lists and other iterables."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from words(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from words(item)
