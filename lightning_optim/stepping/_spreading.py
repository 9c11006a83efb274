"""Whole tensors of a state that is loaded for sharded parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.stepping._composite import parts_of
from lightning_optim.stepping._sharding import Layout, is_sharded


class SpreadsStates:
    """Mixin for optimizers that spread whole tensors by themselves, since not all are spread as the parameter is."""


def spread_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns a state dict in which whole tensors of the shape of a sharded parameter are spread as it is.

    Torch takes states as they are, and a step fails on a whole one.
    """
    by_itself = {
        id(parameter)
        for part in parts_of(optimizer)
        if isinstance(part, SpreadsStates)
        for group in part.param_groups
        for parameter in group["params"]
    }
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    ids = (identity for group in state_dict["param_groups"] for identity in group["params"])
    spread = {
        identity: {key: _spread_as(value, parameter) for key, value in state_dict["state"][identity].items()}
        for identity, parameter in zip(ids, parameters, strict=False)
        if is_sharded(parameter) and id(parameter) not in by_itself and identity in state_dict["state"]
    }
    return {**state_dict, "state": {**state_dict["state"], **spread}} if spread else state_dict


def _spread_as(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor) or is_sharded(value) or not value.ndim or value.shape != parameter.shape:
        return value
    layout = Layout.of(parameter)
    return layout.wrap(layout.share(value.detach()).to(parameter.device, copy=True))
