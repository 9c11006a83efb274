"""The arguments of a request are the same at every door."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest

from lightning_optim import OptimArguments, OptimCallback, OptimConfig, OptimMixin, build_optimizer
from lightning_optim.build._arguments import Arguments
from lightning_optim.trainer._cli import _ARGUMENTS

DECLARED = {field.name: field for field in dataclasses.fields(Arguments)}
TYPES = get_type_hints(Arguments)
# A schedule is made by build_schedule where the optimizer alone is built.
SCHEDULE = {"lr_scheduler", "lr_scheduler_args"}
DOORS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "OptimConfig": (OptimConfig, set()),
    "OptimMixin": (OptimMixin.__init__, set()),
    "OptimCallback": (OptimCallback.__init__, set()),
    "build_optimizer": (build_optimizer, SCHEDULE),
    "self.build_optimizer": (OptimMixin.build_optimizer, SCHEDULE),
}
# Where None has a meaning of its own: what the module has been given, or builds.
MAY_BE_LEFT_OUT = {
    ("OptimCallback", "optim"),
    ("self.build_optimizer", "optim"),
    ("self.build_optimizer", "optim_fallback"),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_takes_them_with_their_types_and_defaults(door: str) -> None:
    function, without = DOORS[door]
    parameters = inspect.signature(function).parameters
    hints = get_type_hints(OptimConfig if door == "OptimConfig" else function)
    assert DECLARED.keys() - without <= parameters.keys()
    for name in DECLARED.keys() - without:
        if (door, name) in MAY_BE_LEFT_OUT:
            assert parameters[name].default is None
            assert hints[name] == TYPES[name] | None
            continue
        assert parameters[name].default == DECLARED[name].default, name
        # Without a schedule warm-up is counted in steps.
        assert hints[name] == TYPES[name] or (door == "build_optimizer" and name == "warmup_steps"), name


def test_a_type_for_modules_that_hand_them_on() -> None:
    assert get_type_hints(OptimArguments) == TYPES


def test_the_command_line_takes_them() -> None:
    assert list(_ARGUMENTS) == list(DECLARED)
