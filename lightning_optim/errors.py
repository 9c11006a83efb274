"""The errors users see. Each text names what was passed, what is allowed and what to type instead.

Each error carries the code of its entry in ``docs/refusals.md``, which ``lightning-optim explain CODE`` prints too. The
entries are in :mod:`lightning_optim.refusals`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TypeVar


class Refused(Exception):
    """What the errors have in common: a text, and codes that lead to more about it.

    A code is given where the error is raised. Without one, as where a plugin raises it, it is that of the class.

    Attributes:
        codes: The codes, several where several things are wrong.
    """

    codes: tuple[str, ...] = ()

    def __init__(self, text: str = "", *, code: str | Sequence[str] = ()) -> None:
        super().__init__(text)
        if code:
            self.codes = (code,) if isinstance(code, str) else tuple(code)

    @property
    def text(self) -> str:
        """The text without the line that leads to more."""
        # ImportError and KeyError have forms of their own.
        return BaseException.__str__(self)

    def __str__(self) -> str:
        return f"{self.text}\nSee: lightning-optim explain {' '.join(self.codes)}"


class UnknownOptimizer(Refused, ValueError, KeyError):
    """The identifier is not in the table, no plugin provides it and it is not an importable dotted path."""

    codes = ("LO101",)


class UnknownSchedule(Refused, ValueError):
    """The learning-rate schedule is not one of the names of :mod:`lightning_optim.build._schedules`."""

    codes = ("LO108",)


class UntrustedOptimizer(Refused, ValueError):
    """Only a checkpoint names the optimizer's class, and importing it would run untrusted code."""

    codes = ("LO110",)


class UnreadableCheckpoint(Refused, ValueError):
    """A checkpoint is cut off, changed, not finished, no checkpoint at all, or holds what would be run."""

    codes = ("LO801",)


class InvalidOption(Refused, ValueError):
    """A hyperparameter has an unknown name, the wrong type or a value out of range."""

    codes = ("LO200",)


class InvalidParamGroups(Refused, ValueError):
    """The parameters cannot be grouped as requested: nothing matches, nothing trains, two rules conflict."""

    codes = ("LO300",)


class DuplicateOptimizer(Refused, ValueError):
    """An identifier was registered twice."""

    codes = ("LO109",)


class MissingDependency(Refused, ImportError):
    """The package an identifier needs is absent, too old or known to be wrong."""

    codes = ("LO107",)


class IncompatibleTrainer(Refused, ValueError):
    """Model, Trainer and optimizer cannot work together; raised before the first batch."""

    codes = ("LO400",)


_Error = TypeVar("_Error", bound=Refused)


def joined(errors: Sequence[_Error], head: str = "") -> _Error:
    """Returns several errors as one of the first's class: a line each, with its code; a single one as it is."""
    lines = dict.fromkeys(line for error in errors for line in _coded(error))
    if len(lines) == 1 and not head:
        return errors[0]
    codes = tuple(dict.fromkeys(code for error in errors for code in error.codes))
    return type(errors[0])("\n".join([head, *lines] if head else lines), code=codes)


def _coded(error: Refused) -> list[str]:
    # Joined before, its lines have their codes already.
    return error.text.splitlines() if len(error.codes) > 1 else [f"{error.text} [{error.codes[0]}]"]


def said(error: BaseException) -> str:
    """Returns an error's text, of one of ours without the line that leads to more."""
    return error.text if isinstance(error, Refused) else str(error)


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
