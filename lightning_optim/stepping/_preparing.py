"""What has to be done to an optimizer right before its step, when the gradients are there: whole or bucket by bucket.

An ordinary step hook will not do. Before ``step(closure)`` there are no gradients yet, and where an optimizer is
stepped during backward its hooks run once per step, when the gradients are gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optim._compat.torch import step_pre_hooks

Prepare = Callable[[Optimizer], None]


def prepare_step(optimizer: Optimizer, prepare: Prepare) -> RemovableHandle:
    """Has ``prepare`` called right before every step of ``optimizer``, with the gradients there.

    Args:
        optimizer: What is stepped; copies by ``copy.deepcopy`` or ``pickle`` are without it, as without all hooks.
        prepare: Is called with the optimizer whose step comes. Where the layerwise engine takes a step in parts, that
            is an inner optimizer for every part, whose groups hold the part's parameters alone. It may change
            gradients, states and the groups' values, and must not mind to be called twice.

    Returns:
        What takes it back.
    """
    return optimizer.register_step_pre_hook(_Preparation(prepare))


def preparations(optimizer: Optimizer) -> tuple[Prepare, ...]:
    """Returns what :func:`prepare_step` has registered, for who steps without running the optimizer's hooks."""
    return tuple(hook.prepare for hook in step_pre_hooks(optimizer) if isinstance(hook, _Preparation))


@dataclass(frozen=True)
class _Preparation:
    """A step hook that waits for the closure, which makes the gradients."""

    prepare: Prepare

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self.prepare(optimizer)
            return None

        def closure_then_prepare() -> Any:
            loss = closure()
            self.prepare(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": closure_then_prepare}
