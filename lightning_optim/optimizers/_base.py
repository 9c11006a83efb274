"""What our own optimizers share: the loop over the groups, precision, refusals and the state dict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.errors import InvalidOption, InvalidParamGroups
from lightning_optim.stepping import (
    FORMAT,
    MARKS,
    Layout,
    SpreadsStates,
    StepsUncompiled,
    Update,
    is_sharded,
    local,
    only_valid_groups,
    refuse_foreign,
    run_together,
    spread_alike,
    uncompiled,
)

# How many elements are updated together at most.
_TEMPORARY = 2**24

_Item = TypeVar("_Item")


class OwnOptimizer(SpreadsStates, StepsUncompiled):
    """Base of our own optimizers.

    A subclass provides a parameter's initial state (:meth:`_initial_state`) and updates all parameters with the same
    step count, device and dtype together (:meth:`_update`). Every scalar of an update is therefore one Python number,
    and the arithmetic runs over lists or stacks of tensors.

    Arithmetic and, unless the algorithm says otherwise, states are float32 for parameters of two bytes per element and
    in the parameter's dtype for others. That also holds for a loaded state dict, whatever the dtype of the parameters
    it was saved for; ``torch.optim.Optimizer`` casts states to the parameter's dtype.

    All state is in ``self.state``, and no parameter's update depends on which others are stepped with it: the layerwise
    engine steps buckets with the same results.

    A sharded parameter (a DTensor) is stepped as a plain tensor, this process's part of it: that is what
    :meth:`_initial_state` and :meth:`_update` see, in the state, too, while ``self.state`` keeps DTensors.
    :meth:`layout` says what the whole is like. What an update needs of other processes it yields, see
    :class:`~lightning_optim.stepping.Sum`.

    Args:
        params: Parameters or param groups, real and dense.
        defaults: The groups' hyperparameters.

    Raises:
        InvalidParamGroups: If a parameter is complex, or sharded (a DTensor) and the algorithm needs whole matrices.
        InvalidOption: If a state dict of another format is loaded.
    """

    #: Version of the state's format; incremented when the meaning of a state dict changes.
    version: ClassVar[int] = 1
    #: Whether the update is correct on a shard of a parameter, and why if it is not.
    sharded: ClassVar[bool] = False
    unsharded: ClassVar[str] = ""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        # The state dict being loaded.
        self._taken: dict[str, Any] | None = None
        # The sharded parameters of the parts that are stepped for them.
        self._origins: dict[Tensor, Tensor] = {}
        super().__init__(params, {**defaults, FORMAT: self.format()})

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the state before the first step; ``"step"`` is added to it."""
        raise NotImplementedError

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> Update | None:
        """Takes step number ``step`` (the first is 1) in place, with parameters of the same device and dtype.

        What needs sums over whole parameters is a generator; the parameters are spread over the same processes, alike.
        """
        raise NotImplementedError

    def _dims(self, name: str, parameter: Tensor, value: Tensor) -> Sequence[int | None]:
        """Returns which dimension of a parameter each of a state tensor's follows; ``None`` where it is not sharded."""
        return range(value.ndim) if value.shape == parameter.shape else (None,) * value.ndim

    def origin(self, parameter: Tensor) -> Tensor:
        """Returns the parameter that an update sees this process's part of."""
        return self._origins.get(parameter, parameter) if self._origins else parameter

    def layout(self, parameter: Tensor) -> Layout:
        """Returns how what an update sees as a parameter is spread."""
        return Layout.of(self.origin(parameter))

    def _steppable(self, parameters: list[Tensor]) -> list[Tensor]:
        """Returns which of these parameters of one group, all with gradients, to step."""
        return parameters

    def used_rate(self, group: dict[str, Any]) -> float:
        """Returns the learning rate of a group's last step."""
        return float(group["lr"])

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuses a group with values out of range or parameters that cannot be stepped."""
        for name in ("lr", "eps", "weight_decay", "betas"):
            value = group.get(name, 0.0)
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            if not all(number >= 0 and (name != "betas" or number < 1) for number in numbers):
                allowed = "0 <= value < 1" if name == "betas" else "0 <= value"
                raise InvalidOption(
                    f"{name}={value!r} of {type(self).__name__} is out of range: {allowed}", code="LO204"
                )
        for parameter in group["params"]:
            self._check(parameter)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        with only_valid_groups(self):
            super().add_param_group(param_group)
            self._check_group(self.param_groups[-1])

    @uncompiled
    @torch.no_grad()
    def _step(self) -> None:
        sharded: list[tuple[list[Tensor], int, dict[str, Any], int]] = []
        for group in self.param_groups:
            live = [parameter for parameter in group["params"] if parameter.grad is not None and parameter.numel()]
            self._refuse_sparse(live)
            kinds: dict[tuple[int, Any, Any, Any], list[tuple[Tensor, int]]] = {}
            for parameter in self._steppable(live) if live else ():
                # A layout is made for shards only, and once: a step may be over many small tensors.
                layout = Layout.of(parameter) if is_sharded(parameter) else None
                spread, elements = (None, parameter.numel()) if layout is None else (layout.spread, layout.largest)
                kind = self._begin(parameter, group), parameter.device, parameter.dtype, spread
                kinds.setdefault(kind, []).append((parameter, elements))
            for (step, device, _, spread), sized in kinds.items():
                for part in _parts(sized, lambda each: each[-1]):
                    parameters = [parameter for parameter, _ in part]
                    if spread is not None:
                        sharded.append((parameters, step, group, sum(elements for _, elements in part)))
                        continue
                    # In training_step (manual optimization), autocast may be active.
                    with _without_autocast(device.type):
                        run_together([self._update(parameters, step, group)])
        # Of all groups, so that they send together.
        for some in _parts(sharded, lambda each: each[-1]):
            with _without_autocast(some[0][0][0].device.type):
                run_together(self._update_shards(parameters, step, group) for parameters, step, group, _ in some)

    def _update_shards(self, parameters: Sequence[Tensor], step: int, group: dict[str, Any]) -> Update:
        """Updates this process's parts of sharded parameters."""
        with self.as_parts(parameters) as parts:
            update = self._update(parts, step, group)
            if update is not None:
                yield from update

    @contextmanager
    def as_parts(self, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yields plain tensors in the memory of sharded parameters, with gradients and state; keeps new state.

        Parameters that are whole are yielded as they are.
        """
        if not any(map(is_sharded, parameters)):
            yield [*parameters]
            return
        parts: list[Tensor] = [local(parameter) for parameter in parameters]
        states = [{name: local(value) for name, value in self.state[p].items()} for p in parameters]
        for parameter, part, state in zip(parameters, parts, states, strict=True):
            self._origins[part], self.state[part] = parameter, dict(state)
            if parameter.grad is not None:
                part.grad = local(spread_alike(parameter.grad, parameter))
        try:
            yield parts
            for parameter, part, state in zip(parameters, parts, states, strict=True):
                for name, value in self.state[part].items():
                    if not isinstance(value, Tensor):
                        self.state[parameter][name] = value
                    elif value is not state.get(name):
                        dims = self._dims(name, part, value)
                        self.state[parameter][name] = Layout.of(parameter).followed(dims, value.shape).wrap(value)
        finally:
            for part in parts:
                del self._origins[part], self.state[part]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads as torch does, hyperparameters included, but keeps states in the compute dtype, not the parameter's.

        Raises:
            InvalidOption: If another optimizer, or a newer version of this one, wrote ``state_dict``, or if its groups
                held other parameters (where the groups name them in ``"members"``).
        """
        marks = [{key: group[key] for key in MARKS if key in group} for group in self.param_groups]
        # Runs after hooks registered by others, which may translate a state dict.
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
        """Checks a state dict and returns it without its tensors, which torch would cast."""
        assert isinstance(optimizer, OwnOptimizer)
        refuse_foreign(optimizer.param_groups, state_dict["param_groups"], type(optimizer).__name__, marked_only=True)
        optimizer._taken = state_dict
        plain = {
            identity: {k: value for k, value in state_dict["state"][identity].items() if not isinstance(value, Tensor)}
            for group in state_dict["param_groups"]
            for identity in group["params"]
            if identity in state_dict["state"]
        }
        # torch takes entries that belong to no parameter unchanged.
        return {**state_dict, "state": {**state_dict["state"], **plain}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self).setdefault("_origins", {})
        taken = vars(self).setdefault("_taken", None)
        if taken is None:
            return
        # Inside load_state_dict, before its post hooks: they see the whole state.
        ids = [identity for group in taken["param_groups"] for identity in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for identity, parameter in zip(ids, parameters, strict=True):
            tensors = {k: value for k, value in taken["state"].get(identity, {}).items() if isinstance(value, Tensor)}
            if "step" in tensors:
                self.state[parameter]["step"] = int(tensors.pop("step"))
            if tensors:
                self.state[parameter].update(self._loaded(tensors, parameter))

    def _loaded(self, tensors: Mapping[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
        """Returns copies of a state's tensors, which may have another dtype or device, for ``parameter``.

        Whole tensors are spread as those of a sharded parameter, and shards put together for a parameter that is whole.
        """
        loaded = {}
        for name, tensor in tensors.items():
            dtype, layout, value = self._loaded_dtype(tensor, parameter), None, tensor.detach()
            if is_sharded(parameter) and not is_sharded(value):
                layout = self._spread(name, parameter, value)
                value = layout.share(value)
            elif is_sharded(value) and not is_sharded(parameter):
                value = value.full_tensor()  # type: ignore[attr-defined]
            copied = value.to(parameter.device, dtype, copy=True)
            loaded[name] = copied if layout is None else layout.wrap(copied)
        return loaded

    def _spread(self, name: str, parameter: Tensor, value: Tensor) -> Layout:
        """Returns how a whole tensor of a sharded parameter's state is to be spread."""
        dims, layout = self._dims(name, parameter, value), Layout.of(parameter)
        spread = layout.followed(dims, value.shape) if len(dims) == value.ndim else None
        if spread is None or spread.shape != value.shape:
            raise InvalidOption(
                f"the state in the checkpoint is another model's: it has {name!r} of shape {tuple(value.shape)} for a "
                f"parameter of shape {layout.shape}. Resume with the model and the options that wrote it.",
                code="LO808",
            )
        return spread

    def _loaded_dtype(self, tensor: Tensor, parameter: Tensor) -> torch.dtype:
        """Returns the dtype for a loaded state tensor: the compute dtype if it was saved in one, else its own."""
        wide = compute_dtype(parameter)
        computes = tensor.dtype in (torch.float32, torch.float64) or (
            tensor.is_floating_point() and wide is torch.float64
        )
        return wide if computes else tensor.dtype

    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> int:
        """Counts a step of a parameter and returns its number; initializes the state before the first."""
        state = self.state[parameter]
        if "step" not in state:
            if is_sharded(parameter):
                with self.as_parts([parameter]) as (part,):
                    initial = self._initial_state(part, group)
                    self.state[part] = {"step": 0, **initial, **self.state[part]}
            else:
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
                    "'sgd'.",
                    code="LO322",
                )

    def _check(self, parameter: Tensor) -> None:
        if torch.is_complex(parameter):
            raise InvalidParamGroups(
                f"{type(self).__name__} cannot step a {parameter.dtype} parameter. Use optim='adamw_torch', or store "
                "real and imaginary parts (torch.view_as_real).",
                code="LO322",
            )
        if is_sharded(parameter) and not self.sharded:
            raise InvalidParamGroups(
                f"{type(self).__name__} cannot step a sharded parameter (DTensor): {self.unsharded}. Use "
                "optim='adamw_torch', or a strategy that does not shard.",
                code="LO322",
            )

    @classmethod
    def format(cls) -> str:
        """Returns the name of its state's format, as stored in the groups."""
        return f"{cls.__name__}/{cls.version}"


def hyperparameters(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ``locals()`` of a constructor as defaults of the groups."""
    return {name: value for name, value in arguments.items() if name not in ("self", "params", "__class__")}


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """Returns the dtype to compute in: float32 for bfloat16 and float16, the parameter's own for others."""
    return torch.promote_types(parameter.dtype, torch.float32)


def zeros_for(parameter: Tensor) -> Tensor:
    """Returns zeros of the parameter's shape, contiguous and in its compute dtype."""
    return torch.zeros_like(parameter, dtype=compute_dtype(parameter), memory_format=torch.contiguous_format)


def to_compute_dtype(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns the tensors contiguous and in their compute dtype; copies only where needed."""
    return [_converted(tensor, compute_dtype(tensor)) for tensor in tensors]


def write_back(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Rounds the results of :func:`to_compute_dtype` back into ``parameters`` where they are copies."""
    for parameter, value in zip(parameters, values, strict=True):
        if parameter.dtype is not value.dtype or not parameter.is_contiguous():
            parameter.copy_(value)


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Returns the gradients, contiguous and in their parameters' compute dtype."""
    return [_converted(p.grad, compute_dtype(p)) for p in parameters if p.grad is not None]


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Checked first: no-op calls would dominate a step over many small tensors.
    return tensor if tensor.dtype is dtype and tensor.is_contiguous() else tensor.detach().to(dtype).contiguous()


def _parts(items: Iterable[_Item], elements: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """Splits what is updated into parts whose temporary copies stay small, unless a single item is large.

    ``elements`` says how many a process has of an item at most: all processes must make the same parts.
    """
    part: list[_Item] = []
    total = 0
    for item in items:
        if part and total + elements(item) > _TEMPORARY:
            yield part
            part, total = [], 0
        part.append(item)
        total += elements(item)
    if part:
        yield part


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
