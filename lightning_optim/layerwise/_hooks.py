"""Hooks on parameters that do not keep alive who listens to them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_optim.layerwise._buckets import nbytes


class GradientHooks:
    """Calls a method whenever the gradient of a hooked parameter has been accumulated, as long as its object lives.

    A parameter outlives its optimizers: whoever builds another one for the model has not always detached the first, and
    with it the states of a whole model would stay alive. So the hooks hold the object weakly, and go when it does.

    Args:
        arrived: The method; it is called with the parameter.
    """

    def __init__(self, arrived: Callable[[Tensor], None]) -> None:
        self._call = _Weakly(arrived)
        self._handles: dict[Tensor, RemovableHandle] = {}
        #: Bytes of the gradients of all that are hooked.
        self.bytes = 0
        # Not at the interpreter's exit, when the hooks no longer matter.
        weakref.finalize(arrived.__self__, _remove, self._handles).atexit = False  # type: ignore[attr-defined]

    def add(self, parameters: Iterable[Tensor]) -> None:
        """Hooks those that are not yet."""
        for parameter in parameters:
            if parameter not in self._handles:
                register: Any = parameter.register_post_accumulate_grad_hook
                self._handles[parameter] = register(self._call)
                self.bytes += nbytes(parameter)

    def remove(self) -> None:
        """Removes all of them; safe to call twice."""
        _remove(self._handles)


class _Weakly:
    """A function that calls a method of an object that may be gone."""

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
