"""What ``torch.compile`` must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.optim import Optimizer

from lightning_optim._compat.torch import unhooked

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def uncompiled(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorator for a function that torch.compile must not trace, in a compiled function or in a hook of its backward.

    After something untraceable (a decomposition, another library's kernel) torch.compile continues with the next Python
    function, and code compiled for one matrix is then reused for others of the same shape: one gets the updates of all.
    Nothing is lost: a step's arithmetic is in operations over lists of tensors.
    """
    disabled: Callable[_Arguments, _Result] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


class StepsUncompiled(Optimizer):
    """Mixin for an optimizer whose step is not traced inside a compiled function; its closure, with the model, is."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps every parameter that has a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @uncompiled
    def _step(self) -> None:
        """Steps; by default as the class that this one is mixed into."""
        upstream: Any = super().step
        # torch wraps the step of every instantiated class: the hooks would run twice.
        unhooked(upstream.__func__)(self)
