"""The errors users see. Each says what was passed, what is allowed and what to type instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnknownOptimizer(ValueError):
    """The identifier is not in the table, no plugin provides it and it is no importable dotted path."""


class UnknownSchedule(ValueError):
    """The learning-rate schedule is not one of the names of :mod:`lightning_optim.schedules`."""


class InvalidOption(ValueError):
    """A hyperparameter has an unknown name, the wrong type or a value out of range."""


class InvalidParamGroups(ValueError):
    """The parameters cannot be grouped as asked: nothing matches, nothing trains, two rules collide."""


class DuplicateOptimizer(ValueError):
    """An identifier was registered twice."""


class MissingDependency(ImportError):
    """The package an identifier needs is absent, too old or known to be wrong."""


class IncompatibleTrainer(ValueError):
    """Model, Trainer and optimizer cannot work together; raised before the first batch."""


def close_names(name: str, known: Iterable[str], limit: int = 5) -> list[str]:
    """Returns up to ``limit`` of the ``known`` names that a user who typed ``name`` may have meant.

    Similar spellings come first, then names that share the most ``_``-separated words with ``name``.
    """
    known = sorted(known)
    similar = difflib.get_close_matches(name.lower(), known, n=limit, cutoff=0.6)
    words = set(name.lower().replace("-", "_").split("_"))
    shared = sorted(known, key=lambda other: -len(words & set(other.split("_"))))
    related = [other for other in shared if words & set(other.split("_")) and other not in similar]
    return (similar + related)[:limit]


def listing(names: Iterable[str]) -> str:
    """Formats names for an error text."""
    return ", ".join(repr(name) for name in names)
