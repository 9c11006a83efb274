"""What is used of torch that it does not promise. All of it is in torch 2.9, the oldest version that we take."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.amp.grad_scaler import GradScaler, OptState
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import _get_capturable_supported_devices
from torch.optim.sgd import sgd
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices, _group_tensors_by_device_and_dtype

__all__ = [
    "HOOK_ATTRIBUTES",
    "SCALES",
    "STEP_SCHEDULE_STATE",
    "AnyBatchNorm",
    "AnyConvolution",
    "NormWithStatistics",
    "bare_optimizer",
    "capturable_devices",
    "current_function_mode",
    "entries",
    "frame_compiler",
    "group_by_device_and_dtype",
    "has_fused_kernel",
    "has_unscaled",
    "is_flattened",
    "load_hooks",
    "mark_as_stepped",
    "mark_as_wrapped",
    "refuses_wrapper_subclass",
    "set_buffer_donation",
    "set_last_rates",
    "set_step_count",
    "sgd_is_wrong_on_half",
    "state_dict_hooks",
    "step_pre_hooks",
    "unhooked",
    "unseen_by_compiler",
    "without_current_function_mode",
]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# Base classes, which models of others derive from, too. Without them: which parameters are decayed or projected.
AnyBatchNorm = _BatchNorm
NormWithStatistics = _NormBase
AnyConvolution = _ConvNd

#: The attribute by which a GradScaler knows optimizers that unscale and skip by themselves. Without it every fused step
#: of a float16 run waits for the device, and gradients stepped during backward are unscaled when they are gone.
SCALES = "_step_supports_amp_scaling"

#: Where an optimizer keeps its step hooks, which run once per step and not once per part of one.
HOOK_ATTRIBUTES = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")

#: What the state of a schedule that is stepped after every step holds in any version, also LambdaLR's, which Hugging
#: Face's schedules are. Without one of them, a state that another program wrote counts as another schedule's.
STEP_SCHEDULE_STATE = frozenset(
    {
        "base_lrs",
        "last_epoch",
        "verbose",
        "lr_lambdas",
        "_step_count",
        "_is_initial",
        "_get_lr_called_within_step",
        "_last_lr",
    }
)

# What torch wraps around the step of every class, to run the hooks.
_HOOKED = Optimizer.profile_hook_step(lambda optimizer: None).__code__


# --- optimizers and schedules ----------------------------------------------------------------------------------------


def step_pre_hooks(optimizer: Optimizer) -> Sequence[Callable[..., Any]]:
    """Returns an optimizer's step hooks, for who steps without them; there is only a way to register them."""
    return tuple(optimizer._optimizer_step_pre_hooks.values())


def load_hooks(optimizer: Optimizer) -> tuple[Sequence[Callable[..., Any]], Sequence[Callable[..., Any]]]:
    """Returns the hooks before and after ``load_state_dict``, which bitsandbytes' own does not run."""
    found: Any = optimizer
    before, after = found._optimizer_load_state_dict_pre_hooks, found._optimizer_load_state_dict_post_hooks
    return tuple(before.values()), tuple(after.values())


def state_dict_hooks(optimizer: Optimizer) -> tuple[Sequence[Callable[..., Any]], Sequence[Callable[..., Any]]]:
    """Returns the hooks before and after ``state_dict``, for who makes a state dict without torch's."""
    before, after = optimizer._optimizer_state_dict_pre_hooks, optimizer._optimizer_state_dict_post_hooks
    return tuple(before.values()), tuple(after.values())


def bare_optimizer(kind: type[Optimizer], attributes: Mapping[str, Any]) -> Optimizer:
    """Returns an optimizer that has these attributes and no step hooks, without running a constructor.

    An optimizer keeps all it has in its ``__dict__``. Otherwise the parts of a layerwise step would have no state. Not
    ``copy.copy``: ``Optimizer.__getstate__`` leaves out the attributes that bitsandbytes needs.
    """
    made: Optimizer = object.__new__(kind)
    vars(made).update(attributes)
    vars(made).update({name: OrderedDict() for name in HOOK_ATTRIBUTES})
    return made


def unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a class's ``step`` without the wrapper in which torch runs hooks; otherwise they run once per part."""
    found: Callable[..., Any] = inspect.unwrap(step, stop=lambda f: getattr(f, "__code__", None) is not _HOOKED)
    return found


