"""What cannot work together: each rule says what was passed, why it fails and what to type instead.

There is one table per file, by the codes of the entries in :mod:`lightning_optim.refusals`. :data:`CONFIG_RULES` need
only the request and are checked when it is made. The others are checked before the first batch: :data:`RUN_RULES` and
:data:`DEMAND_RULES` need the model and, where there is one, the Trainer, :data:`LAYERWISE_RULES` an optimizer stepped
during backward, :data:`FUSED_RULES` one stepped by fused kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from lightning_optim.build.rules._demands import DEMAND_RULES
from lightning_optim.build.rules._fused import FUSED_RULES, Fusing
from lightning_optim.build.rules._layerwise import LAYERWISE_RULES, STEPPING_STRATEGIES, Stepping, gradient_is_gone
from lightning_optim.build.rules._request import CONFIG_RULES, Request
from lightning_optim.build.rules._run import RUN_RULES, Run, TrainerFacts, cpp_compiler, sharded_parameters
from lightning_optim.errors import IncompatibleTrainer, joined

__all__ = [
    "CONFIG_RULES",
    "DEMAND_RULES",
    "FUSED_RULES",
    "LAYERWISE_RULES",
    "RUN_RULES",
    "STEPPING_STRATEGIES",
    "Fusing",
    "Request",
    "Run",
    "Stepping",
    "TrainerFacts",
    "cpp_compiler",
    "gradient_is_gone",
    "sharded_parameters",
]

_Subject = TypeVar("_Subject")


def check_config(request: Request) -> None:
    """Raises :class:`IncompatibleTrainer` with every rule of :data:`CONFIG_RULES` that the request breaks."""
    _check(CONFIG_RULES, request)


def check_run(run: Run) -> None:
    """Raises :class:`IncompatibleTrainer` with every rule of the tables for runs that the run breaks."""
    _check({**RUN_RULES, **DEMAND_RULES}, run)


def check_fused(fusing: Fusing) -> None:
    """Raises :class:`IncompatibleTrainer` with every rule of :data:`FUSED_RULES` that is broken."""
    _check(FUSED_RULES, fusing)


def check_layerwise(stepping: Stepping) -> None:
    """Raises :class:`IncompatibleTrainer` with every rule of :data:`LAYERWISE_RULES` that is broken."""
    _check(LAYERWISE_RULES, stepping)


def _check(table: Mapping[str, Callable[[_Subject], str | None]], subject: _Subject) -> None:
    problems = {code: rule(subject) for code, rule in table.items()}
    errors = [IncompatibleTrainer(problem, code=code) for code, problem in problems.items() if problem]
    if errors:
        raise joined(errors)
