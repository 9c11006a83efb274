"""What a user asks for as one checked value, shared by the mixin, the callback, the CLI and the factory."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_optim.build import _trust as trust
from lightning_optim.build import rules
from lightning_optim.build._arguments import ARGUMENTS, Arguments
from lightning_optim.build._curves import get_schedule
from lightning_optim.build._from_transformers import convert_training_arguments
from lightning_optim.build._parts import (
    OPTIM,
    named_parts,
    others_arguments,
    part_arguments,
    refuse_parts_without_optim,
)
from lightning_optim.build._plain import plain
from lightning_optim.build._resume import as_overrides, overridable
from lightning_optim.build._schedules import parse_warmup
from lightning_optim.errors import IncompatibleTrainer, InvalidOption, MissingDependency
from lightning_optim.groups import check_target_modules
from lightning_optim.table import (
    NON_NEGATIVE,
    REGISTRY,
    SUFFIX,
    OptimizerSpec,
    Range,
    as_mapping,
    as_number,
    availability,
    collection_of,
    parse,
)

_LAYER_DECAY = Range(low=0.0, high=1.0, low_open=True)


@dataclass(frozen=True)
class OptimConfig(Arguments):
    """An optimizer and its schedule, by name.

    Creating one checks it: names, option names, types and ranges, and combinations that cannot work. Whether the
    packages are installed is checked only when the optimizer is built, so that a checkpoint can be loaded for inference
    without them. So is a dotted path that only the checkpoint names: see :class:`UntrustedOptimizer`.
    Its attributes are the arguments of :class:`OptimMixin`.

    Raises:
        UnknownOptimizer, UnknownSchedule, InvalidOption, IncompatibleTrainer: For what cannot work; the text says what
            to type instead.
    """

    # Whether the rows were not looked up because only a file names one; not a field, hence not an argument.
    _withheld: ClassVar[bool] = False
    #: The requests of the patterns in ``param_groups`` that name an optimizer, by pattern.
    parts: ClassVar[Mapping[str, OptimConfig]] = {}
    #: The request for the parameters that an optimizer for hidden matrices leaves to another.
    others: ClassVar[OptimConfig | None] = None

    def __post_init__(self) -> None:
        for name in ARGUMENTS:
            object.__setattr__(self, name, plain(getattr(self, name)))
        for name, bounds in (("lr", NON_NEGATIVE), ("weight_decay", NON_NEGATIVE), ("layer_decay", _LAYER_DECAY)):
            object.__setattr__(self, name, as_number(name, getattr(self, name), bounds))
        object.__setattr__(self, "warmup_steps", parse_warmup(self.warmup_steps))
        if self.param_groups is not None and not isinstance(self.param_groups, Mapping):
            raise InvalidOption(
                f"param_groups={self.param_groups!r} is not a mapping of patterns such as "
                "{'embed.*': {'lr': 1e-4}}",
                code="LO301",
            )
        if not isinstance(self.optim_fallback, bool):
            raise InvalidOption(f"optim_fallback={self.optim_fallback!r} is neither True nor False", code="LO203")
        as_overrides(self.override_on_resume)
        check_target_modules(self.optim_target_modules)
        if self.lr_scheduler is not None:
            schedule = get_schedule(self.lr_scheduler)
            parse(schedule.options, self.lr_scheduler_args, schedule.name)
        if any(isinstance(n, str) and trust.only_a_file_says(n) and _would_import(n) for n in self._named()):
            object.__setattr__(self, "_withheld", True)
            return
        try:
            spec = self.spec
        except MissingDependency:
            return
        self._absorb_weight_decay()
        object.__setattr__(self, "parts", self._make_parts(spec.layerwise))
        if spec.takes != "all":
            object.__setattr__(self, "others", self._part("optim_args", others_arguments(self, spec)))
        options = parse(spec.options, self.optim_args, self.optim)
        rules.check_config(rules.Request(spec, self, options, self.parts, self.others))

    @classmethod
    def from_transformers(cls, args: Any) -> OptimConfig:
        """Returns the optimizer and schedule of Hugging Face's ``TrainingArguments``.

        Its Trainer clips, accumulates and counts epochs, too: :func:`~lightning_optim.convert_training_arguments` gives
        the counterparts of all arguments. What cannot be the same here is said in a warning.

        Args:
            args: The object, a mapping, or the path of a JSON or YAML file.
        """
        conversion = convert_training_arguments(args)
        for remark in conversion.remarks:
            if remark.place == "optimizer" and remark.kind in ("differs", "none"):
                warnings.warn(f"{remark.given}: {remark.text}", stacklevel=2)
        return cls(**conversion.optim)

    @property
    def spec(self) -> OptimizerSpec:
        """The row of ``optim``.

        Raises:
            UntrustedOptimizer: If only a checkpoint names it, and its module has still not been imported.
        """
        for name in self._named() if self._withheld else ():
            if _would_import(name):
                raise trust.refusal(name)
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
        """Raises :class:`MissingDependency` if no candidate that takes these options has its packages installed."""
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

    def _named(self) -> tuple[Any, ...]:
        """Returns what is asked for as identifiers, its own and those of patterns."""
        return self.optim, *(values[OPTIM] for values in named_parts(self.param_groups).values())

    def _make_parts(self, stepped_in_backward: bool) -> dict[str, OptimConfig]:
        refuse_parts_without_optim(self.param_groups, self.optim)
        parts = {}
        for pattern, values in named_parts(self.param_groups).items():
            arguments = part_arguments(pattern, values, stepped_in_backward)
            parts[pattern] = self._part(f"param_groups[{pattern!r}]", arguments)
        return parts

    def _part(self, where: str, arguments: Mapping[str, Any]) -> OptimConfig:
        """Returns the request for a part, which shares what is for the whole."""
        shared = {name: getattr(self, name) for name in ("layer_decay", "layer_pattern", "optim_fallback")}
        known = overridable(REGISTRY.find(arguments["optim"]))
        overrides = [name for name in self.overrides if name in known]
        try:
            return OptimConfig(**arguments, **shared, override_on_resume=overrides or None)
        except (InvalidOption, IncompatibleTrainer) as error:
            raise type(error)(f"{where}: {error.text}", code=error.codes) from None

    def _absorb_weight_decay(self) -> None:
        """Moves ``weight_decay`` out of ``optim_args``, where Hugging Face accepts it for some optimizers."""
        args = as_mapping(self.optim_args, self.optim)
        if "weight_decay" not in args:
            return
        given = as_number("weight_decay", args.pop("weight_decay"), NON_NEGATIVE, optional=False)
        if self.weight_decay not in (None, given):
            raise InvalidOption(
                f"weight_decay is given twice: weight_decay={self.weight_decay} and optim_args weight_decay={given}",
                code="LO206",
            )
        object.__setattr__(self, "weight_decay", given)
        object.__setattr__(self, "optim_args", args)


def _would_import(name: str) -> bool:
    """Whether a class is named only by a dotted path or a short name, and has not been imported."""
    path = name.removesuffix(SUFFIX)
    in_table = path in REGISTRY or any(row.implementation == path for row in REGISTRY.plain.values())
    return ("." in path or collection_of(path) is not None) and not in_table and not trust.is_imported(path)
