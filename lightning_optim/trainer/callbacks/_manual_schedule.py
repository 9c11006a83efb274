"""Steps a named schedule in manual optimization, where Lightning steps none."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.hooks import RemovableHandle

from lightning_optim.errors import IncompatibleTrainer, listing
from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer.callbacks._attached import Attached

_Schedule = LRScheduler | ReduceLROnPlateau
# The names by which a module accesses the schedules to step them itself.
_DOORS = frozenset({"lr_schedulers", "lr_scheduler_configs"})
_NOT_THEIRS = packages.LIGHTNING | {"lightning_optim", "torch"}


class ManualSchedule(Attached):
    """Steps a schedule after every step of its optimizer, or after every validation if it watches a metric.

    If the code of the module or of a callback mentions ``lr_schedulers``, it steps the schedule itself, and this only
    checks that it does. A schedule that turns out to be stepped elsewhere (by a helper that gets the module) is left to
    that code.

    Args:
        name: What the user typed to get the schedule.
        optimizer: The optimizer.
        schedule: Its schedule.
        monitor: The metric that it watches, or ``None``.
        theirs: Whether the module steps the schedule.
    """

    def __init__(self, name: str, optimizer: Optimizer, schedule: _Schedule, monitor: str | None, theirs: bool) -> None:
        self._name = name
        self._schedule = schedule
        self._monitor = monitor
        self._theirs = theirs
        self._trainer: Trainer | None = None
        self._start = self._ours = self._optimizer_steps = 0
        self._asked = False
        self._handle: RemovableHandle = optimizer.register_step_post_hook(self._after_step)

    @classmethod
    def attach(
        cls,
        trainer: Trainer,
        name: str,
        optimizer: Optimizer,
        schedule: _Schedule,
        monitor: str | None = None,
    ) -> None:
        """Lets the fit that is being set up step the schedule, unless the module does; see the class."""
        owners = [trainer.lightning_module, *trainer.callbacks]  # type: ignore[attr-defined]
        callback = cls(name, optimizer, schedule, monitor, theirs=any(map(_gets_at_schedules, owners)))
        callback._put_first(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        self._start = self._schedule.last_epoch  # that of the checkpoint, too

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._theirs or self._asked or not self._optimizer_steps:
            return
        self._asked = True
        if self._schedule.last_epoch == self._start:
            when = "after every validation, with the metric" if self._monitor else "after every optimizer.step()"
            rank_zero_warn(
                f"lr_scheduler={self._name!r} was not stepped in an epoch of {self._optimizer_steps} steps. "
                f"{type(pl_module).__name__} has manual optimization and gets at self.lr_schedulers() by itself: call "
                f"self.lr_schedulers().step() {when}, or do not mention it and have it stepped."
            )

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._optimizer_steps += 1
        if self._trainer is None or self._theirs or self._monitor or not self._in_use():
            return
        others = self._schedule.last_epoch - self._start - self._ours
        if others:
            self._leave_it(others)
            return
        self._ours += 1
        self._schedule.step()  # type: ignore[call-arg]

    def _in_use(self) -> bool:
        """Whether the Trainer uses the schedule; finders temporarily replace it."""
        assert self._trainer is not None
        return any(config.scheduler is self._schedule for config in self._trainer.lr_scheduler_configs)

    def _leave_it(self, others: int) -> None:
        """Undoes our steps: other code steps the schedule."""
        self._theirs = self._asked = True
        rank_zero_warn(
            f"lr_scheduler={self._name!r} is also stepped by other code, and is left to it from now on: that code has "
            "to step it after every optimizer.step()."
        )
        self._schedule.last_epoch = self._start + others - 1
        self._schedule.step()  # type: ignore[call-arg]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._monitor in trainer.callback_metrics:
            self._ask(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._monitor is None or self._theirs or not self._in_use():
            return
        metrics = trainer.callback_metrics
        if self._monitor not in metrics:
            raise IncompatibleTrainer(
                f"lr_scheduler={self._name!r} watches {self._monitor!r}, which was not logged; there are "
                f"{listing(sorted(metrics)) or 'no metrics'}. Log it, or name another: "
                "lr_scheduler_args={'monitor': ...}.",
                code="LO529",
            )
        if not trainer.enable_validation:
            self._ask(trainer)

    def _ask(self, trainer: Trainer) -> None:
        if not self._theirs and self._in_use():
            self._schedule.step(trainer.callback_metrics[self._monitor])  # type: ignore[arg-type,index]

    def _detach(self, trainer: Trainer) -> None:
        self._handle.remove()
        self._trainer = None
        super()._detach(trainer)


def _gets_at_schedules(owner: Any) -> bool:
    """Whether the code of a user's class, without its Lightning bases, mentions the Trainer's schedules."""
    classes = (cls for cls in type(owner).__mro__ if packages.top(cls) not in _NOT_THEIRS)
    members = [*vars(owner).values(), *(member for cls in classes for member in vars(cls).values())]
    return any(_DOORS.intersection(_names(code)) for code in _codes(members))


def _codes(members: Iterable[Any]) -> Iterator[CodeType]:
    for member in members:
        parts = (member.fget, member.fset) if isinstance(member, property) else (getattr(member, "__func__", member),)
        for part in parts:
            function = inspect.unwrap(part) if callable(part) else None
            if inspect.isfunction(function):
                yield function.__code__


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
