"""Warns of states that are NaN or infinite where it costs nothing: when a state dict is made, as for a checkpoint."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.stepping._sharding import is_sharded
from lightning_optim.stepping._state_marks import MEMBERS


def say_if_not_finite(optimizer: Optimizer) -> None:
    """Makes ``optimizer.state_dict()`` warn, once per parameter, if its state is not finite.

    A single NaN gradient stays in a moment forever. If the update is a sign (Lion), weights and loss stay finite and
    the parameter just stops learning.
    """
    optimizer.register_state_dict_post_hook(_Watch())


class _Watch:
    def __init__(self) -> None:
        self._said: set[int] = set()
        self._checked = False

    def __call__(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        found = {name: parameter for name, parameter in _not_finite(optimizer) if id(parameter) not in self._said}
        since = "since the state dict (the checkpoint) before this one" if self._checked else "by now"
        self._checked = True
        if not found:
            return
        self._said.update(map(id, found.values()))
        first, *others = found
        more = f" and of {len(others)} more" if others else ""
        warnings.warn(
            f"{type(optimizer).__name__}: the state of {first}{more} has become NaN or infinite {since}, because of a "
            "gradient. It stays so: these parameters become NaN or stop learning, also after a resume from this "
            "checkpoint. Resume from an earlier one, and avoid such gradients: Trainer(detect_anomaly=True) shows "
            "where they come from, and training_step can return None for a batch whose loss is not finite.",
            RuntimeWarning,
            stacklevel=2,
        )


@torch.no_grad()
def _not_finite(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters, with their names, whose states hold non-finite numbers."""
    tensors: dict[torch.device, list[tuple[str, Tensor, Tensor]]] = {}
    for group in optimizer.param_groups:
        members = group.get(MEMBERS, ())
        for index, parameter in enumerate(group["params"]):
            known = index < len(members)
            name = repr(members[index]) if known else f"a parameter of shape {tuple(parameter.shape)}"
            for value in _floats(optimizer.state.get(parameter, {})):
                tensors.setdefault(value.device, []).append((name, parameter, value))
    for found in tensors.values():
        # The largest absolute value is NaN if one is. One synchronization per device.
        largest = [torch.linalg.vector_norm(value, ord=math.inf).isfinite() for *_, value in found]
        for (name, parameter, _), finite in zip(found, torch.stack(largest).tolist(), strict=True):
            if not finite:
                yield name, parameter


def _floats(state: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in state.values():
        if not isinstance(value, Tensor):
            continue
        # A quantized subclass (torchao) shows it in its scales.
        value = getattr(value, "scale", value)
        if is_sharded(value):
            value = value.to_local()
        if value.is_sparse:
            # The momentum of sparse gradients.
            value = value.coalesce().values()
        if value.is_floating_point() and value.numel():
            yield value
