"""torch's fused kernels: which optimizers have one, where it is wrong, and how an optimizer is stepped by it.

A fused kernel updates many parameters in one pass, and can skip a float16 step that overflowed without waiting for the
device.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_optim._compat.torch import SCALES
from lightning_optim.stepping._kernels import keep_kernel, lay_out_states
from lightning_optim.stepping._preparing import prepare_step

HALF = (torch.bfloat16, torch.float16)


def fused_class(optimizer: Optimizer) -> type[Optimizer] | None:
    """Returns the torch class that steps ``optimizer`` if it has a fused kernel, else ``None``."""
    bases = (c for c in type(optimizer).__mro__ if issubclass(c, Optimizer))
    base = next(c for c in bases if c.__module__.startswith("torch.optim."))
    own_step = inspect.unwrap(type(optimizer).step) is not inspect.unwrap(base.step)
    takes_fused = "fused" in inspect.signature(base).parameters
    return base if takes_fused and not own_step else None


def is_packed(parameter: Tensor) -> bool:
    """Whether the elements fill a block of memory without gaps or overlaps, in any order.

    The fused kernels ignore the strides of others: on a CPU they silently step the wrong numbers (torch 2.9 and 2.13),
    elsewhere torch raises in the first step.
    """
    expected = 1
    for stride, size in sorted(zip(parameter.stride(), parameter.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return parameter.numel() == 0
        expected *= size
    return True


class FusedStep:
    """Makes a torch optimizer step by its fused kernel until :meth:`detach`, whatever checkpoint it loads.

    SGD's velocity is initialized to zeros before its first step. Otherwise torch passes uninitialized memory to the
    kernel, which stays in the velocity if that step overflows and is skipped; and a parameter whose first gradient
    comes later than another's raises a ``TypeError``.

    Checkpoints are those of the optimizer as it was built.

    Args:
        optimizer: With a :func:`fused_class` and parameters on a device with the kernel; it may have stepped before.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        kernel = {"fused": True, "foreach": False}
        self._built = [{key: group[key] for key in kernel} for group in optimizer.param_groups]
        self._defaults = {key: optimizer.defaults[key] for key in kernel}
        #: Whether it was built without the kernel.
        self.built_plain = not all(group["fused"] for group in self._built)
        self._hooks = keep_kernel(optimizer)
        if isinstance(optimizer, SGD):
            self._hooks.append(prepare_step(optimizer, _start_velocities))
        # A scaler then passes the overflow flag to the kernel instead of reading it. torch's own classes set this if
        # they are built fused, Adagrad only in newer versions.
        self._scales = getattr(optimizer, SCALES, False)
        setattr(optimizer, SCALES, True)
        if not self.built_plain:
            return
        self._hooks.append(optimizer.register_state_dict_post_hook(self._as_built))
        # Groups that are added later take the defaults.
        for group in (optimizer.defaults, *optimizer.param_groups):
            group.update(kernel)
        for parameter, state in optimizer.state.items():
            if isinstance(parameter, Tensor) and "step" in state:
                # As torch does when a fused optimizer loads a checkpoint.
                state["step"] = state["step"].to(parameter.device, torch.float32)
        lay_out_states(optimizer)

    def detach(self) -> None:
        """Leaves the optimizer as it was built, with its state."""
        for hook in self._hooks:
            hook.remove()
        setattr(self.optimizer, SCALES, self._scales)
        if not self.built_plain:
            return
        self.optimizer.defaults.update(self._defaults)
        self._restore(self.optimizer.param_groups)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})
                if "step" in state and not (group["fused"] or group.get("capturable")):
                    state["step"] = state["step"].cpu()

    def _as_built(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._restore(state_dict["param_groups"])

    def _restore(self, groups: list[dict[str, Any]]) -> None:
        added = len(groups) - len(self._built)
        for group, built in zip(groups, [*self._built, *[self._defaults] * added], strict=True):
            group.update(built)


def _start_velocities(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        if not group["momentum"] or group["dampening"]:
            continue
        for parameter in group["params"]:
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
