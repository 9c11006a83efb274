"""What has to happen right before an optimizer steps existing gradients, all at once or bucket by bucket.

A plain step hook is not enough: before ``step(closure)`` there are no gradients yet, and the hooks of an optimizer that
steps during backward run once per step, when the gradients are gone.
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
    """Calls ``prepare`` right before every step of ``optimizer``, when the gradients exist; returns the hook's handle.

    ``prepare`` is called with the optimizer about to step. If the layerwise engine takes a step in parts, that is an
    inner optimizer for every part, whose groups hold only the part's parameters. It may change gradients, states and
    values of the groups, and must be idempotent. Like all hooks, it is not copied by ``copy.deepcopy`` or ``pickle``.
    """
    return optimizer.register_step_pre_hook(_Preparation(prepare))


def preparations(optimizer: Optimizer) -> tuple[Prepare, ...]:
    """Returns what :func:`prepare_step` has registered, for code that steps without running the optimizer's hooks."""
    return tuple(hook.prepare for hook in step_pre_hooks(optimizer) if isinstance(hook, _Preparation))


@dataclass(frozen=True)
class _Preparation:
    """A step hook that waits for the closure, which computes the gradients."""

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
