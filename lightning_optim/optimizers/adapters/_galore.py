"""GaLore with AdamW, moments quantized block-wise to 8 bits by bitsandbytes' kernels.

8-bit Optimizers via Block-wise Quantization, https://arxiv.org/abs/2110.02861, in the subspaces of GaLore,
https://arxiv.org/abs/2403.03507.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_optim._compat.bitsandbytes import quietly
from lightning_optim._compat.fake import without_modes
from lightning_optim.optimizers._adamw import check_moment
from lightning_optim.optimizers._base import OwnOptimizer, hyperparameters
from lightning_optim.optimizers._galore import GaLoreAdamW
from lightning_optim.optimizers._low_rank import BLOCKS_WOULD_MOVE, MOMENTS, StateDtype
from lightning_optim.optimizers._projection import ProjectionMethod, ProjectionType

with quietly():
    import bitsandbytes.functional as bnb

_BLOCK = 256  # what the kernels are compiled for


class GaLoreAdamW8bit(GaLoreAdamW):
    """:class:`GaLoreAdamW` with 8-bit moments, projected or not.

    A quantized moment consists of ``uint8`` codes in the moment's shape and one float32 scale per block of 256
    (``"exp_avg_absmax"``); in a stack of matrices, blocks may cross from one matrix to the next. Bases are not
    quantized, and the update's arithmetic is float32.

    Args:
        params: Parameters or param groups; all arguments below may differ between groups.
        lr: As in :class:`GaLoreAdamW`.
        betas: As in :class:`GaLoreAdamW`.
        eps: As in :class:`GaLoreAdamW`.
        weight_decay: As in :class:`GaLoreAdamW`.
        rank: As in :class:`GaLoreAdamW`.
        update_proj_gap: As in :class:`GaLoreAdamW`.
        scale: As in :class:`GaLoreAdamW`.
        proj_type: As in :class:`GaLoreAdamW`.
        projection: As in :class:`GaLoreAdamW`.
        match_galore_torch: As in :class:`GaLoreAdamW`.
        min_8bit_size: Moments with fewer elements stay unquantized.
        optim_bits: 8, or 32 for unquantized moments.
        state_dtype: As in :class:`GaLoreAdamW`, for what is not quantized.
        stack_dims: As in :class:`GaLoreAdamW`.
    """

    sharded: ClassVar[bool] = False
    unsharded: ClassVar[str] = BLOCKS_WOULD_MOVE

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 0.0,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: ProjectionType = "std",
        projection: ProjectionMethod = "randomized",
        match_galore_torch: bool = False,
        min_8bit_size: int = 4096,
        optim_bits: int = 8,
        state_dtype: StateDtype = "float32",
        stack_dims: int = 0,
    ) -> None:
        OwnOptimizer.__init__(self, params, hyperparameters(locals()))

    def _initial_moments(self, parameter: Tensor, shape: tuple[int, ...], group: dict[str, Any]) -> dict[str, Any]:
        elements = math.prod(shape)
        # The kernels take float32: a float64 parameter keeps float64 moments.
        if group["optim_bits"] == 32 or elements < group["min_8bit_size"] or parameter.dtype is torch.float64:
            return super()._initial_moments(parameter, shape, group)
        moments: dict[str, Any] = {}
        for name in MOMENTS:
            moments[name] = torch.zeros(shape, dtype=torch.uint8, device=parameter.device)
            # float32 for the kernels: Lightning's bf16-true changes the default dtype.
            blocks = -(-elements // _BLOCK)
            moments[f"{name}_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
        return moments

    def _loaded(self, tensors: Mapping[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
        if parameter.dtype is torch.float64:
            tensors = _dequantized(tensors)
        return super()._loaded(tensors, parameter)

    def _adamw(
        self,
        parameters: Sequence[Tensor],
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        step: int,
        group: dict[str, Any],
    ) -> None:
        items = list(zip(parameters, weights, gradients, strict=True))
        for parameter, weight, gradient in items:
            if self._is_quantized(parameter):
                weight.mul_(1 - float(group["lr"]) * group["weight_decay"])
                self._add_update(parameter, weight, gradient, step, group, float(group["lr"]))
        others = [item for item in items if not self._is_quantized(item[0])]
        own, values, found = ([item[index] for item in others] for index in range(3))
        super()._adamw(own, values, found, step, group)

    def _adamw_of(
        self, parameters: Sequence[Tensor], low: Tensor, step: int, group: dict[str, Any], lr: float = 1.0
    ) -> Tensor:
        if not self._is_quantized(parameters[0]):
            return super()._adamw_of(parameters, low, step, group, lr)
        updates = torch.zeros_like(low)
        counts = parameters[0].shape[: group["stack_dims"]]
        shape = len(parameters), *counts, *low.shape[1:]
        for parameter, update, gradient in zip(parameters, updates.view(shape), low.reshape(shape), strict=True):
            self._add_update(parameter, update, gradient, step, group, lr)
        return updates

    def _is_quantized(self, parameter: Tensor) -> bool:
        return bool(self.state[parameter]["exp_avg"].dtype is torch.uint8)

    def _add_update(
        self, parameter: Tensor, weight: Tensor, gradient: Tensor, step: int, group: dict[str, Any], lr: float
    ) -> None:
        """Adds Adam's update to ``weight``, with the quantized moments of ``parameter``."""
        state = self.state[parameter]
        check_moment(gradient, state["exp_avg"])
        bnb.optimizer_update_8bit_blockwise(
            "adam",
            gradient,
            weight,
            state["exp_avg"],
            state["exp_avg_sq"],
            *group["betas"],
            beta3=0.0,
            alpha=0.0,
            eps=group["eps"],
            step=step,
            lr=lr,
            qmap1=_code(True, weight.device),
            qmap2=_code(False, weight.device),
            absmax1=state["exp_avg_absmax"],
            absmax2=state["exp_avg_sq_absmax"],
        )


@functools.cache
def _code(signed: bool, device: torch.device) -> Tensor:
    """Returns the 256 float32 values of the codes, one table per device."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # Kept for good, so none without values.
        with without_modes(), torch.device("cpu"):
            table: Tensor = bnb.create_dynamic_map(signed=signed)
    finally:
        torch.set_default_dtype(default)
    return table.to(device)


def _dequantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state's tensors with its moments dequantized."""
    others = {name: tensor for name, tensor in tensors.items() if f"{name}_absmax" not in tensors}
    for name in MOMENTS:
        scales = tensors.get(f"{name}_absmax")
        if scales is None:
            continue
        del others[f"{name}_absmax"]
        codes = tensors[name]
        values = _code(name == MOMENTS[0], codes.device)[codes.flatten().long()]
        others[name] = values.mul_(scales.repeat_interleave(_BLOCK)[: values.numel()]).view(codes.shape)
    return others
