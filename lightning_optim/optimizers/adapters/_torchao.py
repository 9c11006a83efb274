"""torchao's low-bit AdamW with checkpoints of plain tensors.

torchao keeps quantized states in tensor subclasses. Lightning cannot load those (torch refuses its callable
``map_location`` for wrapper subclasses, and with ``weights_only=True`` the classes are not yet known when the file is
read), and neither deepcopy nor asynchronous saving works. Here ``state_dict()`` stores each quantized tensor as a dict
of plain parts, and ``load_state_dict()`` reads both that and upstream's form.

As in torchao, the learning rate is a 0-dim float32 tensor, but floats assigned to ``group["lr"]`` (by
``Tuner.lr_find``, by hand) work, too.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, ClassVar

import torch
import torchao.optim
from torch import Tensor
from torch.optim import Optimizer
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8

from lightning_optim._compat.torchao import AdamBase
from lightning_optim.errors import IncompatibleTrainer
from lightning_optim.stepping import StepsUncompiled, uncompiled

_PACKED = "torchao_quantized"
# Below it, Triton has no conversion to 8-bit floats (float8_e4m3fn).
_FP8_CAPABILITY = (8, 9)
# What its constructor sets and Optimizer.__getstate__ leaves out.
_ATTRIBUTES = ("block_size", "bf16_stochastic_round", "is_adamw")
_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def pack(state: Any) -> Any:
    """Returns a quantized state tensor as a dict of plain tensors and numbers, anything else unchanged."""
    if isinstance(state, OptimStateFp8):
        # As bytes, because not every operation takes 8-bit floats: comparing, sending and mapping files do not.
        codes = state.codes.view(torch.uint8)
        return {_PACKED: "fp8", "codes": codes, "scale": state.scale, "dtype": str(state.dtype).removeprefix("torch.")}
    if not isinstance(state, (OptimState4bit, OptimState8bit)):
        return state
    return {
        _PACKED: 4 if isinstance(state, OptimState4bit) else 8,
        "codes": state.codes,
        "scale": state.scale,
        "qmap": state.qmap,
        "signed": state.signed,
        "shape": list(state.shape),
        "dtype": str(state.dtype).removeprefix("torch."),
    }


def unpack(packed: Any, device: torch.device) -> Any:
    """Inverse of :func:`pack`; the tensor lies on ``device``."""
    if not isinstance(packed, dict) or _PACKED not in packed:
        return packed
    # Copies, as load_state_dict makes them: the optimizer must not write into the caller's state dict.
    tensors = (packed[name].detach().to(device, copy=True) for name in ("codes", "scale", "qmap") if name in packed)
    dtype = _DTYPES[packed["dtype"]]
    if packed[_PACKED] == "fp8":
        codes, scale = tensors
        return OptimStateFp8(codes.view(torch.float8_e4m3fn), scale, dtype=dtype)
    codes, scale, qmap = tensors
    signed = packed["signed"]
    if packed[_PACKED] == 4:
        return OptimState4bit(codes, scale, qmap, signed, torch.Size(packed["shape"]), dtype=dtype)
    return OptimState8bit(codes, scale, qmap, signed, dtype=dtype)


def _packed(state: Any) -> Any:
    """Returns one parameter's state in plain tensors; what belongs to no parameter may be anything."""
    return {name: pack(value) for name, value in state.items()} if isinstance(state, dict) else state


class _PlainCheckpoints(StepsUncompiled, AdamBase):
    """torchao's AdamW with plain state dicts, float learning rates and full-precision groups."""

    # load_state_dict sets quantized tensors itself, see lightning_optim.build._resume.
    loads_in_parts: ClassVar = True

    def state_dict(self) -> dict[str, Any]:
        state_dict = super().state_dict()
        state_dict["state"] = {index: _packed(state) for index, state in state_dict["state"].items()}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # torch casts every floating-point state to the parameter's dtype and deep-copies dicts: it gets only the other
        # entries; quantized ones and the float32 ones of full-precision groups are set afterwards.
        reserved = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        saved: dict[Any, Any] = {}
        indices: list[Any] = []

        def keep(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            saved.update(given["state"])
            indices.extend(index for group in given["param_groups"] for index in group["params"])
            plain = {
                index: {name: value for name, value in saved[index].items() if name not in reserved}
                for index in indices
                if index in saved
            }
            return {**given, "state": {**saved, **plain}}

        # Runs after hooks registered by others, which may translate a state dict.
        handle = self.register_load_state_dict_pre_hook(keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for name in reserved:
                if name in saved.get(index, {}):
                    self.state[parameter][name] = self._restored(saved[index][name], parameter)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy needs, in plain tensors: quantized ones cannot be cloned."""
        packed = {key: _packed(state) for key, state in self.state.items()}
        return {**super().__getstate__(), "state": packed, **{name: getattr(self, name) for name in _ATTRIBUTES}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        packed, self.state = self.state, defaultdict(dict)
        for key, own in packed.items():
            whole = isinstance(own, dict) and isinstance(key, Tensor)
            self.state[key] = {name: unpack(value, key.device) for name, value in own.items()} if whole else own

    @staticmethod
    def _restored(value: Any, parameter: Tensor) -> Tensor:
        # Upstream's own files hold the subclasses themselves.
        restored = unpack(pack(value), parameter.device)
        return restored if restored is not value else value.detach().to(parameter.device, copy=True)

    def quantizes(self, parameter: Tensor) -> bool:
        unquantized = (group["params"] for group in self.param_groups if group.get("optim_bits") == 32)
        return not any(parameter is other for members in unquantized for other in members)

    @uncompiled
    def _step(self) -> None:
        for group in self.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
        super()._step()


class AdamW8bit(_PlainCheckpoints, torchao.optim.AdamW8bit):
    """``torchao.optim.AdamW8bit`` whose state dict holds plain tensors."""


class AdamW4bit(_PlainCheckpoints, torchao.optim.AdamW4bit):
    """``torchao.optim.AdamW4bit`` whose state dict holds plain tensors."""


class AdamWFp8(_PlainCheckpoints, torchao.optim.AdamWFp8):
    """``torchao.optim.AdamWFp8`` whose state dict holds plain tensors, 8-bit floats as bytes."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for device in {parameter.device for parameter in self.param_groups[-1]["params"]}:
            if device.type != "cuda":
                continue
            major, minor = torch.cuda.get_device_capability(device)
            if (major, minor) < _FP8_CAPABILITY:
                raise IncompatibleTrainer(
                    "optim='adamw_torch_fp8' needs a GPU of compute capability 8.9 or newer (Ada, Hopper), and "
                    f"{torch.cuda.get_device_name(device)} has {major}.{minor}. Use optim='adamw_torch_8bit'.",
                    code="LO532",
                )
