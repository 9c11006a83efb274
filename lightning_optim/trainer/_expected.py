"""What a module's own loop expects from its ``configure_optimizers``, found out by calling it.

An optimizer that replaces the module's own has to provide what the module's code still expects: as many optimizers, a
schedule where it steps one, the same parameters. Where it does not, that is an error or a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_optim._compat.lightning import take_apart
from lightning_optim.build import MODULE_SCHEDULE, FollowingSchedule, OptimConfig, built_by, peak_rate, resolve
from lightning_optim.errors import IncompatibleTrainer, joined, said
from lightning_optim.groups import Target

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

#: A ``configure_optimizers`` without arguments.
OwnHook = Callable[[], Any]

_BASE_CLASSES = ("lightning.pytorch.core.module", "pytorch_lightning.core.module")


def own_hook(hook: OwnHook) -> OwnHook | None:
    """Returns a module's ``configure_optimizers``, or ``None`` if it is LightningModule's empty one."""
    return None if getattr(hook, "__module__", "") in _BASE_CLASSES else hook


@dataclass(frozen=True)
class Expected:
    """What the module's own ``configure_optimizers`` returned, which is never stepped.

    Attributes:
        module: The class of the module.
        automatic: Whether Lightning steps optimizers and schedules, instead of the module.
        optimizers: The optimizers.
        schedules: The schedules as Lightning takes them, each a mapping with ``"scheduler"``.
        attributes: Attributes of the module, by name, that hold one of its optimizers or their schedules.
        error: What it raised instead.
    """

    module: str
    automatic: bool = True
    optimizers: tuple[Optimizer, ...] = ()
    schedules: tuple[dict[str, Any], ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    error: Exception | None = None

    @classmethod
    def ask(cls, module: LightningModule, own: OwnHook | None) -> Expected:
        """Calls the module's own ``configure_optimizers``, if it has one, without affecting random numbers."""
        name, automatic = type(module).__name__, module.automatic_optimization
        if own is None:
            return cls(name, automatic)

        def build(target: Target, config: OptimConfig) -> Optimizer:
            return resolve(target, config, total_steps=1).optimizer

        # Lightning restores the random numbers only if nothing is raised inside.
        error: Exception | None = None
        with isolate_rng(), built_by(build):
            try:
                returned = own()
                optimizers, schedules, monitor = ([], [], None) if returned is None else take_apart(returned)
            except Exception as raised:
                # The named optimizer may be meant to work around it.
                error = raised
        if error is not None:
            return cls(name, automatic, error=error)
        held = {name: value for name, value in vars(module).items() if _belongs_to(value, optimizers)}
        entries = (entry if isinstance(entry, dict) else {"scheduler": entry} for entry in schedules)
        taken = tuple({"monitor": monitor, **entry} if monitor else dict(entry) for entry in entries)
        return cls(name, automatic, tuple(optimizers), taken, held)

    @property
    def optimizer(self) -> Optimizer | None:
        """Its one optimizer, if it has one."""
        return self.optimizers[0] if len(self.optimizers) == 1 else None

    @property
    def schedule(self) -> str:
        """Its schedules, for humans."""
        handed = [entry["scheduler"] for entry in self.schedules]
        kept = [value for value in self.attributes.values() if _is_schedule(value) and value not in handed]
        return " and ".join(type(schedule).__name__ for schedule in (*handed, *kept))

    def check(self, config: OptimConfig) -> None:
        """Raises :class:`IncompatibleTrainer` if the module's loop expects what ``config`` does not give."""
        problems = {"LO424": self._several(config), "LO425": self._schedules(config)}
        errors = [IncompatibleTrainer(problem, code=code) for code, problem in problems.items() if problem]
        if errors:
            raise joined(errors)

    def _several(self, config: OptimConfig) -> str | None:
        if len(self.optimizers) < 2:
            return None
        classes = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
        return (
            f"optim={config.optim!r} for {self.module}, whose own configure_optimizers returns {len(self.optimizers)} "
            f"optimizers ({classes}): one over all parameters would take their place, and its loop steps each. Build "
            f"each there by name: self.build_optimizer(self.PART, {config.optim!r}) with OptimMixin, or "
            f"build_optimizer(self.PART, {config.optim!r}) together with Trainer(callbacks=[OptimCallback()]). To keep "
            "them and only step them differently, use Trainer(strategy='layerwise') or 'fused', without optim."
        )

    def _schedules(self, config: OptimConfig) -> str | None:
        asked = f"lr_scheduler={config.lr_scheduler!r} for {self.module}"
        if config.lr_scheduler == MODULE_SCHEDULE.name:
            if self.error is not None:
                return f"{asked}, whose own configure_optimizers raises {type(self.error).__name__}: {said(self.error)}"
            if not self.schedule:
                return f"{asked}, whose own configure_optimizers makes no schedule. Leave it out or name one: 'linear'."
            if self.optimizer is not None and not peak_rate(self.optimizer) > 0:
                return f"{asked}, whose own learning rate is 0: nothing to follow. Name a schedule, such as 'linear'."
            return None
        if self.automatic or not self.schedules:
            return None
        watching = [isinstance(entry["scheduler"], ReduceLROnPlateau) for entry in self.schedules]
        given = [] if config.lr_scheduler is None else [config.lr_scheduler == "reduce_lr_on_plateau"]
        if watching == given:
            return None
        return (
            f"{asked}, which steps its own {self.schedule} by self.lr_schedulers() in manual optimization, and would "
            "not find it. Keep it around the named optimizer with lr_scheduler='module'"
            + (", or give one that changes nothing: lr_scheduler='constant'." if watching == [False] else ".")
        )

    def lr(self, config: OptimConfig) -> float | None:
        """Returns the learning rate to ask for: the module's own with ``lr_scheduler='module'`` and none given."""
        if config.lr is None and config.lr_scheduler == MODULE_SCHEDULE.name and self.optimizer is not None:
            return peak_rate(self.optimizer)
        return config.lr

    def only(self) -> frozenset[Tensor] | None:
        """Returns the parameters that its optimizer trains; ``None`` if unknown."""
        if self.optimizer is None:
            return None
        return frozenset(p for group in self.optimizer.param_groups for p in group["params"])

    def losses(self, module: LightningModule, config: OptimConfig, lr: float) -> Iterator[str]:
        """Yields a sentence for everything of the module's own that ``config``, at ``lr``, replaces unasked."""
        if self.error is not None:
            yield (
                f"{self.module}.configure_optimizers raises {type(self.error).__name__} ({self.error}); what its loop "
                "expects from it is not known."
            )
        if self.optimizer is None:
            return
        own = type(self.optimizer).__name__
        rates = sorted({float(group.get("initial_lr", group["lr"])) for group in self.optimizer.param_groups})
        if config.lr is None and rates != [lr]:
            yield (
                f"lr={lr:g} is the default of optim={config.optim!r}; {self.module}'s own {own} has "
                f"lr={', '.join(f'{rate:g}' for rate in rates)}, which is not used. Give lr."
            )
        elif len(rates) > 1 and config.param_groups is None and config.lr_scheduler != MODULE_SCHEDULE.name:
            yield (
                f"{self.module}'s own {own} has groups with lr={', '.join(f'{rate:g}' for rate in rates)}; here all "
                f"have lr={lr:g}. Give param_groups."
            )
        if self.schedule and config.lr_scheduler is None:
            yield (
                f"{self.module}'s own schedule {self.schedule} is dropped: the learning rate stays at {lr:g}. Give "
                "lr_scheduler='module' to keep it, or 'constant' to drop it."
            )
        if config.lr_scheduler == MODULE_SCHEDULE.name and any(
            getattr(schedule, "cycle_momentum", False) for schedule in self._all_schedules()
        ):
            yield f"{self.module}'s own {self.schedule} cycles the momentum, too; of it only the learning rate is kept."
        trained, there = self.only() or frozenset(), frozenset(module.parameters())
        left, strange = [p for p in there - trained if p.requires_grad], trained - there
        if left:
            yield (
                f"{self.module}'s own {own} leaves {len(left)} of {len(there)} parameters alone, and so does "
                f"optim={config.optim!r}."
            )
        if strange:
            yield (
                f"{self.module}'s own {own} trains {len(strange)} parameters that are not the module's; "
                f"optim={config.optim!r} does not. Make them parameters of the module."
            )

    def _all_schedules(self) -> Sequence[Any]:
        return [entry["scheduler"] for entry in self.schedules] + list(filter(_is_schedule, self.attributes.values()))

    def follow(self, module: LightningModule, optimizer: Optimizer) -> OptimizerLRScheduler:
        """Returns ``optimizer`` driven by the module's own schedules, for ``configure_optimizers``."""
        assert self.optimizer is not None
        following: dict[int, FollowingSchedule] = {}
        for schedule in self._all_schedules():
            if id(schedule) not in following:
                following[id(schedule)] = FollowingSchedule(optimizer, schedule, self.optimizer)
        for name, value in self.attributes.items():
            setattr(module, name, following.get(id(value), optimizer))
        entries = []
        for entry in self.schedules:
            watching = {"reduce_on_plateau": True} if isinstance(entry["scheduler"], ReduceLROnPlateau) else {}
            if not self.automatic:
                watching, entry = {}, {name: entry[name] for name in entry if name not in ("monitor", "strict")}
            entries.append({**watching, **entry, "scheduler": following[id(entry["scheduler"])]})
        return [optimizer], entries  # type: ignore[return-value]

    def replace_attributes(self, module: LightningModule, optimizer: Optimizer, schedule: Any) -> None:
        """Puts the optimizer and schedule that train into the attributes where the module keeps its own."""
        handed = [entry["scheduler"] for entry in self.schedules]
        for name, value in self.attributes.items():
            if not _is_schedule(value):
                setattr(module, name, optimizer)
            elif schedule is not None and any(value is one for one in handed):
                # A schedule that it does not return is stepped by the module itself, which must not move ours.
                setattr(module, name, schedule)


def _belongs_to(value: Any, optimizers: list[Optimizer]) -> bool:
    # By identity: a module's attributes may define == in any way.
    return any(value is optimizer or getattr(value, "optimizer", None) is optimizer for optimizer in optimizers)


def _is_schedule(value: Any) -> bool:
    return isinstance(value, LRScheduler) or hasattr(value, "optimizer")
