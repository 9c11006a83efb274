"""Histograms that are counted on the device and added up over parameters and processes."""

from __future__ import annotations

import torch
from torch import Tensor

# Powers of two between which elements are counted, for each sign; what is smaller counts as 0.
_LOWEST, _HIGHEST = -40, 24
_POWERS = range(_LOWEST, _HIGHEST + 1)
_ZERO = len(_POWERS)
_BINS = 2 * len(_POWERS) + 1
# Elements that are converted at once.
_BLOCK = 2**22

#: The upper edges of the bins.
LIMITS = [
    *(-(2.0 ** (power - 1)) for power in reversed(_POWERS)),
    2.0 ** (_LOWEST - 1),
    *(2.0**power for power in _POWERS),
]


class Histograms:
    """Counts of elements between powers of two, by what they are and whose.

    A tensor holds the count of each bin, then the sum and the sum of squares.
    """

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Tensor] = {}

    def add(self, what: str, unit: str, values: Tensor, share: float) -> None:
        """Adds a tensor's finite elements; ``share`` is their weight in the sum over all processes."""
        key = what, unit
        if key not in self.counts:
            self.counts[key] = torch.zeros(_BINS + 2, dtype=torch.float32, device=values.device)
        counts = self.counts[key]
        for block in torch.split(values.reshape(-1), _BLOCK):
            block = block.float()
            finite = block.isfinite()
            block = torch.where(finite, block, 0.0)
            power = torch.frexp(block).exponent.clamp(max=_HIGHEST) - (_LOWEST - 1)
            place = torch.where((power < 1) | (block == 0), 0, power) * block.sign().int() + _ZERO
            added = torch.zeros_like(counts[:_BINS]).scatter_add_(0, place.long(), finite.float())
            counts += share * torch.cat([added, block.sum().view(1), block.square().sum().view(1)]).to(counts.device)


def summary(counts: list[float]) -> dict[str, object]:
    """Returns what ``SummaryWriter.add_histogram_raw`` takes."""
    bins, (total, squares) = counts[:_BINS], counts[_BINS:]
    filled = [number for number, count in enumerate(bins) if count]
    first, last = (filled[0], filled[-1]) if filled else (_ZERO, _ZERO)
    return {
        "min": LIMITS[first - 1] if first else 2 * LIMITS[0],
        "max": LIMITS[last],
        "num": sum(bins),
        "sum": total,
        "sum_squares": squares,
        "bucket_limits": LIMITS,
        "bucket_counts": bins,
    }
