"""The trust ratio of LARS and LAMB: a layer's step is as long as the layer itself says, by its own norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_optim._compat import kernels
from lightning_optim.errors import InvalidOption, listing
from lightning_optim.stepping import Layout, Sum, Together

#: Which parameters of a group have a trust ratio; those with fewer than two dimensions are biases and norms.
Adapt = Literal["matrices", "all", "none"]


def check_adapt(who: str, group: dict[str, Any]) -> None:
    """Raises :class:`InvalidOption` for a group whose ``adapt`` is not one of :data:`Adapt`."""
    if group["adapt"] not in get_args(Adapt):
        raise InvalidOption(
            f"adapt={group['adapt']!r} of {who} is unknown; use one of {listing(get_args(Adapt))}", code="LO207"
        )


def adapted(parameters: Sequence[Tensor], adapt: Adapt) -> list[int]:
    """Returns the positions of the parameters that have a trust ratio."""
    least = {"matrices": 2, "all": 0}.get(adapt)
    return [] if least is None else [i for i, parameter in enumerate(parameters) if parameter.ndim >= least]


def norms(layouts: Sequence[Layout], *lists: Sequence[Tensor]) -> Together[list[Tensor]]:
    """Returns the norms of lists of tensors of one device and dtype, each list's as a vector.

    ``layouts`` says how the tensors of each list are spread.
    """
    found = yield [
        Sum(norm, layout, is_norm=True)
        for tensors in lists
        for norm, layout in zip(_norms(tensors).unbind(), layouts, strict=True)
    ]
    return list(torch.stack(found).view(len(lists), -1).unbind())


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].device.type != "cpu":
        return torch.stack(kernels.foreach_norm(list(tensors)))
    # In two stages, row by row: on a CPU, one float32 sum over millions of squares loses digits.
    rows = (each.view(-1, each.shape[-1] if each.ndim else 1) if each.numel() else each.view(0, 1) for each in tensors)
    return torch.stack([torch.linalg.vector_norm(torch.linalg.vector_norm(each, dim=1)) for each in rows])


def ratios(lengths: Tensor, updates: Tensor) -> Tensor:
    """Returns the quotients of norms, and 1 where one of the two is zero: there is nothing to compare with."""
    return torch.where((lengths > 0) & (updates > 0), lengths / updates, 1.0)


def scale(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Multiplies each tensor by its factor, in place."""
    kernels.foreach_mul_(list(tensors), list(factors.unbind()))
