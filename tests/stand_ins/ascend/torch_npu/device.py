"""The device "npu" in Python: its memory is the machine's own, its kernels are the CPU's.

A tensor "on the NPU" differs from one on the CPU in its device alone. What torch dispatches to the device comes to
:func:`_kernel`, which runs the CPU's kernel on the same memory. So it shows where tensors are, what is mixed, and what
is refused; it shows nothing about Ascend's kernels.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICES = 2
_CPU, _EXTENSION = 1, 12  # DLPack's numbers
_ON_CPU = DispatchKeySet(DispatchKey.CPU)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_library = torch.library.Library("_", "IMPL")
_npu = torch.library.Library("aten", "IMPL", "PrivateUse1")
_autocast = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
_ATEN = torch.ops.aten
_clone_storage = torch.UntypedStorage.clone


class _Module:
    """What torch looks for under ``torch.npu``."""

    current = 0

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return DEVICES

    @classmethod
    def current_device(cls) -> int:
        return cls.current

    @classmethod
    def set_device(cls, device: Any) -> None:
        cls.current = torch.device(device).index

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @staticmethod
    def empty_cache() -> None:
        pass

    @staticmethod
    def memory_stats(device: Any = None) -> dict[str, int]:
        return {"allocated_bytes.all.current": 0}


def _same_memory(tensor: Tensor, kind: int, index: int) -> Tensor:
    capsule = torch._C._to_dlpack(tensor.detach())
    device = (ctypes.c_int32 * 2).from_address(_pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p))
    device[:] = kind, index
    return torch._C._from_dlpack(capsule)


def to_npu(tensor: Tensor, index: int = 0) -> Tensor:
    """Returns the memory of a CPU tensor as a tensor on the NPU."""
    return _same_memory(tensor, _EXTENSION, index)


def to_cpu(tensor: Tensor) -> Tensor:
    """Returns the memory of a tensor on the NPU as one on the CPU."""
    if not tensor.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return _same_memory(tensor, _CPU, 0)


def _kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs the CPU's kernel; results lie on the NPU, where they are views or the arguments themselves, too."""
    if op.name().startswith("aten::set_"):
        return op.redispatch(_ON_CPU, *args, **kwargs)
    flat, structure = pytree.tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, Tensor) and x.device.type == "npu"]
    devices = [x for x in flat if isinstance(x, torch.device) and x.type == "npu"]
    index = (devices or [tensor.device for tensor in tensors])[0].index or 0
    raw = {id(tensor): to_cpu(tensor) for tensor in tensors}
    cpu = [torch.device("cpu") if isinstance(x, torch.device) else raw.get(id(x), x) for x in flat]
    cpu_args, cpu_kwargs = pytree.tree_unflatten(cpu, structure)
    if op.name() == "aten::_copy_from":
        cpu_args[1].copy_(cpu_args[0])
        return args[1]
    arguments = {id(raw[id(tensor)]): tensor for tensor in tensors}
    owners = {raw[id(tensor)].untyped_storage()._cdata: tensor for tensor in tensors}

    def back(result: Tensor) -> Tensor:
        if id(result) in arguments:
            tensor = arguments[id(result)]
            if tensor.shape != result.shape:  # out= that was empty
                tensor.data = to_npu(result, index)
            return tensor
        owner = owners.get(result.untyped_storage()._cdata)
        if owner is not None:
            offset = owner.storage_offset() + result.storage_offset()
            view = _ATEN.as_strided.default
            return view.redispatch(_ON_CPU, owner, result.shape, result.stride(), offset)
        return to_npu(result, index)

    return pytree.tree_map_only(Tensor, back, op(*cpu_args, **cpu_kwargs))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The one operation that autocast casts here; the model of the tests has no other that the CPU's would cast."""
    dtype = torch.get_autocast_dtype("npu")
    cast = [None if tensor is None else tensor.to(dtype) for tensor in (x, weight, bias)]
    with torch._C._ExcludeDispatchKeyGuard(DispatchKeySet(DispatchKey.AutocastPrivateUse1)):
        return _ATEN.linear(*cast)


def _clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Takes the place of the storage's own method, for which a device in Python has no allocator."""
    if storage.device.type != "npu":
        return _clone_storage(storage)
    return torch.empty(storage.nbytes(), dtype=torch.uint8, device=storage.device).untyped_storage().copy_(storage)


def register_device() -> None:
    """Tells torch of the device; there is no way back in this process."""
    torch.UntypedStorage.clone = _clone
    _setup_privateuseone_for_python_backend("npu", backend_module=_Module)
    _library.fallback(_kernel, "PrivateUse1")
    # The first, torch would compose of others elsewhere, which round differently; the others are its fused AdamW, which
    # it looks for.
    for op in (_ATEN.native_layer_norm.default, _ATEN._fused_adamw_.default, _ATEN._fused_adamw_.tensor_lr):
        _npu.impl(op.name().removeprefix("aten::"), functools.partial(_kernel, op))
    _library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _autocast.impl("linear", _linear)
