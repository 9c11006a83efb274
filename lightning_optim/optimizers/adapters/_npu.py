"""torch_npu's fused AdamW for Ascend NPUs with the contract of ``torch.optim.AdamW``.

https://gitcode.com/Ascend/pytorch, ``torch_npu/optim``, read in version 2.13.0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_optim._compat.torch_npu import AdamWInParts
from lightning_optim.errors import IncompatibleTrainer, InvalidOption
from lightning_optim.stepping import StepsUncompiled, only_valid_groups, uncompiled

_INSTEAD = "or optim='adamw_torch_fused'"

# The flat memory that a parameter (and its gradient) or a state was moved into. Upstream's tensors do not own it:
# without the optimizer they would read and write freed memory.
_FLAT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class NpuFusedAdamW(StepsUncompiled, AdamWInParts):
    """``torch_npu.optim.NpuFusedAdamW``, fixed where it differs from ``torch.optim.AdamW``.

    Upstream's first step moves parameters, gradients and states into flat buffers, and every step is a few kernels over
    those. It silently leaves out tensors that later refer to other memory. Here they are detected, and moved again in
    the next step:

    - ``zero_grad(set_to_none=True)``, which Lightning and torch call by default, zeroes in place; upstream raises.
    - Gradients freed or replaced from outside (``module.zero_grad()``), parameters that moved to another device and
      back, and groups that were added later are stepped.
    - ``load_state_dict`` works at any time and accepts the state of ``torch.optim.AdamW``. Upstream ignores it after
      the first step, and would count the steps of torch's state twice.
    - ``step`` runs its closure with gradients enabled.
    - Tensors in a flat buffer keep it alive after the optimizer is gone.

    A parameter that a step does not use then has a zero gradient and is stepped by its momentum, as with
    ``torch.optim.AdamW`` after ``zero_grad(set_to_none=False)``.

    Raises:
        IncompatibleTrainer: In the constructor, for parameters that are not float32 or not contiguous; in a step, if
            parameters share memory, or those of a group have taken different numbers of steps: upstream has one count
            per group.
    """

    _laid_out: list[tuple[int, ...]] | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        with only_valid_groups(self):
            super().add_param_group(param_group)
            for parameter in self.param_groups[-1]["params"]:
                _check(parameter)
        self._laid_out = None

    # Upstream checks this flag wherever it uses the flat buffers, also in its GradScaler and its clipping.
    @property
    def is_params_grads_combined(self) -> bool:
        """Whether the flat buffers are still what parameters and gradients refer to."""
        return self._laid_out is not None and self._laid_out == self._addresses()

    @is_params_grads_combined.setter
    def is_params_grads_combined(self, combined: bool) -> None:
        self._laid_out = self._addresses() if combined else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the gradients, in place if they are in a flat buffer, whatever ``set_to_none``."""
        if self.is_params_grads_combined:
            super().zero_grad(set_to_none=False)
        else:
            torch.optim.Optimizer.zero_grad(self, set_to_none)

    @uncompiled
    @torch.no_grad()
    def _step(self) -> None:
        self.combine_parameters()
        self.combine_states()
        for index in range(len(self.param_groups)):
            self.step_group(index)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what this class or ``torch.optim.AdamW`` saved; the next step continues from it.

        Raises:
            InvalidOption: If it was saved by an AdamW with ``maximize``.
        """
        if any(group.get("maximize") for group in state_dict["param_groups"]):
            raise InvalidOption(
                "the optimizer's state was saved with maximize=True, which optim='adamw_torch_npu_fused' lacks. "
                "Resume with optim='adamw_torch_fused'.",
                code="LO808",
            )
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if isinstance(parameter, Tensor) and "step" in state:
                # A tensor in torch's state dicts.
                state["step"] = int(state["step"])
        self.is_states_combined = False

    def combine_parameters(self) -> None:
        if self.is_params_grads_combined:
            return
        self.is_states_combined = self.is_grads_masks_combined = False
        self._prepare()
        super().combine_parameters()
        flat = (*self.params_all_group_combined, *self.grads_all_group_combined)
        for parameter in self._with_gradients():
            _FLAT[parameter] = flat

    def combine_states(self) -> None:
        if self.is_states_combined:
            return
        for number, group in enumerate(self.param_groups):
            counts = {self.state[p].get("step", 0) for p in group["params"] if p.grad is not None}
            if len(counts) > 1:
                raise IncompatibleTrainer(
                    f"the parameters of group {number} have taken different numbers of steps, {min(counts)} to "
                    f"{max(counts)}: some had no gradient in a step, or were unfrozen later. optim="
                    "'adamw_torch_npu_fused' has one count per group. Give them a group of their own "
                    f"(optimizer.add_param_group), {_INSTEAD}.",
                    code="LO534",
                )
        super().combine_states()
        for group, flat in zip(self.param_groups, self.combined_param_states_indexed_by_group, strict=True):
            for parameter in group["params"]:
                for value in self.state.get(parameter, {}).values():
                    if isinstance(value, Tensor):
                        _FLAT[value] = flat

    def _prepare(self) -> None:
        """Gives every gradient its own memory, which upstream then moves."""
        seen: set[int] = set()
        for parameter in self._with_gradients():
            if parameter.numel() and _storage(parameter) in seen:
                raise IncompatibleTrainer(
                    "optim='adamw_torch_npu_fused' cannot step parameters that share memory, and one of shape "
                    f"{tuple(parameter.shape)} does. Use nn.Parameter(weight.clone()), {_INSTEAD}.",
                    code="LO533",
                )
            gradient = parameter.grad
            assert gradient is not None
            if _storage(gradient) in seen or not gradient.is_contiguous():
                # A slice of a larger gradient or of one of DDP's buckets.
                parameter.grad = gradient = gradient.clone(memory_format=torch.contiguous_format)
            seen |= {_storage(parameter), _storage(gradient)}

    def _addresses(self) -> list[tuple[int, ...]]:
        """Returns which parameters have gradients, and where both lie."""
        return [(id(p), p.data_ptr(), p.grad.data_ptr()) for p in self._with_gradients() if p.grad is not None]

    def _with_gradients(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _check(parameter: Tensor) -> None:
    shape = tuple(parameter.shape)
    if parameter.dtype is not torch.float32:
        raise IncompatibleTrainer(
            f"optim='adamw_torch_npu_fused' steps float32 parameters, and one of shape {shape} is {parameter.dtype}. "
            f"Use Trainer(precision='bf16-mixed') or '16-mixed', which leave the weights in float32, {_INSTEAD}.",
            code="LO533",
        )
    if not parameter.is_contiguous():
        raise IncompatibleTrainer(
            f"optim='adamw_torch_npu_fused' cannot step a parameter that is not contiguous, and one of shape {shape} "
            f"has strides {parameter.stride()}. Use nn.Parameter(weight.contiguous()), {_INSTEAD}.",
            code="LO533",
        )
