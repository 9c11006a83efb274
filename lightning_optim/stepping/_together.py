"""Updates of sharded parameters that need numbers of all processes, in as few messages as possible.

An update is a generator. Where it needs what the processes have together, it yields what this one has, a list of
:class:`Sum` and :class:`Deal`, and is sent the whole. Updates run side by side, so that what they wait for at the same
time travels together. Where parameters are whole nothing travels, and the same code runs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from lightning_optim.stepping._sharding import Layout

_T = TypeVar("_T")


class Sum(NamedTuple):
    """This process's part of a sum over dimensions of what is spread; the answer is the whole sum.

    Attributes:
        part: Its terms, summed; of any shape.
        layout: How what is summed is spread.
        over: The dimensions of the layout that are summed over; ``None`` for all.
        is_norm: Whether it is a 2-norm: squares are summed, and the root of the sum taken.
    """

    part: Tensor
    layout: Layout
    over: Iterable[int] | None = None
    is_norm: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether no other process has terms."""
        return not self.layout.splitting(self.over)


class Deal(NamedTuple):
    """Tensors, each of which one process works on; the answer is the list of this process's parts of the results.

    Attributes:
        parts: This process's parts.
        layouts: How each tensor is spread.
        work: Makes results of the same shapes and dtypes of whole tensors. It must not matter to a result which others
            are made with it.
        costs: What each costs, in any unit.
    """

    parts: list[Tensor]
    layouts: list[Layout]
    work: Callable[[list[Tensor]], list[Tensor]]
    costs: list[float]

    @property
    def is_whole(self) -> bool:
        """Whether no other process has parts."""
        return not any(layout.splitting() for layout in self.layouts)


#: What computes something with the other processes; it is sent a tensor for a ``Sum``, and a list for a ``Deal``.
Together: TypeAlias = Generator["Sequence[Sum | Deal]", "list[Any]", _T]
Update: TypeAlias = Together[None]


def side_by_side(updates: Iterable[Together[_T]]) -> Together[list[_T]]:
    """Joins updates to one: what they ask at the same time it asks at once. Returns what each returns.

    Those that wait for nobody run one after the other, so that their temporaries do not add up.
    """
    results: list[Any] = []
    waiting: list[tuple[int, Together[_T], Sequence[Sum | Deal]]] = []

    def run(index: int, update: Together[_T], answers: list[Any] | None) -> None:
        try:
            # None starts a generator.
            asked = update.send(answers)  # type: ignore[arg-type]
            while all(request.is_whole for request in asked):
                asked = update.send(_answers(asked))
        except StopIteration as end:
            results[index] = end.value
        else:
            waiting.append((index, update, asked))

    for index, update in enumerate(updates):
        results.append(None)
        run(index, update, None)
    while waiting:
        current, waiting = waiting, []
        answers = iter((yield [request for *_, asked in current for request in asked]))
        for index, update, asked in current:
            run(index, update, [next(answers) for _ in asked])
    return results


def run_together(updates: Iterable[Together[_T] | None]) -> list[_T]:
    """Runs updates to their ends, side by side; all processes must be given the same ones, in the same order.

    An update that never waits for anybody is done already, and ``None``.
    """
    joined = side_by_side(update for update in updates if update is not None)
    answers: list[Any] | None = None
    while True:
        try:
            answers = _answers(joined.send(answers))  # type: ignore[arg-type]
        except StopIteration as end:
            results: list[_T] = end.value
            return results


def alone(update: Together[_T]) -> _T:
    """Runs one computation to its end; returns its result."""
    (result,) = run_together([update])
    return result


def _answers(requests: Sequence[Sum | Deal]) -> list[Any]:
    summed = iter(add_up([request for request in requests if isinstance(request, Sum)]))
    dealt = iter(deal_out([request for request in requests if isinstance(request, Deal)]))
    return [next(summed) if isinstance(request, Sum) else next(dealt) for request in requests]


def add_up(sums: Sequence[Sum]) -> list[Tensor]:
    """Returns the whole sums, by one message for each group of processes, dtype and device."""
    results = [each.part for each in sums]
    messages: dict[Any, list[int]] = {}
    for index, each in enumerate(sums):
        if groups := each.layout.groups(each.over):
            messages.setdefault((groups, each.part.dtype, each.part.device), []).append(index)
    for (groups, *_), members in messages.items():
        parts = [sums[index] for index in members]
        flat = torch.cat([(each.part.square() if each.is_norm else each.part).reshape(-1) for each in parts])
        for group in groups:
            torch.distributed.all_reduce(flat, group=group)
        wholes = torch.split(flat, [each.part.numel() for each in parts])
        for index, each, whole in zip(members, parts, wholes, strict=True):
            results[index] = (whole.sqrt() if each.is_norm else whole).view(each.part.shape)
    return results


