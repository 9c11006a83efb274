"""Stacks of equally shaped tensors, so that one operation serves them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_optim._compat import kernels
from lightning_optim.optimizers._base import to_compute_dtype, write_back
from lightning_optim.stepping import Layout

# Larger tensors keep the machine busy by themselves, and stacking would copy them.
_LARGEST = 2**15
# Kernels choose their path by alignment. A slice of a stack that is aligned like a separate tensor gets the same bits,
# so stepping in buckets equals stepping at once.
_ALIGNMENT = 64


def batches(
    tensors: Iterable[Tensor],
    shapes: Callable[[tuple[int, ...]], Iterable[tuple[int, ...]]],
    layout_of: Callable[[Tensor], Layout],
) -> Iterator[tuple[list[Tensor], Layout]]:
    """Yields batches of equally shaped tensors to stack: many if all that is stacked is small and aligned, else one.

    Parts of sharded ones stay single. Each batch comes with the layout that its tensors share.

    Args:
        tensors: Parameters, or this process's parts of them.
        shapes: Returns, for a tensor's shape, the shapes of everything that will be stacked, in four bytes per element
            or more.
        layout_of: Returns how one of the tensors is spread.
    """
    alike: dict[Layout, list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault(layout_of(tensor), []).append(tensor)
    for layout, members in alike.items():
        sizes = [math.prod(each) for each in shapes(tuple(members[0].shape))]
        # Other processes' parts may be of other sizes.
        small = layout.mesh is None and max(sizes) <= _LARGEST
        if small and all(size * 4 % _ALIGNMENT == 0 for size in sizes):
            yield members, layout
        else:
            yield from (([member], layout) for member in members)


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the tensors along a new first dimension; a single one is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def unstack(stacked: Tensor, tensors: Sequence[Tensor]) -> None:
    """Writes a changed :func:`stack` back into its tensors."""
    if len(tensors) > 1:
        kernels.foreach_copy_(list(tensors), list(stacked.unbind()))


@contextmanager
def stacked_weights(batch: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields stacks of equally shaped parameters and of their gradients; writes the changed parameters back.

    Both are contiguous and in the compute dtype. Only the first is to be changed.
    """
    (values,) = to_compute_dtype([stack(batch)])
    yield values, stack([p.grad for p in batch if p.grad is not None]).to(values.dtype).contiguous()
    if len(batch) > 1:
        unstack(values, batch)
    else:
        write_back(batch, values.unbind())


@contextmanager
def stacked(
    states: Sequence[Mapping[str, Any]], names: Iterable[str], stack_dims: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Yields stacks, by name, of several states' tensors, to change in place; then writes them back.

    Tensors of two bytes per element are float32 meanwhile. The first ``stack_dims`` dimensions of every tensor join
    that of the stack.
    """
    tensors = {name: [state[name] for state in states] for name in names}
    stacks = {name: stack(items) for name, items in tensors.items()}
    wide = {name: each.to(torch.promote_types(each.dtype, torch.float32)) for name, each in stacks.items()}
    yield {name: each.view(-1, *each.shape[1 + stack_dims :]) if stack_dims else each for name, each in wide.items()}
    for name, items in tensors.items():
        if wide[name] is not stacks[name] and len(items) == 1:
            items[0].copy_(wide[name][0])
        unstack(wide[name], items)
