"""``NpuFusedAdamW`` as torch_npu 2.13.0 has it: names, signature and traps, written anew.

The first step moves what has a gradient into flat memory, without owning it, and every step works on the flat memory
alone.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from torch_npu.device import to_cpu, to_npu

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def _at(address: int, like: Tensor, shape: Any) -> Tensor:
    """Returns memory as a tensor that does not own it."""
    size = math.prod(shape) * like.element_size()
    raw = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=like.dtype)
    return to_npu(raw.view(shape), like.device.index)


def _combine(tensors: list[Tensor]) -> Tensor | None:
    """Moves tensors into one, in the order given."""
    if not tensors:
        return None
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise RuntimeError("tensors to combine must be contiguous")
    if len({tensor.untyped_storage().data_ptr() for tensor in tensors}) < len(tensors):
        raise RuntimeError("here the real one would move storages that several tensors have a part in, and mix them up")
    flat = torch.zeros(sum(tensor.numel() for tensor in tensors), dtype=tensors[0].dtype, device=tensors[0].device)
    offset = 0
    for tensor in tensors:
        values = tensor.clone()
        tensor.data = _at(flat.data_ptr() + offset * flat.element_size(), flat, tensor.shape)
        tensor.copy_(values)
        offset += tensor.numel()
    return flat


class NpuFusedAdamW(torch.optim.Optimizer):
    """See above."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        )
        self.params_all_group_combined: list[Tensor | None] = [None, None]
        self.grads_all_group_combined: list[Tensor | None] = [None, None]
        self.is_params_grads_combined = False
        self.is_states_combined = False
        self.is_grads_masks_combined = False
        self.is_fused_optimizer = True

    def _maybe_init_combined_params_and_grads(self) -> None:
        if self.is_params_grads_combined:
            return
        self._groups = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        parameters = [p for group in self._groups for p in group]
        for p in parameters:
            if p.dtype not in (torch.float32, torch.float16):
                raise TypeError(f"parameters must be float32 or float16, not {p.dtype}")
        self.params_all_group_combined[0] = _combine(parameters)
        self.grads_all_group_combined[0] = _combine([p.grad for p in parameters])
        self._parts, start = [], 0
        for group in self._groups:
            size = sum(p.numel() for p in group)
            ends = [
                None if not size else _at(flat.data_ptr() + start * flat.element_size(), flat, (size,))
                for flat in (self.params_all_group_combined[0], self.grads_all_group_combined[0])
            ]
            self._parts.append(ends)
            start += size
        if parameters:
            self.is_params_grads_combined = True

    def _maybe_init_combined_states(self) -> None:
        if self.is_states_combined:
            return
        self.combined_param_states_indexed_by_group = []
        for group, parameters in zip(self.param_groups, self._groups, strict=True):
            names = _MOMENTS if group["amsgrad"] else _MOMENTS[:2]
            for p in parameters:
                state = self.state[p]
                state.setdefault("step", 0)
                for name in names:
                    state[name] = torch.zeros_like(p).copy_(state.get(name, torch.zeros_like(p)))
            flat = {name: _combine([self.state[p][name] for p in parameters]) for name in names}
            flat["step"] = self.state[parameters[0]]["step"] if parameters else 0
            self.combined_param_states_indexed_by_group.append([flat])
        self.is_states_combined = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        self._maybe_init_combined_params_and_grads()
        self._maybe_init_combined_states()
        for index in range(len(self.param_groups)):
            self._group_step(index)
        return loss

    def _group_step(self, group_index: int) -> None:
        group = self.param_groups[group_index]
        for p in group["params"]:
            if p.grad is not None:
                self.state[p]["step"] += 1
        parameter, gradient = self._parts[group_index]
        if parameter is None:
            return
        state = self.combined_param_states_indexed_by_group[group_index][0]
        beta1, beta2 = group["betas"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        state["step"] += 1
        state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        second = state["exp_avg_sq"]
        if group["amsgrad"]:
            second = state["max_exp_avg_sq"].copy_(torch.maximum(state["max_exp_avg_sq"], second))
        denominator = (second.sqrt() / math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1 ** state["step"]))

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = False) -> None:
        if set_to_none:
            raise ValueError("set_to_none is not supported in fused optimizers")
        self._maybe_init_combined_params_and_grads()
        if not self.is_params_grads_combined:
            super().zero_grad(set_to_none)
            return
        self.grads_all_group_combined[0].zero_()

    def clip_grad_norm_fused_(self, max_norm: float, norm_type: float = 2) -> Tensor:
        if not self.is_params_grads_combined:
            with torch.no_grad():
                self._maybe_init_combined_params_and_grads()
        gradient = self.grads_all_group_combined[0]
        norm = to_cpu(gradient).norm(norm_type)
        gradient.mul_(min(1.0, max_norm / (norm.item() + 1e-6)))
        return norm
