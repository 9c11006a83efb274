"""What the monitor tells apart (param groups or layers), and what it reads from groups and states."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim._compat import kernels
from lightning_optim.optimizers import OwnOptimizer
from lightning_optim.stepping import Layout, is_sharded
from lightning_optim.stepping import local as part_of

Per = Literal["group", "layer"]

# Where optimizers keep their first moment: torch's and ours, bitsandbytes' if it is not quantized.
_MOMENTA = ("exp_avg", "momentum_buffer", "state1")


class Units:
    """Which unit each parameter of an optimizer belongs to; units keep their numbers when parameters are added.

    Args:
        names: The parameters' names in the module.
        per: ``"group"`` or ``"layer"``.
    """

    def __init__(self, names: Mapping[Tensor, str], per: Per) -> None:
        self._names = names
        self._per = per
        #: The names of the units, ``""`` for a single group without a name, which is all there is.
        self.names: list[str] = []
        #: By ``id`` of a parameter: the number of its unit, its group, and how much of its squares this process adds.
        self.unit: dict[int, int] = {}
        self.group: dict[int, dict[str, Any]] = {}
        self.share: dict[int, float] = {}
        #: Whether processes hold shards, so that sums go over all of them.
        self.sharded = False

    def update(self, optimizer: Optimizer) -> None:
        """Takes the parameters of an optimizer that are not known yet."""
        self.sharded = any(is_sharded(parameter) for group in optimizer.param_groups for parameter in group["params"])
        for group, name in zip(optimizer.param_groups, group_names(optimizer), strict=True):
            for parameter in group["params"]:
                self.group[id(parameter)] = group
                self.share[id(parameter)] = _share(parameter) if self.sharded else 1.0
                if id(parameter) in self.unit:
                    continue
                unit = name if self._per == "group" else self._layer(parameter)
                if unit not in self.names:
                    self.names.append(unit)
                self.unit[id(parameter)] = self.names.index(unit)

    def name(self, key: int) -> str:
        """Returns the name of the unit of a parameter, by its ``id``."""
        return self.names[self.unit[key]]

    def _layer(self, parameter: Tensor) -> str:
        name = self._names.get(parameter, "").replace("_orig_mod.", "")
        return name.rpartition(".")[0] or name or "unnamed"


def group_names(optimizer: Optimizer) -> list[str]:
    """Returns the groups' names, as ``LearningRateMonitor`` gives them: their own, or ``pg1``, ``pg2`` ..."""
    groups = optimizer.param_groups
    if len(groups) == 1:
        return [str(groups[0].get("name", ""))]
    names = [str(group.get("name", f"pg{number}")) for number, group in enumerate(groups, 1)]
    return [name if names.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(names, 1)]


def used_rate(optimizer: Optimizer, group: dict[str, Any]) -> float | Tensor:
    """Returns the learning rate of a group's last step, where the optimizer makes it of the group's itself."""
    if isinstance(optimizer, OwnOptimizer):
        return optimizer.used_rate(group)
    if group.get("scheduled_lr"):  # schedule-free with its warm-up
        return cast("float | Tensor", group["scheduled_lr"])
    if "d" in group and "d0" in group:  # D-Adaptation, Prodigy
        return cast("float | Tensor", group["d"] * group["lr"])
    rate: float | Tensor = group["lr"]
    return rate


def local(tensor: Tensor) -> Tensor:
    """Returns the numbers that this process has of a tensor, outside of autograd; of a sparse one those it stores."""
    if type(tensor) is Tensor and not tensor.requires_grad and not tensor.is_sparse:
        return tensor
    tensor = part_of(tensor.detach())
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def momentum_norm(parameter: Tensor, state: Mapping[str, Any]) -> Tensor | None:
    """Returns the norm of the first moment in a parameter's state, 0-dim, or ``None`` if that cannot be read.

    Of a sharded one it is what counts with the parameter's share: processes may hold the same of a moment, and
    different parts of the parameter.
    """
    found = next((state[name] for name in _MOMENTA if isinstance(state.get(name), Tensor)), None)
    if found is None:
        return None
    if type(found) is not Tensor and hasattr(found, "dequantize") and not is_sharded(found):
        found = found.dequantize()  # torchao's
    if not found.is_floating_point():
        return None
    (norm,) = norms([local(found)])
    return norm * math.sqrt(Layout.of(found).parts() / Layout.of(parameter).parts()) if is_sharded(found) else norm


def state_bytes(states: Iterable[Mapping[str, Any]]) -> int:
    """Returns the bytes of the tensors in states that this process holds; what states share is counted once."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for state in states
        for tensor in _tensors(state)
        for storage in [tensor.untyped_storage()]
    }
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, Tensor):
        flatten = getattr(value, "__tensor_flatten__", None)
        if is_sharded(value):
            yield local(value)
        elif flatten is None:
            yield value
        else:
            for name in flatten()[0]:  # quantized in a subclass (torchao)
                yield from _tensors(getattr(value, name))


def _share(parameter: Tensor) -> float:
    """Returns the weight of a process's squares in the sum over all processes, of which several may hold the same."""
    return Layout.of(parameter).parts() / dist.get_world_size()


def norms(tensors: list[Tensor]) -> list[Tensor]:
    """Returns the 2-norms of tensors, 0-dim; of two-byte numbers in float32, lest they are rounded or overflow."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        return [norm for tensor in tensors for norm in norms([tensor])]
    return list(kernels.foreach_norm(tensors, 2, torch.float32 if dtypes.pop().itemsize < 4 else None))
