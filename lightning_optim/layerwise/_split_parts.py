"""One step of several optimizers as one, taken in parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.layerwise._coupled import WATCHED_STEPS, Watch
from lightning_optim.layerwise._split_step import SplitStep
from lightning_optim.stepping import parts_of


class Watches:
    """The checks of an optimizer's parts, or of the optimizer alone, for coupled parameters; kept between steps."""

    def __init__(self) -> None:
        # In how many steps each group was watched, by its index, for each part.
        self._seen: list[dict[int, int]] = []

    def begin(self, optimizer: Optimizer) -> list[Watch | None]:
        """Returns a check for the next step of each part, ``None`` for those whose groups have all passed."""
        parts = parts_of(optimizer)
        self._seen += [{} for _ in parts[len(self._seen) :]]
        return [
            None if _has_passed(part, seen) else Watch(part, seen) for part, seen in zip(parts, self._seen, strict=True)
        ]


class SplitParts:
    """A :class:`SplitStep` for every optimizer that an optimizer consists of.

    Args:
        optimizer: The outer optimizer.
        watches: A check for each of its parts; ``()`` checks nothing.
    """

    def __init__(self, optimizer: Optimizer, watches: Sequence[Watch | None] = ()) -> None:
        self._optimizer = optimizer
        parts = parts_of(optimizer)
        self._splits = [
            SplitStep(part, watch) for part, watch in zip(parts, watches or [None] * len(parts), strict=True)
        ]
        # By id: Tensor.__hash__ is a Python function. Not needed for one part.
        self._number = {
            id(parameter): number
            for number, split in enumerate(self._splits if len(parts) > 1 else ())
            for parameter in split.parameters
        }

    @property
    def parameters(self) -> Iterable[Tensor]:
        """All parameters in the order of the outer groups."""
        return (parameter for group in self._optimizer.param_groups for parameter in group["params"])

    def inners_for(self, bucket: Sequence[Tensor]) -> list[Optimizer]:
        """Returns new optimizers that step a bucket together."""
        return [inner for split, members in self._divided(bucket) for inner in split.inners_for(members)]

    def commit(self) -> None:
        """See :meth:`SplitStep.commit`."""
        for split in self._splits:
            split.commit()

    def _divided(self, bucket: Sequence[Tensor]) -> Iterator[tuple[SplitStep, Sequence[Tensor]]]:
        if len(self._splits) == 1:
            yield self._splits[0], bucket
            return
        for number, split in enumerate(self._splits):
            members = [parameter for parameter in bucket if self._number[id(parameter)] == number]
            if members:
                yield split, members


def _has_passed(optimizer: Optimizer, seen: dict[int, int]) -> bool:
    trains = (any(p.requires_grad for p in group["params"]) for group in optimizer.param_groups)
    return all(seen.get(index, 0) >= WATCHED_STEPS for index, trained in enumerate(trains) if trained)
