"""The table is complete and consistent: rows, cases, extras, upstream constructors, public names."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement as PackageRequirement
from torch import nn

import lightning_optim
from lightning_optim import REGISTRY, OptimizerSpec
from lightning_optim.build._curves import SCHEDULES
from lightning_optim.table._options import describe, parse
from lightning_optim.table.rows import ROWS
from tests.cases import CASES, ELSEWHERE, NAMES

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def test_every_row_has_a_case_and_every_case_a_row() -> None:
    names = [name for row in ROWS for name in (row.name, *row.aliases)]
    assert len(names) == len(set(names))
    assert set(names) == {*NAMES, *ELSEWHERE}
    assert len(CASES) == len(NAMES)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_cases_name_the_class_that_the_row_says_it_wraps(case: Any) -> None:
    spec = REGISTRY[case.built]
    assert case.upstream.replace(":", ".") == spec.implementation
    takes_options = any(info.scope != "layerwise" for info in describe(spec.options))
    assert (parse(spec.options, case.options, case.name) != spec.options()) == takes_options


@pytest.mark.parametrize("name", [case.name for case in CASES if case.upstream.startswith("bitsandbytes")])
def test_names_say_what_is_fixed(name: str) -> None:
    """The reference is built with what the row fixes; this is what the name promises."""
    fixed = REGISTRY[name].fixed
    assert fixed["optim_bits"] == (8 if "8bit" in name else 32)
    assert fixed.get("is_paged", False) == name.startswith("paged_")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_are_complete(row: OptimizerSpec) -> None:
    assert row.summary
    assert not row.summary.endswith(".")
    assert row.implementation in row.source
    assert row.state is not None
    assert row.default_lr is not None
    assert row.default_lr > 0
    assert all(info.help for info in describe(row.options))
    assert row.options.__doc__
    assert row.devices is None or ("cpu" in row.devices) == (row.name not in ELSEWHERE)
    assert (row.note == "") or row.note[0].islower()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_and_options_are_frozen(row: OptimizerSpec) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        row.fixed["lr"] = 1  # type: ignore[index]
    options = row.options()
    for info in describe(row.options):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(options, info.name, None)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_extra_installs_what_the_row_requires(row: OptimizerSpec) -> None:
    extras = PROJECT["optional-dependencies"]
    if row.name in ELSEWHERE and not row.extra:
        # No extra installs another torch, a driver's toolkit or what is built from source.
        assert all(requirement.command for requirement in row.requirements)
        return
    if not row.requirements:
        assert row.extra == ""
        assert row.target.startswith(("torch.optim:", "lightning_optim.optimizers:"))
        return
    declared = {parsed.name: parsed for parsed in map(PackageRequirement, extras[row.extra])}
    (everything,) = (PackageRequirement(text) for text in extras["all"])
    assert (row.extra in everything.extras) == (row.name not in ELSEWHERE)
    for requirement in row.requirements:
        # The row refuses what is older than the extra's floor. The ceiling is the extra's alone: what is newer than the
        # tests may work.
        floor = [part for part in declared[requirement.distribution].specifier if part.operator != "<"]
        assert [str(part) for part in floor] == [requirement.versions]
        # A torch that the package needs is the extra's, too, and the command for another torch is the extra.
        assert requirement.torch == (str(declared["torch"].specifier) if "torch" in declared else "")
        assert requirement.torch_command in ("", f"pip install 'lightning-optim[{row.extra}]'")
        assert bool(requirement.torch_command) == bool(requirement.torch)
        wanted = f"{requirement.distribution}{requirement.versions}"
        assert requirement.install_command == f"pip install --upgrade '{wanted}'"


@pytest.mark.parametrize("row", [row for row in ROWS if row.choices or row.fallbacks], ids=lambda row: row.name)
def test_stand_ins_are_identifiers_of_the_same_algorithm(row: OptimizerSpec) -> None:
    for name in (*row.choices, *row.fallbacks):
        stand_in = REGISTRY[name]
        assert stand_in is not row
        assert not (row.choices and stand_in.choices)
        assert stand_in.name == name, "an alias would be reported under another name"
        # The request holds for all of them: hyperparameters that were left out mean the same.
        assert (stand_in.default_lr, stand_in.default_weight_decay) == (row.default_lr, row.default_weight_decay)
        assert (stand_in.warmup, stand_in.averages_weights, stand_in.projects, stand_in.decays) == (
            row.warmup,
            row.averages_weights,
            row.projects,
            row.decays,
        )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_say_the_format_of_their_state(row: OptimizerSpec) -> None:
    assert row.state_format
    if row.target.startswith("lightning_optim.optimizers:"):
        assert row.state_format == row.load().format()  # type: ignore[attr-defined]


def test_what_stands_for_others_ends_with_one_that_runs_everywhere() -> None:
    for row in ROWS:
        if row.choices:
            assert REGISTRY[row.choices[-1]].devices is None
            assert not REGISTRY[row.choices[-1]].requirements


def test_every_extra_of_an_optimizer_serves_a_row() -> None:
    groups = {"cli", "all", "benchmarks", "examples", "test", "docs"}
    assert set(PROJECT["optional-dependencies"]) - groups == {row.extra for row in ROWS if row.extra}


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_upstream_takes_what_the_row_passes(case: Any) -> None:
    """The row's fixed arguments and all its options go into the upstream constructor, not only into the adapter."""
    spec = REGISTRY[case.built]
    upstream = case.load()
    passed = {**spec.options().select("group", "constructor"), **spec.fixed}
    assert set(passed) <= set(inspect.signature(upstream).parameters)
    assert not set(passed) & {"lr", "weight_decay", "params"}
    optimizer = upstream([nn.Parameter(torch.zeros(2, 2))], lr=1e-3, weight_decay=0.1, **passed)
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_adapters_are_subclasses_of_what_they_wrap(case: Any) -> None:
    spec = REGISTRY[case.built]
    loaded, upstream = spec.load(), case.load()
    assert issubclass(loaded, upstream)
    assert loaded is upstream or spec.target.startswith("lightning_optim.optimizers.adapters.")
    assert loaded.__name__ == upstream.__name__


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_layouts_name_the_buffers_that_exist(case: Any) -> None:
    """With the options that need them, the buffers of the layout are in the state after a step."""
    spec = REGISTRY[case.name]
    parameter = nn.Parameter(torch.ones(4, 4))
    passed = {**spec.options().select("group", "constructor"), **spec.fixed, **case.options}
    passed = {key: value for key, value in passed.items() if key in inspect.signature(case.load()).parameters}
    optimizer = case.load()([parameter], lr=1e-3, **passed)
    if case.averages:
        optimizer.train()  # type: ignore[attr-defined]
    parameter.grad = torch.ones(4, 4)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    options = parse(spec.options, case.options, case.name)
    assert spec.state is not None
    expected = {
        buffer.name
        for buffer in spec.state.buffers
        if buffer.exists(options, element_size=4) and (buffer.elements is None or buffer.elements((4, 4), options))
    }
    state = optimizer.state[parameter]
    found = {key for key, value in state.items() if isinstance(value, torch.Tensor) and value.ndim and key[0] != "q"}
    assert found == expected


def test_public_names_exist() -> None:
    assert len(lightning_optim.__all__) == len(set(lightning_optim.__all__))
    assert all(hasattr(lightning_optim, name) for name in lightning_optim.__all__)
    assert all(inspect.getdoc(getattr(lightning_optim, name)) for name in lightning_optim.__all__)


def test_schedules_are_frozen_and_described() -> None:
    for name, schedule in SCHEDULES.items():
        assert schedule.name == name
        assert schedule.summary
        assert schedule.options.__doc__
        assert all(info.help for info in describe(schedule.options))
        with pytest.raises(dataclasses.FrozenInstanceError):
            schedule.name = "other"  # type: ignore[misc]
