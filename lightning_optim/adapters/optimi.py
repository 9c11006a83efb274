"""``optimi.StableAdamW`` that moves between devices and takes ``betas`` per group."""

from __future__ import annotations

from typing import Any

import optimi
from optimi.utils import HAS_TRITON
from torch import Tensor


class StableAdamW(optimi.StableAdamW):
    """``optimi.StableAdamW``, mended in two places.

    Upstream stores its decision for Triton kernels in the param group and hence in checkpoints, so that a checkpoint
    from a GPU fails on a CPU: here the decision is taken anew when a state dict is loaded. And a param group may hold
    ``betas`` as it may everywhere in PyTorch; upstream wants ``beta1`` and ``beta2``.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "betas" in param_group:
            param_group["beta1"], param_group["beta2"] = param_group.pop("betas")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        kernels = [(group["foreach"], group["triton"]) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, (foreach, triton) in zip(self.param_groups, kernels, strict=True):
            group["foreach"] = foreach
            group["triton"] = _on_gpu(group["params"]) if triton is None and foreach is None else triton


def _on_gpu(parameters: list[Tensor]) -> bool:
    return bool(HAS_TRITON and all(parameter.device.type in ("cuda", "xpu") for parameter in parameters))
