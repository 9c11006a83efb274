"""flashoptim's AdamW and Lion, fixed where they differ from torch's optimizers.

https://github.com/databricks/flashoptim; its kernels are written in Triton and run on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import flashoptim
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.errors import IncompatibleTrainer, InvalidOption
from lightning_optim.stepping import StepsUncompiled, laid_out_as, only_valid_groups, uncompiled

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INITIAL_LR = "initial_lr"
# A group's key for the bytes of its weights together with the correction that is kept beside them.
_MASTER_BYTES = "master_bytewidth"
_SETTINGS = "_settings"
_OF_TORCH = frozenset(vars(torch.optim.SGD([torch.zeros(1)])))


class _Flash(StepsUncompiled, flashoptim.FlashOptimizer):
    """What both classes need.

    - float32 weights need no correction: upstream refuses its own default of ``master_weight_bits`` for them.
    - A group with its own learning rate keeps it under a schedule. Upstream writes the constructor's into every group
      as ``initial_lr``, and torch's schedules take that for the peak.
    - A gradient in another memory layout than its parameter's is copied first; upstream raises in the step.
    - A state that was saved with other ``master_weight_bits`` is refused. Upstream would go on with those.
    - It can be copied and pickled. Upstream takes the state of a copy for one that it has to unpack.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **options: Any) -> None:
        params = [{**each, "params": _listed(each)} if isinstance(each, dict) else each for each in params]
        members = [member for each in params for member in (each["params"] if isinstance(each, dict) else [each])]
        # Named ones are pairs.
        tensors = [member[1] if isinstance(member, tuple) else member for member in members]
        if all(tensor.dtype is torch.float32 for tensor in tensors):
            options["master_weight_bits"] = None
        options["lr"] = lr
        super().__init__(params, **options)
        # Those of groups are gone by now, see add_param_group.
        del self.defaults[_INITIAL_LR]
        # What upstream's constructor has set, which torch leaves out of copies.
        self._settings = {name: value for name, value in vars(self).items() if name not in _OF_TORCH}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        own_peak = _INITIAL_LR in param_group
        with only_valid_groups(self):
            super().add_param_group(param_group)
            for parameter in self.param_groups[-1]["params"]:
                _check(parameter, type(self).__name__)
        if not own_peak:
            self.param_groups[-1].pop(_INITIAL_LR, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **self._settings, _SETTINGS: self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if _SETTINGS in state:
            # Of a copy, not of a file.
            Optimizer.__setstate__(self, state)
        else:
            super().__setstate__(state)

    @uncompiled
    @torch.no_grad()
    def _step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None and not gradient.is_sparse and not gradient.is_contiguous():
                    parameter.grad = laid_out_as(parameter, gradient)
        super()._step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what this class or upstream's saved.

        Raises:
            InvalidOption: If it was saved with other ``master_weight_bits``.
        """
        saved = state_dict["param_groups"]
        for own, group in zip(self.param_groups, saved, strict=False):
            before, now = group.get(_MASTER_BYTES, own[_MASTER_BYTES]), own[_MASTER_BYTES]
            if before != now:
                raise InvalidOption(
                    f"the optimizer's state was saved with master_weight_bits={_bits(before)}, and "
                    f"{type(self).__name__} has {_bits(now)} here (None where all weights are float32). Resume with "
                    "the same master_weight_bits and precision, or start anew from the checkpoint's weights: "
                    "LitModel.load_from_checkpoint(path).",
                    code="LO808",
                )
        # Upstream writes into the dict that it is given.
        super().load_state_dict({**state_dict, "state": dict(state_dict["state"])})
        for group, before in zip(self.param_groups, saved, strict=True):
            if _INITIAL_LR not in before:
                group.pop(_INITIAL_LR, None)


class FlashAdamW(_Flash, flashoptim.FlashAdamW):
    """``flashoptim.FlashAdamW``, fixed where it differs from torch's optimizers."""


class FlashLion(_Flash, flashoptim.FlashLion):
    """``flashoptim.FlashLion``, fixed where it differs from torch's optimizers."""


def _check(parameter: Tensor, name: str) -> None:
    shape = tuple(parameter.shape)
    if parameter.dtype not in _DTYPES:
        raise IncompatibleTrainer(
            f"flashoptim's {name} steps float32, bfloat16 and float16 parameters, and one of shape {shape} is "
            f"{parameter.dtype}. Use optim='adamw_torch'.",
            code="LO533",
        )
    if not parameter.is_contiguous():
        raise IncompatibleTrainer(
            f"flashoptim's {name} cannot step a parameter that is not contiguous, and one of shape {shape} has strides "
            f"{parameter.stride()}. Use optim='adamw_8bit' or 'lion_8bit', or nn.Parameter(weight.contiguous()).",
            code="LO533",
        )


def _listed(group: dict[str, Any]) -> list[Any]:
    members = group["params"]
    return [members] if isinstance(members, Tensor) else list(members)


def _bits(bytes_per_weight: int) -> int | None:
    return 8 * bytes_per_weight or None
