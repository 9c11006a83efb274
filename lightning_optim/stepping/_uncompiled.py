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
    """Decorator for what runs as written where a compiled function calls it, or where a hook runs in its backward.

    After something that it cannot trace (a decomposition, a kernel of another library) torch.compile goes on with the
    next Python function it meets, and what it compiled for one matrix then serves others of the same shape: one gets
    the updates of all. Nothing is lost by it: the arithmetic of a step is in operations over lists of tensors.
    """
    disabled: Callable[_Arguments, _Result] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


class StepsUncompiled(Optimizer):
    """Mixin for an optimizer whose step runs as written inside a compiled function.

    The closure is left to the compiler: it is the user's, and has the model in it.
    """

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
        """Steps; by default as the class does that this one is mixed into."""
        upstream: Any = super().step
        # torch wraps the step of every class that was instantiated: the hooks would run twice.
        unhooked(upstream.__func__)(self)
