"""Which of torch's kernels steps an optimizer: decided by the run, not by the checkpoint."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optim._compat.torch import load_hooks
from lightning_optim.stepping._preparing import prepare_step
from lightning_optim.stepping._sharding import is_sharded

# Entries of torch's param groups about how, not what, a step computes.
_KERNEL = ("fused", "foreach", "capturable")
# Those that step many tensors in one call.
_TOGETHER = ("fused", "foreach")


def keep_kernel(optimizer: Optimizer) -> list[RemovableHandle]:
    """Keeps the kernel that ``optimizer`` was built with, whatever it loads, and the memory layout that this needs.

    - torch adopts the param groups of a state dict as a whole, and Lightning's finetuning callbacks those they saved: a
      checkpoint of another kernel, perhaps from another device, would silently change the kernel.
    - Gradients and states get their parameter's memory layout. A fused kernel on a CPU ignores strides and would add
      the wrong elements; others raise, even if only dimensions of size 1 differ
      (https://github.com/pytorch/pytorch/issues/106951).
    - A group in which some parameters are DTensors and others are not, or of other meshes, is stepped one by one:
      tensor parallelism leaves norms as they are, and kernels for many tensors take those of one kind.

    Like all hooks, this is not copied by ``copy.deepcopy`` or ``pickle``.

    Returns:
        The handles that remove it; none for an optimizer without a choice of kernels, or with these hooks already.
    """
    if not any(key in optimizer.defaults for key in _KERNEL) or _with_own_kernel in load_hooks(optimizer)[0]:
        return []
    return [
        optimizer.register_load_state_dict_pre_hook(_with_own_kernel),
        optimizer.register_load_state_dict_post_hook(lay_out_states),
        *([prepare_step(optimizer, _prepare)] if "fused" in optimizer.defaults else []),
        *([prepare_step(optimizer, _part)] if any(key in optimizer.defaults for key in _TOGETHER) else []),
    ]


def lay_out_states(optimizer: Optimizer) -> None:
    """Gives the states of a fused optimizer their parameters' memory layout."""
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
                # Elsewhere torch raises if the model has changed its memory format since.
                _lay_out_state(parameter, optimizer.state.get(parameter, {}))


def _part(optimizer: Optimizer) -> None:
    """Has groups of several kinds of tensors stepped one by one."""
    for group in optimizer.param_groups:
        used = [key for key in _TOGETHER if group.get(key) is not False and key in group]
        if not used or len({p.device_mesh if is_sharded(p) else None for p in group["params"]}) < 2:
            continue
        if group.get("fused"):
            warnings.warn(
                f"{type(optimizer).__name__} steps parameters one by one, without its fused kernel, where a group has "
                "DTensors and others, as tensor parallelism of some layers makes it. optim='adamw_torch' does the same",
                stacklevel=2,
            )
        group.update(dict.fromkeys(used, False))


def _lay_out_state(parameter: Tensor, state: dict[str, Any]) -> None:
    for key, value in state.items():
        alike = isinstance(value, Tensor) and value.shape == parameter.shape
        if alike and value.stride() != parameter.stride():
            state[key] = laid_out_as(parameter, value)


def laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """Returns a copy of ``value`` in the memory layout of ``parameter``."""
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _with_own_kernel(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = list(state_dict["param_groups"])
    if len(groups) != len(optimizer.param_groups):
        return state_dict  # torch raises
    own = [{key: group[key] for key in _KERNEL if key in group} for group in optimizer.param_groups]
    return {**state_dict, "param_groups": [{**group, **kernel} for group, kernel in zip(groups, own, strict=True)]}
