"""What a user asks for, as one checked value: shared by the mixin, the callback, the CLI and the factory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_optim import availability, rules, trust
from lightning_optim.catalog.layerwise import SUFFIX
from lightning_optim.curves import get_schedule
from lightning_optim.errors import InvalidOption, MissingDependency
from lightning_optim.options import NON_NEGATIVE, Range, as_mapping, as_number, parse
from lightning_optim.plain import plain
from lightning_optim.registry import REGISTRY
from lightning_optim.resume import as_overrides
from lightning_optim.schedules import parse_warmup
from lightning_optim.spec import OptimizerSpec
from lightning_optim.target_modules import TargetModules, check_target_modules

_LAYER_DECAY = Range(low=0.0, high=1.0, low_open=True)


@dataclass(frozen=True)
class OptimConfig:
    """An optimizer and its schedule, by name.

    Creating one checks it: names, option names, types and ranges, and combinations that cannot work. Whether the
    packages are installed is checked only when the optimizer is built, so that a checkpoint can be loaded for inference
    where they are not. So is a dotted path that only the checkpoint names: see :mod:`lightning_optim.trust`.

    Attributes:
        optim: Identifier, alias or dotted path.
        lr: Learning rate; ``None`` takes the row's default.
        weight_decay: Weight decay of the parameters that decay; ``None`` takes the row's default.
        optim_args: Options of the optimizer, a mapping or ``"name=value,..."``. ``weight_decay`` is understood here,
            too.
        optim_target_modules: Modules whose weights are projected, for optimizers that project: ``"all-linear"``, a
            regular expression over names, or a list of parts of names; ``None`` means ``"all-linear"``.
        param_groups: Hyperparameters by regular expression over parameter names; the first match wins.
        layer_decay: The learning rate is multiplied by this once per layer below the top.
        layer_pattern: Regular expression whose one group is a layer's number.
        lr_scheduler: Name of the learning-rate schedule; ``None`` for none, ``"module"`` for the one of the module's
            own ``configure_optimizers``.
        lr_scheduler_args: Options of the schedule.
        warmup_steps: Optimizer steps of warm-up, or a fraction of the training.
        optim_fallback: Whether the nearest identifier that can run here takes the place of one that cannot.
        override_on_resume: Names of what is asked for here and wins over a checkpoint: ``"lr"``, ``"weight_decay"``,
            options such as ``"betas"``, ``"lr_scheduler"``.

    Raises:
        UnknownOptimizer, UnknownSchedule, InvalidOption, IncompatibleTrainer: See there.
    """

    optim: str = "adamw_torch"
    lr: float | None = None
    weight_decay: float | None = None
    optim_args: Mapping[str, Any] | str | None = None
    optim_target_modules: TargetModules = None
    param_groups: Mapping[str, Mapping[str, Any]] | None = None
    layer_decay: float | None = None
    layer_pattern: str | None = None
    lr_scheduler: str | None = None
    lr_scheduler_args: Mapping[str, Any] | str | None = None
    warmup_steps: int | float = 0
    optim_fallback: bool = False
    override_on_resume: Sequence[str] | str | None = None

    # Whether the row was left alone because only a file names it; no field, so that it is nobody's argument.
    _withheld: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        for name, bounds in (("lr", NON_NEGATIVE), ("weight_decay", NON_NEGATIVE), ("layer_decay", _LAYER_DECAY)):
            object.__setattr__(self, name, as_number(name, getattr(self, name), bounds))
        object.__setattr__(self, "warmup_steps", parse_warmup(self.warmup_steps))
        if self.param_groups is not None and not isinstance(self.param_groups, Mapping):
            raise InvalidOption(
                f"param_groups={self.param_groups!r} is no mapping of patterns such as {{'embed.*': {{'lr': 1e-4}}}}"
            )
        if not isinstance(self.optim_fallback, bool):
            raise InvalidOption(f"optim_fallback={self.optim_fallback!r} is neither True nor False")
        as_overrides(self.override_on_resume)
        check_target_modules(self.optim_target_modules)
        if self.lr_scheduler is not None:
            schedule = get_schedule(self.lr_scheduler)
            parse(schedule.options, self.lr_scheduler_args, schedule.name)
        if isinstance(self.optim, str) and trust.only_a_file_says(self.optim) and self._would_import():
            object.__setattr__(self, "_withheld", True)
            return
        try:
            spec = self.spec
        except MissingDependency:
            return
        self._absorb_weight_decay()
        options = parse(spec.options, self.optim_args, self.optim)
        rules.check_config(rules.Request(spec, self, options))

    @property
    def spec(self) -> OptimizerSpec:
        """The row of ``optim``.

        Raises:
            UntrustedOptimizer: If only a checkpoint names it, and its module has not been imported since.
        """
        if self._withheld and self._would_import():
            raise trust.refusal(self.optim)
        return REGISTRY.find(self.optim)

    @property
    def overrides(self) -> tuple[str, ...]:
        """``override_on_resume`` as names."""
        return as_overrides(self.override_on_resume)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The identifiers to try in turn; the first that can run is built."""
        names = (self.optim, *(self.spec.fallbacks if self.optim_fallback else ()))
        rows = {name: self.spec if name == self.optim else REGISTRY.find(name) for name in names}
        return tuple(dict.fromkeys(one for name, row in rows.items() for one in row.choices or (name,)))

    def ensure_available(self) -> None:
        """Raises :class:`MissingDependency` if no candidate that takes these options has its packages here."""
        for name in self.candidates:
            with suppress(InvalidOption):
                self.replace(optim=name)
                if REGISTRY.find(name).availability():
                    return
        spec = self.spec
        nearest = [name for name in spec.fallbacks if REGISTRY.find(name).availability()]
        availability.ensure(self.optim, spec.requirements, nearest)

    def replace(self, **changes: Any) -> OptimConfig:
        """Returns a checked copy with some attributes changed."""
        if not self._withheld or "optim" in changes:
            return dataclasses.replace(self, **changes)
        with trust.reading(held=self.optim):
            return dataclasses.replace(self, **changes)

    def _would_import(self) -> bool:
        """Whether the class is named by a dotted path alone, and has not been imported."""
        path = self.optim.removesuffix(SUFFIX)
        in_table = path in REGISTRY or any(row.implementation == path for row in REGISTRY.plain.values())
        return "." in path and not in_table and not trust.is_imported(path)

    def _absorb_weight_decay(self) -> None:
        """Moves ``weight_decay`` out of ``optim_args``, where Hugging Face's classics take it."""
        args = as_mapping(self.optim_args, self.optim)
        if "weight_decay" not in args:
            return
        given = as_number("weight_decay", args.pop("weight_decay"), NON_NEGATIVE, optional=False)
        if self.weight_decay not in (None, given):
            raise InvalidOption(
                f"weight_decay is given twice: weight_decay={self.weight_decay} and optim_args weight_decay={given}"
            )
        object.__setattr__(self, "weight_decay", given)
        object.__setattr__(self, "optim_args", args)