def has_unscaled(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Whether a scaler has unscaled an optimizer's gradients for this step; else their norm is logged scaled."""
    state = scaler._per_optimizer_states.get(id(optimizer))
    return state is not None and state["stage"] is not OptState.READY


def mark_as_stepped(optimizer: Optimizer) -> None:
    """Tells schedules that an optimizer steps; otherwise torch warns of a schedule that is stepped before it."""
    vars(optimizer)["_opt_called"] = True


def mark_as_wrapped(step: Callable[..., Any]) -> None:
    """Tells schedules that a ``step`` counts its calls, else torch warns where it takes the place of one that did."""
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def set_last_rates(schedule: LRScheduler, rates: Sequence[float]) -> None:
    """Sets what ``get_last_lr`` returns, for a schedule that goes on from other peaks: loggers would show the old."""
    schedule._last_lr = list(rates)


def set_step_count(schedule: LRScheduler, count: int) -> None:
    """Sets how often a schedule was stepped: 1 would have torch take it for new, and warn."""
    schedule._step_count = count


# --- kernels ---------------------------------------------------------------------------------------------------------


def capturable_devices() -> list[str]:
    """Returns the types of device for ``capturable=True``, which torch checks in the first step only."""
    return list(_get_capturable_supported_devices())


def has_fused_kernel(torch_class: type[Optimizer], device: torch.device) -> bool:
    """Whether torch has the fused kernel of one of its classes for a type of device; else the first step fails."""
    if device.type not in _get_fused_kernels_supported_devices():
        return False
    operator = f"aten::_fused_{torch_class.__name__.lower()}_"
    key = torch._C._dispatch_key_for_device(device.type)
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator, key))


@cache
def sgd_is_wrong_on_half() -> bool:
    """Whether this torch's fused SGD on a CPU leaves bfloat16 or float16 parameters as they are, or moves them wrong.

    torch 2.9 to 2.13 do, for every complete vector of elements: https://github.com/pytorch/pytorch/issues/191763.
    """
    return not all(_two_steps_are_right(dtype) for dtype in (torch.bfloat16, torch.float16))


def _two_steps_are_right(dtype: torch.dtype) -> bool:
    parameter, velocity = torch.zeros(2, 64, dtype=dtype, device="cpu").unbind()
    for _ in range(2):
        sgd(
            [parameter],
            [torch.ones_like(parameter)],
            [velocity],
            fused=True,
            lr=1.0,
            momentum=0.5,
            weight_decay=0.0,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
    return bool((parameter == -2.5).all())


def group_by_device_and_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Divides tensors in the order in which torch's own norm adds them; another order rounds clipping otherwise."""
    grouped = _group_tensors_by_device_and_dtype([list(tensors)])
    return [[tensor for tensor in lists[0] if tensor is not None] for lists, _ in grouped.values()]


def entries(gradient: Tensor) -> Tensor:
    """Returns the entries of a sparse gradient before those of one place are added up.

    Without them an optimizer that looks at them is not seen to couple its parameters where they add up to zero.
    """
    values: Tensor = gradient._values()
    return values


# --- what surrounds a step -------------------------------------------------------------------------------------------


#: Returns what torch.compile looks at every frame of this thread with, as while hooks of a compiled function's backward
#: run, or ``None``. Not a function around torch's, because it is asked for every gradient.
frame_compiler: Callable[[], object] = torch._C._dynamo.eval_frame.get_eval_frame_callback


def unseen_by_compiler(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Has torch.compile skip a function, but not those that it calls.

    So does ``torch.compiler.disable(recursive=False)``, by two more frames in every call.
    """
    from torch._dynamo.decorators import skip  # a second that only layerwise optimizers have to wait for

    skipped: Callable[_Arguments, _Result] = skip(function)
    return skipped


def is_flattened(parameter: Tensor) -> bool:
    """Whether FSDP (the first, not ``fully_shard``) flattened a parameter: decay cannot tell weights from biases."""
    return hasattr(parameter, "_fsdp_flattened")


def set_buffer_donation(allowed: bool) -> bool:
    """Sets whether compiled graphs may overwrite their buffers in backward, and returns whether they might.

    Otherwise a second backward through a compiled graph, which exact clipping needs, raises an error.
    """
    before = functorch_config.donated_buffer
    functorch_config.donated_buffer = allowed
    return before


def current_function_mode() -> TorchFunctionMode | None:
    """Returns the innermost mode; without it a compiled step is compiled once more under the mode of a hook."""
    mode: TorchFunctionMode | None = _get_current_function_mode()  # type: ignore[no-untyped-call]
    return mode


def without_current_function_mode() -> AbstractContextManager[Any]:
    """Runs without the innermost mode, for the same reason."""
    return _pop_mode_temporarily()


def refuses_wrapper_subclass(error: BaseException) -> bool:
    """Whether ``torch.load`` refused a tensor subclass; else old checkpoints with torchao's tensors do not load."""
    return "_rebuild_wrapper_subclass" in str(error)
