"""The promise that stepping during backward is stepping."""

from __future__ import annotations

from lightning_optim.layerwise import probe
from lightning_optim.table import SUFFIX
from lightning_optim.testing._broken import difference, expect
from lightning_optim.testing._subject import Subject


def layerwise(subject: Subject) -> str | None:
    """Stepped during backward, bucket by bucket, it gives the same bits."""
    if subject.name.endswith(SUFFIX):
        other = subject.name.removesuffix(SUFFIX)
    else:
        other = subject.row.implementation if subject.row.layerwise else subject.name + SUFFIX
    one, same = subject.trial(), Subject(other, subject.arguments).trial()
    for trial in (one, same):
        trial.advance(range(6), lambda index, step: (index + step) % 5 == 0)
    found = difference(same.weights(), one.weights())
    if found and probe(one.optimizer).verdict == "random":
        return "its random numbers depend on the order of the parameters"
    expect(not found, "the same bits in both forms", found)
    return None
