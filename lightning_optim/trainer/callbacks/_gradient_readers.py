"""Finds hooks that look at gradients already stepped during backward, by watching the first steps of a fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_optim._compat.torch import current_function_mode, without_current_function_mode
from lightning_optim.trainer import _packages as packages

#: Makes the warning about a hook (``"Class.name"``) that found no gradient for a named parameter.
Text = Callable[[str, str], str]

# Where a plain step's gradients are found: before it, where removing them would matter too, and after it.
_BEFORE_STEP = frozenset({"backward", "on_after_backward", "on_before_optimizer_step"})
_AROUND_STEP = frozenset({"optimizer_step", "on_train_batch_end", "on_before_zero_grad"})
_STEPS = 2
_READ, _WRITE = Tensor.grad.__get__, Tensor.grad.__set__  # type: ignore[union-attr]


class GradientReaders:
    """Warns once of each hook that reads or sets a gradient which a step during backward has freed.

    Lightning runs hooks inside ``trainer.profiler.profile(...)``. For the first steps that is replaced: hooks of the
    module and of callbacks run under a torch function mode that sees every access to ``parameter.grad``, in whatever
    code. Everything is removed after those steps, or when fit ends. ``watched`` are the parameters, with their names
    and the warnings about them.
    """

    def __init__(self, trainer: Trainer, watched: Mapping[Tensor, tuple[str, Text]]) -> None:
        self._trainer = trainer
        self._watched = watched
        self._told: set[str] = set()
        self._arrived: set[Tensor] = set()
        self._hook: str | None = None
        self._mode = _SeesGradients(self._saw)
        self._steps = 0
        #: Whether the latest gradients were, or are being, stepped and freed.
        self.stepped = False
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(self._arrived.add)  # type: ignore[no-untyped-call]
            for parameter in watched
        ]
        self._profiler: Any = trainer.profiler  # type: ignore[attr-defined]
        self._profile = self._profiler.profile
        self._own = vars(self._profiler).get("profile")
        self._profiler.profile = self._watching

    def on_before_backward(self) -> None:
        """Forgets the gradients of the step before."""
        if self.stepped:
            self._arrived.clear()
            self.stepped = False

    def on_train_batch_start(self) -> None:
        """Stops once enough steps were watched, including the hooks that follow them."""
        if self._steps >= _STEPS:
            self.stop()

    def on_train_batch_end(self) -> None:
        """Counts the steps."""
        self._steps += self.stepped

    def stop(self) -> None:
        """Removes everything; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            vars(self._profiler).pop("profile", None)
            if self._own is not None:
                self._profiler.profile = self._own
        self._handles.clear()
        self._arrived.clear()

    @contextmanager
    def _watching(self, action_name: str) -> Iterator[Any]:
        outer = self._hook
        # An action that is not a hook (a user's own name) belongs to the hook around it.
        hook = self._hook_of(action_name) if action_name.startswith("[") else outer
        changes: AbstractContextManager[Any] = nullcontext()
        if hook and not outer:
            changes = self._mode
        elif outer and not hook and current_function_mode() is self._mode:
            # The model's step must not be recompiled for the mode that the surrounding hook needs.
            changes = without_current_function_mode()
        with self._profile(action_name) as value, changes:
            self._hook = hook
            try:
                yield value
            finally:
                self._hook = outer

    def _hook_of(self, action_name: str) -> str | None:
        """Returns ``"Class.name"`` for one of the user's hooks that should be watched."""
        kind, _, action = action_name.partition("]")
        key, _, name = action.rpartition(".")
        module = self._trainer.lightning_module
        owner: object = None
        if kind == "[LightningModule" or (kind == "[Strategy" and name == "backward"):
            owner = module
        elif kind == "[Callback":
            callbacks = self._trainer.callbacks  # type: ignore[attr-defined]
            owner = next((callback for callback in callbacks if callback.state_key == key), None)
        # In manual optimization only the module knows where it zeroes gradients.
        watched = _BEFORE_STEP | _AROUND_STEP if module.automatic_optimization else _BEFORE_STEP
        if owner is None or name not in watched:
            return None
        code = getattr(getattr(owner, name, None), "__module__", None) or ""
        if code.partition(".")[0] in packages.LIGHTNING | {"lightning_optim"}:
            return None
        return f"{type(owner).__name__}.{name}"

    def _saw(self, parameter: Tensor, before: Tensor | None, written: tuple[Tensor | None, ...]) -> None:
        """Is called for each gradient that is read, or replaced by ``written``."""
        hook = self._hook
        if hook is None or hook in self._told or not self.stepped or before is not None:
            return
        if parameter not in self._arrived or _is_housekeeping(_reader()):
            return
        if written and written[0] is None and hook.rpartition(".")[2] not in _BEFORE_STEP:
            return
        self._told.add(hook)
        name, text = self._watched[parameter]
        rank_zero_warn(text(hook, name))


class _SeesGradients(TorchFunctionMode):
    """Calls ``saw`` for each ``tensor.grad`` that is read or set."""

    def __init__(self, saw: Callable[[Tensor, Tensor | None, tuple[Tensor | None, ...]], None]) -> None:
        self._saw = saw

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (_READ, _WRITE):
            self._saw(args[0], args[0].grad, args[1:] if func == _WRITE else ())
        return func(*args, **(kwargs or {}))


def _reader() -> str:
    """Returns the module of the code that reads or sets a gradient, three frames up."""
    frame = inspect.currentframe()
    for _ in range(3):
        frame = frame and frame.f_back
    return str(frame.f_globals.get("__name__", "")) if frame else ""


def _is_housekeeping(module: str) -> bool:
    """Whether a module's code looks at gradients only to zero, move or step them."""
    ours = module.partition(".")[0] in (torch.__name__, "lightning_optim")
    return ours and not module.startswith("torch.nn.utils.")
