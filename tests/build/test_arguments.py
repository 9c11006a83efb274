"""The arguments of a request are declared once, and the same at every door."""

from __future__ import annotations

import ast
import inspect
import pydoc
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import lightning_optim
from lightning_optim import OptimArguments, OptimCallback, OptimConfig, OptimMixin, build_optimizer
from lightning_optim.build import ARGUMENTS
from lightning_optim.build._arguments import Arguments
from lightning_optim.errors import InvalidOption

# A schedule is made by build_schedule where the optimizer alone is built.
SCHEDULE = {"lr_scheduler", "lr_scheduler_args"}
DOORS: dict[str, tuple[Callable[..., Any], Any, set[str]]] = {
    "OptimConfig": (OptimConfig, None, set()),
    "OptimMixin": (OptimMixin.__init__, OptimMixin, set()),
    "OptimCallback": (OptimCallback, OptimCallback, {"optim"}),
    "build_optimizer": (build_optimizer, build_optimizer, {"optim", *SCHEDULE}),
    "self.build_optimizer": (OptimMixin.build_optimizer, OptimMixin.build_optimizer, {"optim", *SCHEDULE}),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_shows_them_with_their_types_and_defaults(door: str) -> None:
    function, documented, without = DOORS[door]
    parameters = inspect.signature(function).parameters
    hints = get_type_hints(function) if door == "OptimMixin" else {}
    shown = {name: argument for name, argument in ARGUMENTS.items() if name not in without}
    assert [name for name in parameters if name in shown] == list(shown)
    assert not SCHEDULE & without & parameters.keys()
    for name, argument in shown.items():
        assert parameters[name].default == argument.default, name
        if door != "OptimConfig":
            assert hints.get(name, parameters[name].annotation) == argument.type, name
            assert f"{name}: {argument.help}\n" in documented.__doc__
            assert argument.help in pydoc.render_doc(documented)


def test_the_type_for_modules_that_hand_them_on() -> None:
    assert get_type_hints(OptimArguments) == get_type_hints(Arguments)


def test_nowhere_else_are_they_written_down() -> None:
    """A new argument is added to ``_arguments.py`` and, because of Lightning, to the mixin's signature."""
    found = {}
    for path in Path(lightning_optim.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
            elif isinstance(node, ast.Dict):
                names = {key.value for key in node.keys if isinstance(key, ast.Constant)}
            elif isinstance(node, ast.Call):
                names = {keyword.arg for keyword in node.keywords}
            else:
                continue
            if len(names & ARGUMENTS.keys()) > len(ARGUMENTS) / 2:
                found[getattr(node, "name", type(node).__name__)] = path.name
    assert found == {"__init__": "_mixin.py"}


def test_a_fraction_of_a_training_of_unknown_length_is_refused() -> None:
    with pytest.raises(InvalidOption, match=r"warmup_steps=0.1 is a fraction .* give a number of steps"):
        build_optimizer(torch.nn.Linear(2, 1), "schedule_free_sgd", lr=0.1, warmup_steps=0.1)
