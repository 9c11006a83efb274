"""Which of torch's kernels steps an optimizer: a matter of the run, not of the checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optim._compat.torch import load_hooks
from lightning_optim.stepping._preparing import prepare_step

# What torch keeps in the param groups although it says how a step is computed, not what.
_KERNEL = ("fused", "foreach", "capturable")


def keep_kernel(optimizer: Optimizer) -> list[RemovableHandle]:
    """Has ``optimizer`` stepped by the kernel that it was built with, whatever it loads, and sees to what that needs.

    - torch takes the whole param groups of a state dict, and Lightning's finetuning callbacks those that they saved: a
      checkpoint of another kernel, of another device perhaps, would change the kernel without a word.
    - Gradients and states lie in memory as their parameter does. A fused kernel on a CPU takes no notice of strides and
      would add the wrong elements; others refuse, even where only dimensions of size 1 differ
      (https://github.com/pytorch/pytorch/issues/106951).

    Copies of the optimizer made by ``copy.deepcopy`` or ``pickle`` are without it, as without all hooks.

    Returns:
        What takes it back; nothing for an optimizer that has no choice of kernels, or that has it already.
    """
    if not any(key in optimizer.defaults for key in _KERNEL):
        return []
    if _with_own_kernel in load_hooks(optimizer)[0]:
        return []
    return [
        optimizer.register_load_state_dict_pre_hook(_with_own_kernel),
        optimizer.register_load_state_dict_post_hook(lay_out_states),
        *([prepare_step(optimizer, _prepare)] if "fused" in optimizer.defaults else []),
    ]


def lay_out_states(optimizer: Optimizer) -> None:
    """Has the states of a fused optimizer lie in memory as their parameters do."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            _lay_out_state(parameter, optimizer.state.get(parameter, {}))


def _prepare(optimizer: Optimizer) -> None:
    own = optimizer.defaults["fused"]
    for group in optimizer.param_groups:
        group["fused"] = own
        if not own:
            continue
        if group["foreach"]:
            group["foreach"] = False
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None or gradient.is_sparse:
                continue
            if gradient.stride() != parameter.stride():
                parameter.grad = laid_out_as(parameter, gradient)
            if parameter.device.type == "cpu":
                # Elsewhere torch says so if the model has taken another memory format since.
                _lay_out_state(parameter, optimizer.state.get(parameter, {}))


def _lay_out_state(parameter: Tensor, state: dict[str, Any]) -> None:
    for key, value in state.items():
        alike = isinstance(value, Tensor) and value.shape == parameter.shape
        if alike and value.stride() != parameter.stride():
            state[key] = laid_out_as(parameter, value)


def laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """Returns a copy of ``value`` that lies in memory as ``parameter`` does."""
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _with_own_kernel(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = list(state_dict["param_groups"])
    if len(groups) != len(optimizer.param_groups):
        # torch says so.
        return state_dict
    own = [{key: group[key] for key in _KERNEL if key in group} for group in optimizer.param_groups]
    return {
        **state_dict,
        "param_groups": [{**group, **kernel} for group, kernel in zip(groups, own, strict=True)],
    }
