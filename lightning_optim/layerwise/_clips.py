"""Which gradients of a step are clipped together, and by what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.errors import InvalidOption
from lightning_optim.stepping import Clipping, own_clips, total_norm


@dataclass(frozen=True)
class Totals:
    """The norms of a step's gradients, 0-dim: of all, and of those that are clipped together."""

    whole: Tensor
    each: tuple[Tensor, ...]

    @classmethod
    def of_all(cls, norm: Tensor) -> Totals:
        """Returns those of an optimizer whose gradients are all clipped together."""
        return cls(norm, (norm,))


class Clips:
    """How one step clips: parts with a clipping of their own by that, all other gradients together.

    Args:
        optimizer: What is stepped.
        shared: How the others are clipped, ``None``: not at all.

    Raises:
        InvalidOption: If the others are clipped by the norm of the previous step: of a part's own nothing is kept.
    """

    def __init__(self, optimizer: Optimizer, shared: Clipping | None = None) -> None:
        own = own_clips(optimizer)
        if own and shared is not None and shared.kind == "previous":
            raise InvalidOption(
                "Clipping('previous', ...) where a part has a clipping of its own, whose norm is not kept. Use "
                "Clipping('norm', ...), or leave clip out of param_groups.",
                code="LO606",
            )
        self._kinds: list[Clipping | None] = [shared, *(clipping for clipping, _ in own)]
        # By id: Tensor.__hash__ is a Python function. What is not here is shared.
        self._number = {id(p): number for number, (_, parameters) in enumerate(own, 1) for p in parameters}

    def __bool__(self) -> bool:
        return any(clipping is not None for clipping in self._kinds)

    @property
    def kinds(self) -> set[str]:
        """The kinds of clipping."""
        return {clipping.kind for clipping in self._kinds if clipping is not None}

    def shared(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Returns those of the parameters that no part clips by itself."""
        return [parameter for parameter in parameters if id(parameter) not in self._number]

    def totals(self, norms: Mapping[Tensor, Tensor], order: Iterable[Tensor]) -> Totals:
        """Returns the total norms.

        Args:
            norms: The norm of each gradient.
            order: All parameters in the order of the param groups, so that sums round as in
                ``torch.nn.utils.clip_grad_norm_``.
        """
        known = [parameter for parameter in order if parameter in norms]
        whole = total_norm([norms[parameter] for parameter in known])
        if len(self._kinds) == 1:
            return Totals.of_all(whole)
        return Totals(whole, tuple(total_norm([norms[p] for p in members]) for members in self._divided(known)))

    def apply(self, bucket: Sequence[Tensor], norms: Sequence[Tensor], totals: Totals | None) -> None:
        """Clips the gradients of a bucket in place; the norms of each gradient are for clipping per parameter."""
        norm_of = dict(zip(map(id, bucket), norms, strict=bool(norms)))
        for number, (clipping, members) in enumerate(zip(self._kinds, self._divided(bucket), strict=True)):
            if clipping is not None and members:
                own = [norm_of[id(parameter)] for parameter in members] if norms else []
                clipping.apply(members, own, None if totals is None else totals.each[number])

    def _divided(self, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        for number in range(len(self._kinds)):
            yield [parameter for parameter in parameters if self._number.get(id(parameter), 0) == number]
