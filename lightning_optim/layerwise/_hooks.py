"""Hooks on parameters that do not keep their listener alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_optim._compat.torch import frame_compiler, unseen_by_compiler
from lightning_optim.layerwise._buckets import nbytes
from lightning_optim.stepping import uncompiled


class GradientHooks:
    """Calls a method, with the parameter, whenever the gradient of a hooked one has been accumulated.

    A parameter outlives its optimizers: building another one without detaching the first would keep the states of a
    whole model alive. So the hooks hold the method's object weakly, and go when it does.
    """

    def __init__(self, arrived: Callable[[Tensor], None]) -> None:
        self._call = _weakly(arrived)
        # By id: Tensor.__hash__ is a Python function, and this is asked for every parameter of every step.
        self._handles: dict[int, tuple[Tensor, RemovableHandle]] = {}
        #: Bytes of the gradients of all hooked parameters.
        self.bytes = 0
        # Not at the interpreter's exit, when the hooks no longer matter.
        weakref.finalize(arrived.__self__, _remove, self._handles).atexit = False  # type: ignore[attr-defined]

    def add(self, parameters: Iterable[Tensor]) -> None:
        """Hooks those that are not hooked yet."""
        for parameter in parameters:
            if id(parameter) not in self._handles:
                register: Any = parameter.register_post_accumulate_grad_hook
                self._handles[id(parameter)] = parameter, register(self._call)
                self.bytes += nbytes(parameter)

    def remove(self) -> None:
        """Removes all hooks; safe to call twice."""
        _remove(self._handles)


def _weakly(method: Any) -> Callable[[Tensor], None]:
    """Returns a function that calls a method of an object as long as that lives, as written under torch.compile too."""
    reference, function, as_written = weakref.ref(method.__self__), method.__func__, uncompiled(method.__func__)

    @unseen_by_compiler
    def call(parameter: Tensor) -> None:
        owner = reference()
        if owner is not None:
            # What keeps the compiler away costs more than all else that most gradients cause.
            (function if frame_compiler() is None else as_written)(owner, parameter)

    return call


def _remove(handles: dict[int, tuple[Tensor, RemovableHandle]]) -> None:
    for _, handle in handles.values():
        handle.remove()
    handles.clear()
