"""A state knows whose it is (contract C12): every row says it in its groups, and refuses another's before it loads."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim import REGISTRY, build_optimizer
from lightning_optim.errors import InvalidOption
from lightning_optim.stepping import MARKS, parts_of
from tests.cases import CASES, LAYERWISE, NAMES
from tests.trainer.test_resume import assert_equal

# A third that can be frozen, and two layers of the same shapes, large enough to be quantized.
SIDE = 64
IDENTIFIERS = (*NAMES, "torch.optim.NAdam", "torch.optim.AdamW", "bitsandbytes.optim.Lion8bit")
# What the issue names, and nothing else: identifiers that hand their checkpoints to each other.
FAMILIES = (
    {"adamw", "adamw_torch", "adamw_torch_fused", "torch.optim.AdamW"},
    {"adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"},
    {"lion_32bit", "paged_lion_32bit"},
    {"lion_8bit", "paged_lion_8bit"},
    {"ademamix", "paged_ademamix_32bit"},
    {"ademamix_8bit", "paged_ademamix_8bit"},
    {"rmsprop_bnb", "rmsprop_bnb_32bit"},
    {"apollo_adamw", "apollo_mini"},
)


def model(frozen: int = 2) -> nn.ModuleList:
    layers = nn.ModuleList(nn.Linear(SIDE, SIDE) for _ in range(3))
    layers[frozen].requires_grad_(False)
    return layers


def compiles(name: str) -> bool:
    return REGISTRY[name].compiles if name in NAMES else False


def step(optimizer: torch.optim.Optimizer) -> None:
    if hasattr(optimizer, "train"):
        optimizer.train()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@functools.cache
def saved(name: str) -> Any:
    """A state dict of ``name`` after a step; what compiles its step has taken none."""
    optimizer = build_optimizer(model(), name, lr=1e-3)
    if not compiles(name):
        step(optimizer)
    return optimizer.state_dict()


def exchange(one: str, other: str) -> bool:
    # A row and its class by its path.
    pairs = ({case.name, case.upstream.replace(":", ".")} for case in CASES if not case.arguments)
    return one == other or any({one, other} <= family for family in (*FAMILIES, *pairs))


@pytest.mark.parametrize("reader", IDENTIFIERS)
def test_it_reads_its_own_format_and_refuses_every_other(reader: str) -> None:
    for writer in IDENTIFIERS:
        optimizer = build_optimizer(model(), reader, lr=1e-3)
        before = copy.deepcopy(optimizer.state_dict())
        if exchange(writer, reader):
            optimizer.load_state_dict(saved(writer))
            for group, own in zip(optimizer.param_groups, before["param_groups"], strict=True):
                assert {key: group[key] for key in MARKS} == {key: own[key] for key in MARKS}
            if not compiles(reader):
                step(optimizer)
            continue
        with pytest.raises(InvalidOption) as caught:
            optimizer.load_state_dict(saved(writer))
        for name in (writer, reader):
            assert repr(saved(name)["param_groups"][0]["optim"]) in str(caught.value)
        assert_equal(optimizer.state_dict(), before, f"{writer} -> {reader}")


@pytest.mark.parametrize("reader", [case.name for case in CASES if not compiles(case.name)])
def test_without_marks_it_steps_or_is_refused_when_it_is_loaded(reader: str) -> None:
    """As files of earlier versions, of torch and of plain Lightning are."""
    for writer in (name for name in IDENTIFIERS if not compiles(name)):
        unmarked = copy.deepcopy(saved(writer))
        for group in unmarked["param_groups"]:
            for mark in MARKS:
                del group[mark]
        optimizer = build_optimizer(model(), reader, lr=1e-3)
        try:
            optimizer.load_state_dict(unmarked)
        except ValueError:  # torch's own, for another number of groups
            # Ours have always written their format.
            assert not exchange(writer, reader) or any("format" in part.defaults for part in parts_of(optimizer))
        else:
            step(optimizer)
            assert optimizer.param_groups[0]["members"] == ["0.weight", "1.weight"]


@pytest.mark.parametrize(
    ("name", "form"), [*((name, "plain") for name in NAMES), *((name, "layerwise") for name in LAYERWISE)]
)
def test_the_state_of_other_parameters_of_the_same_shapes_is_refused(name: str, form: str) -> None:
    """Layer 1 would get the moments of layer 0."""
    case = next(case for case in CASES if case.name == name)
    optimizer = build_optimizer(model(frozen=0), getattr(case, form), lr=1e-3)
    # For those that look for the output layer the frozen one is it, so that they have other groups.
    moved, regrouped = r"'1\.weight' stands where the checkpoint has '0\.weight'", "belongs to other groups"
    with pytest.raises(InvalidOption, match=moved if case.row.takes == "all" else regrouped):
        optimizer.load_state_dict(saved(name if form == "plain" and not case.in_backward else case.plain))


def test_other_groups_are_refused_by_name() -> None:
    optimizer = build_optimizer(model(), "adamw_torch", weight_decay=0.1, param_groups={"0[.]weight": {"lr": 0.5}})
    with pytest.raises(
        InvalidOption, match=r"here they are '0.*', 'decay', 'no_decay', in the checkpoint 'decay', 'no"
    ):
        optimizer.load_state_dict(saved("adamw_torch"))


def test_a_module_and_one_that_owns_it_hold_the_same_parameters() -> None:
    whole = nn.ModuleDict({"net": model()})
    build_optimizer(whole, "adamw_torch").load_state_dict(saved("adamw_torch"))
    names = build_optimizer(whole, "adamw_torch").state_dict()
    build_optimizer(model(), "adamw_torch").load_state_dict(names)
    # Without names nothing is known; the sizes must do.
    bare = [parameter for parameter in model().parameters() if parameter.requires_grad]
    build_optimizer(bare, "adamw_torch").load_state_dict(saved("adamw_torch"))


def test_a_matrix_of_the_other_orientation_is_another_one() -> None:
    """As a Trainer of elsewhere may have listed them; they have as many elements."""
    layers = nn.ModuleList([nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False)])
    theirs = torch.optim.AdamW([*layers.parameters()][::-1])
    step(theirs)
    with pytest.raises(InvalidOption, match=r"another optimizer's: it has step, exp_avg \[8, 4\]"):
        build_optimizer(layers, "adamw_torch").load_state_dict(theirs.state_dict())


def test_what_torch_wrote_is_loaded_and_marked() -> None:
    layers = model()
    theirs = torch.optim.AdamW([p for p in layers.parameters() if p.requires_grad and p.ndim > 1])
    theirs.add_param_group({"params": [p for p in layers.parameters() if p.requires_grad and p.ndim == 1]})
    step(theirs)
    optimizer = build_optimizer(layers, "adamw_torch")
    optimizer.load_state_dict(theirs.state_dict())
    assert [set(MARKS) <= set(group) for group in optimizer.state_dict()["param_groups"]] == [True, True]


@pytest.mark.parametrize("through", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "lion_8bit"])
def test_copies_write_whose_they_are(name: str, through: Any) -> None:
    assert through(build_optimizer(model(), name)).param_groups[0]["optim"] == name


def test_an_optimizer_is_freed_when_nobody_needs_it() -> None:
    import gc
    import weakref

    for name in ("adamw_torch", "lion_8bit", "stable_adamw"):
        optimizer = build_optimizer(model(), name)
        gc.collect()
        gc.disable()
        try:
            reference = weakref.ref(optimizer)
            del optimizer
            assert reference() is None, name
        finally:
            gc.enable()
