"""What the optimizers we own have in common: the walk over the groups, precision, refusals and the state dict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.errors import InvalidOption, InvalidParamGroups
from lightning_optim.stepping import (
    FORMAT,
    MARKS,
    StepsUncompiled,
    is_sharded,
    only_valid_groups,
    refuse_foreign,
    uncompiled,
)

# Elements of the parameters that are updated together.
_TEMPORARY = 2**24


class OwnOptimizer(StepsUncompiled):
    """Base of the optimizers we own.

    A subclass gives the state that a parameter starts with (:meth:`_initial_state`) and updates parameters of one kind
    together (:meth:`_update`): same number of steps, device and dtype. So every scalar of an update is one
    Python number, and the arithmetic is done by operations over lists or stacks of tensors.

    The arithmetic is float32 for parameters of two bytes per element and in the parameter's dtype for others, and so
    are the states unless the algorithm says otherwise. So they are when a state dict is loaded, whatever the dtype of
    the parameters it was saved for; ``torch.optim.Optimizer`` casts states to the parameter's.

    A parameter's state is in ``self.state`` alone and nothing depends on which other parameters are stepped with it:
    the layerwise engine steps buckets with the same results.

    Args:
        params: Parameters or param groups, real and dense.
        defaults: The groups' hyperparameters.

    Raises:
        InvalidParamGroups: If a parameter is complex, or sharded (a DTensor) and the algorithm cannot tell its shards.
        InvalidOption: If a state dict of another format is loaded.
    """

    #: Number of the state's format; raised when what a state dict holds changes its meaning.
    version: ClassVar[int] = 1
    #: Whether the update is right on a shard of a parameter.
    sharded: ClassVar[bool] = False

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        # The state dict that is being loaded.
        self._taken: dict[str, Any] | None = None
        super().__init__(params, {**defaults, FORMAT: self.format()})

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the state before the first step; ``"step"`` is added to it."""
        raise NotImplementedError

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        """Takes step number ``step`` (the first is 1) with parameters of one kind, in place."""
        raise NotImplementedError

    def _steppable(self, parameters: list[Tensor]) -> list[Tensor]:
        """Returns the parameters to step, of one group and with gradients."""
        return parameters

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises what the class says about a group that cannot be stepped as its values ask."""
        for name in ("lr", "eps", "weight_decay", "betas"):
            value = group.get(name, 0.0)
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            if not all(number >= 0 and (name != "betas" or number < 1) for number in numbers):
                allowed = "0 <= value < 1" if name == "betas" else "0 <= value"
                raise InvalidOption(f"{name}={value!r} of {type(self).__name__} is out of range: {allowed}")
        for parameter in group["params"]:
            self._check(parameter)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        with only_valid_groups(self):
            super().add_param_group(param_group)
            self._check_group(self.param_groups[-1])

    @uncompiled
    @torch.no_grad()
    def _step(self) -> None:
        for group in self.param_groups:
            alive = [parameter for parameter in group["params"] if parameter.grad is not None and parameter.numel()]
            self._refuse_sparse(alive)
            kinds: dict[tuple[int, Any, Any, Any], list[Tensor]] = {}
            for parameter in self._steppable(alive) if alive else ():
                # By type: a DTensor and a plain tensor do not go into one operation.
                kind = self._begin(parameter, group), parameter.device, parameter.dtype, type(parameter)
                kinds.setdefault(kind, []).append(parameter)
            for (step, device, *_), parameters in kinds.items():
                # Stepped inside training_step (manual optimization), there may be an autocast around.
                with _without_autocast(device.type):
                    for part in _parts(parameters):
                        self._update(part, step, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads as torch does, but state tensors are of the dtype to compute in, not of the parameter's.

        As torch has it, hyperparameters come from the state dict.

        Raises:
            InvalidOption: If another optimizer, or a newer version of this one, wrote ``state_dict``, or if its groups
                held other parameters (where the groups name them in ``"members"``).
        """
        marks = [{key: group[key] for key in MARKS if key in group} for group in self.param_groups]
        # After the hooks of others, which may translate a state dict.
        handle = self.register_load_state_dict_pre_hook(OwnOptimizer._take_tensors)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._taken = None
        for group, own in zip(self.param_groups, marks, strict=True):
            group.update(own)

    @staticmethod
    def _take_tensors(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Checks a state dict and hands it on without its tensors, which torch would cast."""
        assert isinstance(optimizer, OwnOptimizer)
        refuse_foreign(optimizer.param_groups, state_dict["param_groups"], type(optimizer).__name__, marked_only=True)
        optimizer._taken = state_dict
        plain = {
            identity: {name: value for name, value in state_dict["state"][identity].items() if not _is_tensor(value)}
            for group in state_dict["param_groups"]
            for identity in group["params"]
            if identity in state_dict["state"]
        }
        # What belongs to no parameter torch takes as it is.
        return {**state_dict, "state": {**state_dict["state"], **plain}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        taken = vars(self).setdefault("_taken", None)
        if taken is None:
            return
        # load_state_dict is under way: hooks that follow see the whole state.
        ids = [identity for group in taken["param_groups"] for identity in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for identity, parameter in zip(ids, parameters, strict=True):
            tensors = {name: value for name, value in taken["state"].get(identity, {}).items() if _is_tensor(value)}
            if "step" in tensors:
                self.state[parameter]["step"] = int(tensors.pop("step"))
            if tensors:
                self.state[parameter].update(self._loaded(tensors, parameter))

    def _loaded(self, tensors: Mapping[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
        """Returns copies for ``parameter`` of a state's tensors, saved perhaps for one of another dtype or device."""
        dtypes = {name: self._loaded_dtype(tensor, parameter) for name, tensor in tensors.items()}
        return {name: tensors[name].detach().to(parameter.device, dtypes[name], copy=True) for name in tensors}

    def _loaded_dtype(self, tensor: Tensor, parameter: Tensor) -> torch.dtype:
        """Returns the dtype that a tensor of a state takes with a parameter: that to compute in, if it was of one."""
        wide = compute_dtype(parameter)
        computes = tensor.dtype in (torch.float32, torch.float64) or (
            tensor.is_floating_point() and wide is torch.float64
        )
        return wide if computes else tensor.dtype

    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> int:
        """Counts a step of a parameter, the first one from its initial state."""
        state = self.state[parameter]
        if "step" not in state:
            state.update({"step": 0, **self._initial_state(parameter, group), **state})
        state["step"] += 1
        step: int = state["step"]
        return step

    def _refuse_sparse(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                raise InvalidParamGroups(
                    f"{type(self).__name__} cannot step the sparse gradient of a parameter of shape "
                    f"{tuple(parameter.shape)}. Create its embedding with sparse=False, or use optim='adagrad' or "
                    "'sgd'."
                )

    def _check(self, parameter: Tensor) -> None:
        if torch.is_complex(parameter):
            raise InvalidParamGroups(
                f"{type(self).__name__} cannot step a {parameter.dtype} parameter. Use optim='adamw_torch', or store "
                "real and imaginary parts (torch.view_as_real)."
            )
        if is_sharded(parameter) and not self.sharded:
            raise InvalidParamGroups(
                f"{type(self).__name__} looks at whole matrices and cannot step a sharded parameter (DTensor). Use "
                "optim='adamw_torch', or a strategy that does not shard."
            )

    @classmethod
    def format(cls) -> str:
        """Returns the format of its state, as its groups carry it."""
        return f"{cls.__name__}/{cls.version}"


def hyperparameters(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a constructor, its ``locals()``, as defaults of the groups under the same names."""
    return {name: value for name, value in arguments.items() if name not in ("self", "params", "__class__")}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """Returns the dtype to compute in: float32 for bfloat16 and float16, the parameter's own for others."""
    return torch.promote_types(parameter.dtype, torch.float32)


def to_compute_dtype(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns the tensors in their compute dtype and contiguous: themselves where they are so, else copies."""
    return [_converted(tensor, compute_dtype(tensor)) for tensor in tensors]


def write_back(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Rounds ``values``, made of ``parameters`` by :func:`to_compute_dtype`, back into them where they are copies."""
    for parameter, value in zip(parameters, values, strict=True):
        if parameter.dtype is not value.dtype or not parameter.is_contiguous():
            parameter.copy_(value)


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Returns the gradients in their parameters' compute dtype, contiguous."""
    return [_converted(p.grad, compute_dtype(p)) for p in parameters if p.grad is not None]


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Asked first: operations that do nothing take most of the time of a step over many small tensors.
    return tensor if tensor.dtype is dtype and tensor.is_contiguous() else tensor.detach().to(dtype).contiguous()


def _parts(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Divides parameters so that temporary copies of a part stay small, unless a single one is large."""
    part: list[Tensor] = []
    elements = 0
    for parameter in parameters:
        if part and elements + parameter.numel() > _TEMPORARY:
            yield part
            part, elements = [], 0
        part.append(parameter)
        elements += parameter.numel()
    yield part


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
