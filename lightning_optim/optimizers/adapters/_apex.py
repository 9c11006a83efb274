"""NVIDIA apex's fused Adam with the contract of ``torch.optim.AdamW``.

https://github.com/NVIDIA/apex; PyPI's apex is another project, without these kernels.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

import amp_C
import torch
from apex import optimizers
from torch import Tensor

from lightning_optim.errors import IncompatibleTrainer, InvalidOption
from lightning_optim.stepping import StepsUncompiled, laid_out_as, only_valid_groups, uncompiled

for _module, _name in ((amp_C, "multi_tensor_adam"), (optimizers, "FusedAdam")):
    if not hasattr(_module, _name):
        raise ImportError(
            f"the module {_module.__name__!r} has no {_name}: it is not NVIDIA's, or was built without it"
        )

# What the kernel takes; it always reads the moments as float32.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Without the wrapper that runs hooks, which torch adds to the class when it is first instantiated.
_UPSTREAM_STEP = inspect.unwrap(optimizers.FusedAdam.step)


class FusedAdam(StepsUncompiled, optimizers.FusedAdam):
    """``apex.optimizers.FusedAdam``, fixed where it differs from ``torch.optim.AdamW``.

    - ``zero_grad`` takes ``set_to_none``.
    - Steps are counted per parameter, in the state, as in torch: state dicts of this class, of ``torch.optim.AdamW``
      and of apex's own class can be loaded. Upstream counts per group, also for parameters that have not had a
      gradient yet.
    - Moments stay float32 when a state dict is loaded. ``torch.optim.Optimizer`` casts them to the parameter's dtype,
      and the kernel would read past their end.
    - A group that is added later is stepped; upstream leaves it out.
    - The kernel ignores strides: a gradient whose memory layout differs from its parameter's is copied first.

    Parameters are float32, bfloat16 or float16, on CUDA and contiguous (or channels_last); others raise
    :class:`IncompatibleTrainer`. Upstream's ``capturable`` and ``master_weights`` are not supported.
    """

    # load_state_dict sets the moments itself, see lightning_optim.build._resume.
    loads_in_parts: ClassVar = True
    param_groups: list[dict[str, Any]]
    param_groups_master: list[dict[str, Any]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        with only_valid_groups(self):
            super().add_param_group(param_group)
            for parameter in self.param_groups[-1]["params"]:
                _check(parameter)

    def zero_grad(self, set_to_none: bool = True) -> None:
        torch.optim.Optimizer.zero_grad(self, set_to_none)

    @uncompiled
    @torch.no_grad()
    def _step(self) -> None:
        parts = [part for group in self.param_groups for part in self._by_count(group)]
        own = self.param_groups, self.param_groups_master
        self.param_groups = parts
        # Upstream reads both lists in parallel; there are no master weights.
        self.param_groups_master = [{"params": [None] * len(part["params"])} for part in parts]
        try:
            _UPSTREAM_STEP(self)
        finally:
            self.param_groups, self.param_groups_master = own
        for part in parts:
            for parameter in part["params"]:
                self.state[parameter]["step"] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what this class, ``torch.optim.AdamW`` or apex's own class saved.

        Raises:
            InvalidOption: If it was saved by an AdamW with ``amsgrad`` or ``maximize``.
        """
        saved = state_dict["param_groups"]
        for option in ("amsgrad", "maximize"):
            if any(group.get(option) for group in saved):
                raise InvalidOption(
                    f"the optimizer's state was saved with {option}=True, which optim='adamw_apex_fused' lacks. "
                    "Resume with optim='adamw_torch_fused', or start anew from the checkpoint's weights: "
                    "LitModel.load_from_checkpoint(path).",
                    code="LO808",
                )
        if len(saved) == len(self.param_groups):  # else torch raises
            # torch replaces the groups by the saved ones: keep the entries that only this class has, and drop the step
            # count that apex's own class stores there.
            without_step = [{key: value for key, value in group.items() if key != "step"} for group in saved]
            saved = [{**own, **group} for own, group in zip(self.param_groups, without_step, strict=True)]
        own_identities = {identity for group in saved for identity in group["params"]}
        # torch takes entries that belong to no parameter unchanged.
        others = {key: value for key, value in state_dict["state"].items() if key not in own_identities}
        super().load_state_dict({**state_dict, "state": others, "param_groups": saved})
        for own, group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for identity, parameter in zip(group["params"], own["params"], strict=True):
                state = state_dict["state"].get(identity)
                if state:
                    count = float(state["step"] if "step" in state else group["step"])
                    moments = {name: _zeros(parameter).copy_(state[name]) for name in _MOMENTS}
                    self.state[parameter].update(step=torch.tensor(count), **moments)

    def _by_count(self, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields, as groups for upstream's step, the parts of a group that have taken equally many steps."""
        parts: dict[Any, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is None or not parameter.numel():
                continue
            # Upstream refuses sparse ones.
            if not parameter.grad.is_sparse and parameter.grad.stride() != parameter.stride():
                parameter.grad = laid_out_as(parameter, parameter.grad)
            state = self.state[parameter]
            if not state:
                state.update(step=torch.tensor(0.0), **{name: _zeros(parameter) for name in _MOMENTS})
            parts.setdefault((int(state["step"]), parameter.device), []).append(parameter)
        for (count, _), parameters in parts.items():
            # Upstream counts one up before it steps.
            yield {**group, "params": parameters, "step": count}


def _check(parameter: Tensor) -> None:
    if parameter.dtype not in _DTYPES:
        raise IncompatibleTrainer(
            "optim='adamw_apex_fused' steps float32, bfloat16 and float16 parameters, and one of shape "
            f"{tuple(parameter.shape)} is {parameter.dtype}. Use optim='adamw_torch_fused'.",
            code="LO533",
        )
    formats = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    if not any(parameter.is_contiguous(memory_format=format) for format in formats):
        raise IncompatibleTrainer(
            "optim='adamw_apex_fused' cannot step a parameter that is not contiguous, and one of shape "
            f"{tuple(parameter.shape)} has strides {parameter.stride()}. Use optim='adamw_torch_fused', or "
            "nn.Parameter(weight.contiguous()).",
            code="LO533",
        )


def _zeros(parameter: Tensor) -> Tensor:
    """Returns a float32 moment in its parameter's memory layout."""
    return torch.zeros_like(parameter, dtype=torch.float32)
