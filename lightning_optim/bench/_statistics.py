"""How sure a difference is, and how well two orders agree."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchmetrics.functional.regression import spearman_corrcoef

CONFIDENCE = 0.95
# Two are always in the same order or in the opposite one.
_FEWEST = 3


@dataclass(frozen=True)
class Interval:
    """The mean of paired differences, and between which values the true mean lies."""

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference is more than chance would explain."""
        return self.low > 0 or self.high < 0


def paired(one: Sequence[float], other: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Returns Student's t-interval of the mean of ``one - other``, pair by pair.

    What two runs of a pair share, initial weights and batches, cancels.

    Args:
        one: A value per pair.
        other: The values to compare with, in the same order.
        confidence: How often such an interval holds the true mean.
    """
    differences = [mine - theirs for mine, theirs in zip(one, other, strict=True)]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = student_quantile((1 + confidence) / 2, len(differences) - 1) * error
    return Interval(mean, mean - half, mean + half, len(differences))


def student_quantile(probability: float, degrees: int) -> float:
    """Returns the quantile of Student's distribution, of at least 0.5, for a whole number of degrees of freedom.

    torch has none, and SciPy is no dependency of this package. For whole degrees the distribution function is a finite
    sum (Abramowitz and Stegun, 26.7.3 and 26.7.4) in the angle ``atan(t / sqrt(degrees))``, found here by bisection.
    """
    within = 2 * probability - 1
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _within(middle, degrees) < within else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """Returns how probable a smaller absolute value than that of ``angle`` is."""
    cosine = math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Returns Spearman's correlation, 1 for the same order and -1 for the opposite.

    ``None`` where an order says nothing: of fewer than three, or of equal values.
    """
    if len(one) < _FEWEST or len(set(one)) < 2 or len(set(other)) < 2:
        return None
    first, second = (torch.tensor(values, dtype=torch.float64) for values in (one, other))
    return float(spearman_corrcoef(first, second))
