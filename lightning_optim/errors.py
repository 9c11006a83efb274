"""The errors users see. Each text names what was passed, what is allowed and what to type instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnknownOptimizer(ValueError, KeyError):
    """The identifier is not in the table, no plugin provides it and it is not an importable dotted path."""

    # A KeyError would show its text as a quoted string.
    __str__ = ValueError.__str__


class UnknownSchedule(ValueError):
    """The learning-rate schedule is not one of the names of :mod:`lightning_optim.build._schedules`."""


class UntrustedOptimizer(ValueError):
    """Only a checkpoint names the optimizer's class, and importing it would run untrusted code."""


class UnreadableCheckpoint(ValueError):
    """A checkpoint is cut off, changed, not finished, no checkpoint at all, or holds what would be run."""


class InvalidOption(ValueError):
    """A hyperparameter has an unknown name, the wrong type or a value out of range."""


class InvalidParamGroups(ValueError):
    """The parameters cannot be grouped as requested: nothing matches, nothing trains, two rules conflict."""


class DuplicateOptimizer(ValueError):
    """An identifier was registered twice."""


class MissingDependency(ImportError):
    """The package an identifier needs is absent, too old or known to be wrong."""


class IncompatibleTrainer(ValueError):
    """Model, Trainer and optimizer cannot work together; raised before the first batch."""


def close_names(name: str, known: Iterable[str], limit: int = 5) -> list[str]:
    """Returns up to ``limit`` of the ``known`` names that a user who typed ``name`` may have meant.

    Names that begin with ``name`` come first, the shortest first; then similar spellings; then names that share the
    most ``_``-separated words with it, where words of four or more letters match if one contains the other.
    """
    known = sorted(known)
    begun = sorted((other for other in known if name and other.startswith(name.lower())), key=len)
    similar = difflib.get_close_matches(name.lower(), known, n=limit, cutoff=0.6)
    words = name.lower().replace("-", "_").split("_")
    shared = {
        other: sum(any(_akin(word, part) for part in other.lower().split("_")) for word in words) for other in known
    }
    related = [other for other in sorted(known, key=lambda other: -shared[other]) if shared[other]]
    return list(dict.fromkeys(begun + similar + related))[:limit]


def _akin(word: str, other: str) -> bool:
    return word == other or (min(len(word), len(other)) > 3 and (word in other or other in word))


def listing(names: Iterable[str]) -> str:
    """Formats names for an error text."""
    return ", ".join(repr(name) for name in names)
