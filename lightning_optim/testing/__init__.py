"""The contract of an optimizer as functions, one for each promise, and what holds a class, a name or a row to it.

Public: it needs no test framework. The tests of this package hold the table's rows to the same functions.
"""

from __future__ import annotations

from lightning_optim.testing._broken import BrokenPromise, NotSaid
from lightning_optim.testing._check import PROMISES, Result, check_optimizer, check_results, held
from lightning_optim.testing._subject import Subject
from lightning_optim.testing._trial import Shapes, Tokens, Trial

__all__ = [
    "PROMISES",
    "BrokenPromise",
    "NotSaid",
    "Result",
    "Shapes",
    "Subject",
    "Tokens",
    "Trial",
    "check_optimizer",
    "check_results",
    "held",
]