def deal_out(deals: Sequence[Deal]) -> list[list[Tensor]]:
    """Returns this process's parts of what the processes work out of whole tensors, each its share."""
    results: list[list[Tensor]] = [list(deal.parts) for deal in deals]
    shares: dict[Any, list[_Share]] = {}
    for index, deal in enumerate(deals):
        if deal.is_whole:
            results[index] = deal.work(deal.parts)
        elif any(len(layout.splitting()) > 1 for layout in deal.layouts):
            results[index] = _everywhere(deal)
        else:
            for place, (part, layout) in enumerate(zip(deal.parts, deal.layouts, strict=True)):
                (group,) = layout.groups()
                shares.setdefault((group, part.dtype, part.device), []).append(_Share(index, place, part, layout))
    for (group, *_), members in shares.items():
        _exchange(group, members, deals, results)
    return results


class _Share(NamedTuple):
    """One tensor of a deal, of which each process of a group has a part."""

    deal: int
    place: int
    part: Tensor
    layout: Layout

    def parts(self, processes: int) -> list[torch.Size]:
        """Returns the shapes of all processes' parts."""
        dim, size = self.dim, self.layout.shape[self.dim]
        each = -(-size // processes)
        sizes = [min(each, max(0, size - each * process)) for process in range(processes)]
        return [torch.Size((*self.part.shape[:dim], own, *self.part.shape[dim + 1 :])) for own in sizes]

    @property
    def dim(self) -> int:
        """The dimension that is split."""
        return next(dim for dim in range(len(self.layout.shape)) if self.layout.splitting((dim,)))


def _exchange(group: Any, shares: list[_Share], deals: Sequence[Deal], results: list[list[Tensor]]) -> None:
    """Sends parts to whom each tensor is dealt, and parts of the results back: two messages."""
    processes, own = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    dealt = _balanced([deals[share.deal].costs[share.place] for share in shares], processes)
    to = [
        [share for share, owner in zip(shares, dealt, strict=True) if owner == process] for process in range(processes)
    ]
    mine, parts = to[own], [share.parts(processes) for share in to[own]]
    received = _all_to_all(
        group,
        shares[0].part,
        [[share.part for share in some] for some in to],
        [[shapes[process] for shapes in parts] for process in range(processes)],
    )
    wholes = [torch.cat(pieces, share.dim) for share, pieces in zip(mine, zip(*received, strict=True), strict=True)]
    made: list[Tensor] = [*wholes]
    for index in dict.fromkeys(share.deal for share in mine):
        places = [number for number, share in enumerate(mine) if share.deal == index]
        for number, whole in zip(places, deals[index].work([wholes[number] for number in places]), strict=True):
            made[number] = whole
    pieces = [
        torch.split(whole, [shape[share.dim] for shape in shapes], share.dim)
        for share, whole, shapes in zip(mine, made, parts, strict=True)
    ]
    returned = _all_to_all(
        group,
        shares[0].part,
        [[each[process] for each in pieces] for process in range(processes)],
        [[share.part.shape for share in some] for some in to],
    )
    for some, back in zip(to, returned, strict=True):
        for share, part in zip(some, back, strict=True):
            results[share.deal][share.place] = part


def _balanced(costs: Sequence[float], processes: int) -> list[int]:
    """Returns whose each is: the dearest first, always to who has least."""
    loads, owners = [0.0] * processes, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = min(range(processes), key=loads.__getitem__)
        loads[owners[index]] += costs[index]
    return owners


def _all_to_all(
    group: Any, example: Tensor, given: list[list[Tensor]], shapes: list[list[torch.Size]]
) -> list[list[Tensor]]:
    """Sends lists of tensors like ``example`` to each process; returns those of these shapes that each has sent."""
    sent = [torch.cat([tensor.reshape(-1) for tensor in tensors] or [example.new_empty(0)]) for tensors in given]
    sizes = [sum(shape.numel() for shape in some) for some in shapes]
    received = example.new_empty(sum(sizes))
    torch.distributed.all_to_all_single(received, torch.cat(sent), sizes, [len(each) for each in sent], group=group)
    return [
        [
            flat.view(shape)
            for flat, shape in zip(torch.split(own, [shape.numel() for shape in some]), some, strict=True)
        ]
        for own, some in zip(torch.split(received, sizes), shapes, strict=True)
    ]


def _everywhere(deal: Deal) -> list[Tensor]:
    """Has every process work on all: of what is split along two dimensions of a mesh nobody has a plain slice."""
    wholes = [
        layout.wrap(part).full_tensor()  # type: ignore[attr-defined]
        for part, layout in zip(deal.parts, deal.layouts, strict=True)
    ]
    return [layout.share(whole) for whole, layout in zip(deal.work(wholes), deal.layouts, strict=True)]
