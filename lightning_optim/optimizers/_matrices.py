"""Optimizers that step matrices only: which parameters they refuse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_optim.errors import InvalidParamGroups
from lightning_optim.stepping import MEMBERS


def named(group: Mapping[str, Any]) -> Iterator[tuple[Tensor, str]]:
    """Yields the parameters of a group, each with what to call it in an error."""
    members = group.get(MEMBERS, ())
    for index, parameter in enumerate(group["params"]):
        shape = tuple(parameter.shape)
        known = index < len(members)
        yield parameter, f"{members[index]!r} of shape {shape}" if known else f"a parameter of shape {shape}"


def refuse_vectors(who: str, group: Mapping[str, Any]) -> None:
    """Raises :class:`InvalidParamGroups` for the first parameter that is no matrix, and no stack of them."""
    stack_dims = group["stack_dims"]
    for parameter, name in named(group):
        if parameter.ndim < 2 + stack_dims:
            stacks = f" with stack_dims={stack_dims}" if stack_dims else ""
            raise InvalidParamGroups(
                f"{who} steps matrices and cannot step {name}{stacks}: it takes {2 + stack_dims} dimensions or more. "
                "Give it to another optimizer, such as torch.optim.AdamW."
            )
