"""Hooks on parameters that do not keep their listener alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_optim.layerwise._buckets import nbytes


class GradientHooks:
    """Calls a method, with the parameter, whenever the gradient of a hooked one has been accumulated.

    A parameter outlives its optimizers: building another one without detaching the first would keep the states of a
    whole model alive. So the hooks hold the method's object weakly, and go when it does.
    """

    def __init__(self, arrived: Callable[[Tensor], None]) -> None:
        self._call = _Weakly(arrived)
        self._handles: dict[Tensor, RemovableHandle] = {}
        #: Bytes of the gradients of all hooked parameters.
        self.bytes = 0
        # Not at the interpreter's exit, when the hooks no longer matter.
        weakref.finalize(arrived.__self__, _remove, self._handles).atexit = False  # type: ignore[attr-defined]

    def add(self, parameters: Iterable[Tensor]) -> None:
        """Hooks those that are not hooked yet."""
        for parameter in parameters:
            if parameter not in self._handles:
                register: Any = parameter.register_post_accumulate_grad_hook
                self._handles[parameter] = register(self._call)
                self.bytes += nbytes(parameter)

    def remove(self) -> None:
        """Removes all hooks; safe to call twice."""
        _remove(self._handles)


class _Weakly:
    """Calls a method while its object lives."""

    def __init__(self, method: Callable[[Tensor], None]) -> None:
        self._method = weakref.WeakMethod(method)

    def __call__(self, parameter: Tensor) -> None:
        method = self._method()
        if method is not None:
            method(parameter)


def _remove(handles: dict[Tensor, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()
