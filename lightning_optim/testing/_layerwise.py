"""The promise that stepping during backward is stepping."""

from __future__ import annotations

from lightning_optim.layerwise import probe
from lightning_optim.table import SUFFIX
from lightning_optim.testing._broken import difference, expect
from lightning_optim.testing._subject import Subject
from lightning_optim.testing._trial import Trial

_STEPS = 6
# By how much, at most, elements of gradients are changed to see what rounding does in an algorithm that amplifies it,
# and how many times that is rounding, too.
_NUDGE, _AS_MUCH = 1e-6, 10


def layerwise(subject: Subject) -> str | None:
    """Stepped during backward, bucket by bucket, it gives the same bits."""
    if subject.name.endswith(SUFFIX):
        other = subject.name.removesuffix(SUFFIX)
    else:
        other = subject.row.implementation if subject.row.layerwise else subject.name + SUFFIX
    one, same = subject.trial(), Subject(other, subject.arguments).trial()
    for trial in (one, same):
        trial.advance(range(_STEPS), _missing)
    found = difference(same.weights(), one.weights())
    if not found:
        return None
    if probe(one.optimizer).verdict == "random":
        return "its random numbers depend on the order of the parameters"
    nudged = subject.trial()
    nudged.nudge = _NUDGE
    nudged.advance(range(_STEPS), _missing)
    rounding = _gap(nudged, one)
    expect(_gap(same, one) <= _AS_MUCH * rounding, "the same bits in both forms", found)
    return f"{found}, as if gradients were rounded otherwise"


def _missing(index: int, step: int) -> bool:
    return (index + step) % 5 == 0


def _gap(one: Trial, other: Trial) -> float:
    pairs = zip(one.weights().values(), other.weights().values(), strict=True)
    return max(float((left - right).abs().max()) for left, right in pairs)
