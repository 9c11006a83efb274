"""``optimi.StableAdamW`` that moves between devices and takes ``betas`` per group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import optimi
import torch
from optimi.utils import HAS_TRITON
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.stepping import StepsUncompiled


class StableAdamW(StepsUncompiled, optimi.StableAdamW):
    """``optimi.StableAdamW`` with two fixes.

    Upstream stores its choice of Triton kernels in the param group and hence in checkpoints, so that a checkpoint from
    a GPU fails on a CPU, and one from a CPU lacks what the kernels need. Here the choice is made again before a state
    dict is loaded, and upstream adds to the state what the kernels need. And a param group may hold ``betas``, as
    everywhere in PyTorch; upstream wants ``beta1`` and ``beta2``.
    """

    # See lightning_optim.build._resume.
    option_keys: ClassVar = {"betas": ("beta1", "beta2")}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "betas" in param_group:
            param_group["beta1"], param_group["beta2"] = param_group.pop("betas")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Runs after hooks registered by others, which may translate a state dict.
        handle = self.register_load_state_dict_pre_hook(_with_own_kernels)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group in self.param_groups:
            for parameter in group["params"] if group["triton"] else ():
                state = self.state[parameter]
                if "kahan_comp" in state and state["kahan_comp"] is None:
                    # The kernels want a pointer even if nothing is compensated.
                    state["kahan_comp"] = torch.zeros(1, dtype=torch.uint8, device=parameter.device)


def _with_own_kernels(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = state_dict["param_groups"]
    if len(groups) == len(optimizer.param_groups):  # else torch raises
        groups = [{**group, **_kernels(own)} for group, own in zip(groups, optimizer.param_groups, strict=True)]
    return {**state_dict, "param_groups": groups}


def _kernels(group: dict[str, Any]) -> dict[str, Any]:
    """Returns a group's choice of kernels; if the user made none, upstream's choice for its parameters' devices."""
    kernels = {key: group[key] for key in ("foreach", "triton")}
    if kernels == {"foreach": None, "triton": None}:
        kernels["triton"] = _on_gpu(group["params"])
    return kernels


def _on_gpu(parameters: Iterable[Tensor]) -> bool:
    return bool(HAS_TRITON) and all(parameter.device.type in ("cuda", "xpu") for parameter in parameters)
