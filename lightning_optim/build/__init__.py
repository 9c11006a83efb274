"""From a request to an optimizer and its schedule, without Lightning. ``_factory.py`` is the pipeline: read it first.

The request and its checks (``rules/``), what Hugging Face's arguments are here, the schedules, the bytes of a state,
what a resumed state dict may hold.
Nothing here imports Lightning; a rule that needs the Trainer is given plain facts.
"""

from __future__ import annotations

from lightning_optim.build import _trust as trust
from lightning_optim.build import rules
from lightning_optim.build._arguments import (
    ARGUMENTS,
    Argument,
    Companions,
    OptimArguments,
    OptimizerArguments,
    takes_arguments,
)
from lightning_optim.build._config import OptimConfig
from lightning_optim.build._conversion import Conversion, Remark
from lightning_optim.build._curves import MODULE_SCHEDULE, SCHEDULES, PlateauOptions, get_schedule
from lightning_optim.build._division import Part, divide
from lightning_optim.build._factory import (
    WATCHERS,
    ResolvedOptimizer,
    build_optimizer,
    built_by,
    constructor_arguments,
    grouped,
    resolve,
    resolve_part,
    settle,
)
from lightning_optim.build._from_transformers import convert_training_arguments
from lightning_optim.build._memory import measured_bytes, parameter_bytes, state_bytes
from lightning_optim.build._migrate import migrate_state_dict
from lightning_optim.build._module_schedule import FollowingSchedule, peak_rate
from lightning_optim.build._part_schedules import curves_of, main_curve, schedule_of, schedule_text
from lightning_optim.build._plain import plain, storable
from lightning_optim.build._resume import INITIAL_LR, KERNEL, LR, SCHEDULE, comparable
from lightning_optim.build._schedule_state import KnowsItsName, other_schedule, set_rate, written_by
from lightning_optim.build._schedules import (
    NamedSchedule,
    build_schedule,
    long_warmup,
    resolve_warmup,
)
from lightning_optim.build._training_arguments import CARRIED, DIALECTS, PLACES, TRAINING_ARGUMENTS, TrainingArgument
from lightning_optim.build.rules import TrainerFacts

__all__ = [
    "ARGUMENTS",
    "CARRIED",
    "DIALECTS",
    "INITIAL_LR",
    "KERNEL",
    "LR",
    "MODULE_SCHEDULE",
    "PLACES",
    "SCHEDULE",
    "SCHEDULES",
    "TRAINING_ARGUMENTS",
    "WATCHERS",
    "Argument",
    "Companions",
    "Conversion",
    "FollowingSchedule",
    "KnowsItsName",
    "NamedSchedule",
    "OptimArguments",
    "OptimConfig",
    "OptimizerArguments",
    "Part",
    "PlateauOptions",
    "Remark",
    "ResolvedOptimizer",
    "TrainerFacts",
    "TrainingArgument",
    "build_optimizer",
    "build_schedule",
    "built_by",
    "comparable",
    "constructor_arguments",
    "convert_training_arguments",
    "curves_of",
    "divide",
    "get_schedule",
    "grouped",
    "long_warmup",
    "main_curve",
    "measured_bytes",
    "migrate_state_dict",
    "other_schedule",
    "parameter_bytes",
    "peak_rate",
    "plain",
    "resolve",
    "resolve_part",
    "resolve_warmup",
    "rules",
    "schedule_of",
    "schedule_text",
    "set_rate",
    "settle",
    "state_bytes",
    "storable",
    "takes_arguments",
    "trust",
    "written_by",
]
