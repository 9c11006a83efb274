"""Learning-rate schedules: equal to Hugging Face's at every step, warm-up, refusals, tensor learning rates."""

from __future__ import annotations

import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from lightning_optim import InvalidOption, UnknownSchedule, build_optimizer, build_schedule
from lightning_optim.build._curves import SCHEDULES, get_schedule
from lightning_optim.build._schedules import parse_warmup, resolve_warmup

TOTAL = 40


def optimizer_with(*rates: float) -> Optimizer:
    """An optimizer with a group per learning rate; the first is the default."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return SGD(groups, lr=rates[0])


def curve(scheduler: Any, steps: int) -> Tensor:
    """The learning rates, a row per step (from before the first on) and a column per group."""
    rates = []
    for _ in range(steps):
        rates.append([float(group["lr"]) for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return torch.tensor(rates, dtype=torch.float64)


def assert_equal(rates: Tensor, expected: Any, rtol: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(rates, expected, rtol=rtol, atol=1e-9 if rtol > 1e-7 else 1e-18)


# Per schedule: what Hugging Face calls lr_scheduler_kwargs, which we call lr_scheduler_args.
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "constant": [{}],
    "constant_with_warmup": [{}],
    "linear": [{}],
    "cosine": [{}, {"num_cycles": 0.5}, {"num_cycles": 1.25}],
    "cosine_with_min_lr": [{"min_lr": 0.01}, {"min_lr_rate": 0.25, "num_cycles": 1.25}, {"min_lr_rate": 0.0}],
    "cosine_warmup_with_min_lr": [
        {"min_lr_rate": 0.25},
        {"min_lr": 0.01, "warmup_lr_rate": 0.5},
        {"min_lr": 0.0, "warmup_lr_rate": 0.0, "num_cycles": 0.75},
    ],
    "cosine_with_restarts": [{}, {"num_cycles": 3}],
    "polynomial": [{}, {"power": 2.0}, {"lr_end": 1e-3, "power": 0.5}, {"lr_end": 0.0}],
    "inverse_sqrt": [{}, {"timescale": 5}],
    "warmup_stable_decay": [
        {"num_decay_steps": 10},
        {"num_decay_steps": 10, "min_lr_ratio": 0.25, "decay_type": "linear", "warmup_type": "cosine"},
        {"num_decay_steps": 12, "decay_type": "1-sqrt", "warmup_type": "1-sqrt"},
        {"num_decay_steps": 12, "num_cycles": 1.0},
        {"num_decay_steps": 0},
    ],
}
CURVES = [
    (name, warmup, arguments)
    for name, several in ARGUMENTS.items()
    for arguments in several
    for warmup in ([0] if name == "constant" else [0, 1, 7, 25])
]


def test_all_names_are_covered() -> None:
    assert {*ARGUMENTS, "reduce_lr_on_plateau"} == set(SCHEDULES)
    assert all(get_schedule(name).name == name and SCHEDULES[name].summary for name in SCHEDULES)


@pytest.mark.parametrize(("name", "warmup", "arguments"), CURVES)
def test_equal_to_hugging_face_at_every_step(name: str, warmup: int, arguments: dict[str, Any]) -> None:
    from transformers import get_scheduler

    for total in (TOTAL, 60):
        ours = build_schedule(optimizer_with(0.1, 0.1), name, total, warmup, arguments)
        theirs = get_scheduler(name, optimizer_with(0.1, 0.1), warmup, total, scheduler_specific_kwargs=dict(arguments))
        # Beyond the end, too: a run may go on.
        assert_equal(curve(ours, total + 5), curve(theirs, total + 5))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_groups_keep_their_own_peaks_as_in_hugging_face(name: str) -> None:
    from transformers import get_scheduler

    arguments, warmup = ARGUMENTS[name][:2][-1], 0 if name == "constant" else 5
    ours = build_schedule(optimizer_with(0.1, 0.02, 3.0), name, TOTAL, warmup, arguments)
    theirs = get_scheduler(
        name, optimizer_with(0.1, 0.02, 3.0), warmup, TOTAL, scheduler_specific_kwargs=dict(arguments)
    )
    assert_equal(curve(ours, TOTAL), curve(theirs, TOTAL))


def test_a_schedule_stretches_when_resumed_with_more_steps() -> None:
    first = build_schedule(optimizer_with(0.1), "linear", 10)
    curve(first, 5)
    longer = build_schedule(optimizer_with(0.1), "linear", 20)
    longer.load_state_dict(first.state_dict())
    longer.optimizer.load_state_dict(first.optimizer.state_dict())
    assert_equal(curve(longer, 3)[1:, 0], [0.1 * 14 / 20, 0.1 * 13 / 20])


def test_the_state_of_a_schedule_holds_plain_values_only() -> None:
    schedule = build_schedule(optimizer_with(0.1), "cosine", 10, 2)
    curve(schedule, 3)
    state = schedule.state_dict()
    assert state["last_epoch"] == 3
    plain = (int, float, bool, str, list, type(None))
    assert all(isinstance(value, plain) for value in state.values()), state


def test_schedules_can_be_pickled() -> None:
    for name, arguments in ARGUMENTS.items():
        schedule = build_schedule(optimizer_with(0.1), name, 10, 0, arguments[-1])
        curve(schedule, 3)
        again = pickle.loads(pickle.dumps(schedule))
        assert_equal(curve(again, 4), curve(schedule, 4))


# --- warm-up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmup", "parsed", "steps"),
    [
        (0, 0, 0),
        (5, 5, 5),
        (5.0, 5, 5),
        ("5", 5, 5),
        (1, 1, 1),
        (0.1, 0.1, 10),
        ("0.1", 0.1, 10),
        (0.101, 0.101, 11),
        (1e-9, 1e-9, 1),
    ],
)
def test_warmup_is_a_count_or_a_fraction(warmup: Any, parsed: float, steps: int) -> None:
    value = parse_warmup(warmup)
    assert value == parsed
    assert type(value) is type(parsed)
    assert resolve_warmup(warmup, 100) == steps


@pytest.mark.parametrize("warmup", [-1, 1.5, "many", None, math.nan, math.inf, True, [5], "1e400", 10**400])
def test_other_warmups_are_refused(warmup: Any) -> None:
    with pytest.raises(InvalidOption) as caught:
        build_schedule(optimizer_with(0.1), "linear", 100, warmup)
    assert f"warmup_steps={warmup!r}" in str(caught.value)
    assert "a whole number of steps or a fraction of the training below 1" in str(caught.value)


def test_a_fraction_is_taken_of_the_whole_training() -> None:
    by_fraction = curve(build_schedule(optimizer_with(0.1), "cosine", 30, 0.1), 30)
    by_count = curve(build_schedule(optimizer_with(0.1), "cosine", 30, 3), 30)
    assert torch.equal(by_fraction, by_count)


@pytest.mark.parametrize(("warmup", "said"), [(9, False), (10, True), (25, True)])
def test_a_warmup_as_long_as_the_training_is_said(warmup: int, said: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_schedule(optimizer_with(0.1), "linear", 10, warmup)
    expected = [f"the warm-up has {warmup} steps and the whole training 10"] if said else []
    assert [str(warning.message).partition(":")[0] for warning in caught] == expected


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [("cosinus", "'cosine'"), ("polynom", "'polynomial'"), ("StepLR", ""), ({"scheduler": 1}, ""), (["x"], "")],
)
def test_unknown_schedules_are_refused(name: Any, near: str) -> None:
    with pytest.raises(UnknownSchedule) as caught:
        build_schedule(optimizer_with(0.1), name, 10)
    message = str(caught.value)
    assert f"there is no lr_scheduler {name!r}" in message
    assert f"Did you mean {near}" in message if near else "Did you mean" not in message
    assert all(repr(known) in message for known in SCHEDULES)
    assert "configure_optimizers" in message


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        *[
            (
                name,
                {"args": ARGUMENTS[name][0]},
                [f"lr_scheduler={name!r} needs the length of the training", "max_steps"],
            )
            for name in ARGUMENTS
            if SCHEDULES[name].needs_total
        ],
        ("constant_with_warmup", {"warmup_steps": 0.1}, ["warmup_steps=0.1", "length is unknown", "max_steps"]),
        ("constant", {"warmup_steps": 3}, ["'constant' has no warm-up", "warmup_steps=3", "'constant_with_warmup'"]),
        ("reduce_lr_on_plateau", {"warmup_steps": 3}, ["'reduce_lr_on_plateau' has no warm-up", "'linear'"]),
        ("linear", {"total_steps": 9, "args": "power=2"}, ["'linear' has no option 'power'", "It takes no options"]),
        ("cosine", {"total_steps": 9, "args": "num_cycles=0"}, ["num_cycles='0' of 'cosine' is out of range"]),
        (
            "cosine_with_restarts",
            {"total_steps": 9, "args": {"num_cycles": 1.5}},
            ["num_cycles=1.5 (float) does not fit the option of 'cosine_with_restarts'", "int"],
        ),
        ("polynomial", {"total_steps": 9, "args": "lr_end=0.2"}, ["lr_end=0.2 must be smaller", "0.1"]),
        ("polynomial", {"total_steps": 9, "args": "lr_end=0.1"}, ["lr_end=0.1 must be smaller", "0.1"]),
        ("cosine_with_min_lr", {"total_steps": 9}, ["neither of min_lr and min_lr_rate", "min_lr_rate=0.1"]),
        ("cosine_with_min_lr", {"total_steps": 9, "args": "min_lr=1e-3,min_lr_rate=0.1"}, ["both of min_lr and"]),
        ("cosine_warmup_with_min_lr", {"total_steps": 9, "args": "min_lr=0.2"}, ["min_lr=0.2 must be smaller", "0.1"]),
        ("inverse_sqrt", {"args": "timescale=0"}, ["timescale='0' of 'inverse_sqrt' is out of range"]),
        ("warmup_stable_decay", {"total_steps": 9}, ["needs 'num_decay_steps' in lr_scheduler_args"]),
        (
            "warmup_stable_decay",
            {"total_steps": 9, "args": "num_decay_steps=3,decay_type=step"},
            ["decay_type='step'", "'linear' | 'cosine' | '1-sqrt'"],
        ),
        (
            "warmup_stable_decay",
            {"total_steps": 9, "args": "num_decay_steps=3,min_lr_ratio=1.5"},
            ["min_lr_ratio='1.5'", "0 <= value <= 1"],
        ),
        ("reduce_lr_on_plateau", {"args": "mode=up"}, ["mode='up'", "'min' | 'max'"]),
        ("reduce_lr_on_plateau", {"args": "factor=1"}, ["factor='1'", "0 <= value < 1"]),
    ],
)
def test_wrong_schedules_are_refused(name: str, arguments: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(InvalidOption) as caught:
        build_schedule(optimizer_with(0.1), name, **arguments)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_schedules_without_an_end_need_no_length() -> None:
    for name in ("constant", "constant_with_warmup", "inverse_sqrt"):
        assert isinstance(build_schedule(optimizer_with(0.1), name), LRScheduler)
    stable = {"num_stable_steps": 3, "num_decay_steps": 2}
    rates = curve(build_schedule(optimizer_with(1.0), "warmup_stable_decay", warmup_steps=2, args=stable), 8)
    assert_equal(rates[:, 0], [0, 0.5, 1, 1, 1, 1, 0.5, 0])


# --- plateau ---------------------------------------------------------------------------------------------------------


def test_plateau_is_torch_s_with_the_options_given() -> None:
    args = "factor=0.5,patience=1,mode=max,threshold=0.5,threshold_mode=abs,cooldown=1,min_lr=0.01,eps=0,monitor='acc'"
    ours = build_schedule(optimizer_with(0.1), "reduce_lr_on_plateau", args=args)
    assert isinstance(ours, ReduceLROnPlateau)
    theirs = ReduceLROnPlateau(
        optimizer_with(0.1), "max", 0.5, 1, threshold=0.5, threshold_mode="abs", cooldown=1, min_lr=0.01, eps=0
    )
    rates: dict[Any, list[float]] = {ours: [], theirs: []}
    for metric in [1.0, 1.2, 1.4, 1.6, 3.0, 3.1, 3.2, 3.3, 3.4, 3.5, 3.6, 3.7, 3.8, 3.9]:
        for schedule, found in rates.items():
            schedule.step(metric)
            found.append(schedule.optimizer.param_groups[0]["lr"])
    assert rates[ours] == rates[theirs]
    assert rates[ours][-1] < rates[ours][0]


def test_plateau_defaults_are_torch_s() -> None:
    ours = build_schedule(optimizer_with(0.1), "reduce_lr_on_plateau")
    theirs = ReduceLROnPlateau(optimizer_with(0.1))
    keys = set(ours.state_dict()) - {"name"}
    assert {key: ours.state_dict()[key] for key in keys} == {key: theirs.state_dict()[key] for key in keys}


# --- tensor learning rates (torchao) ---------------------------------------------------------------------------------


@pytest.fixture
def torchao_optimizer() -> Any:
    """torchao's AdamW keeps its learning rate in a tensor; without gradients its step compiles nothing."""
    return build_optimizer(nn.Linear(4, 4), "adamw_torch_8bit", lr=0.1, param_groups={"bias": {"lr": 0.02}})


def test_tensor_learning_rates_follow_a_schedule(torchao_optimizer: Any) -> None:
    tensors = [group["lr"] for group in torchao_optimizer.param_groups]
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors)
    rates = curve(build_schedule(torchao_optimizer, "cosine", 20, 4), 22)
    expected = curve(build_schedule(optimizer_with(0.1, 0.02), "cosine", 20, 4), 22)
    assert_equal(rates, expected, rtol=1e-6)
    # The same tensors: a compiled step reads them.
    assert all(group["lr"] is tensor for group, tensor in zip(torchao_optimizer.param_groups, tensors, strict=True))


def test_tensor_learning_rates_follow_one_cycle(torchao_optimizer: Any) -> None:
    rates = curve(OneCycleLR(torchao_optimizer, max_lr=0.1, total_steps=20, cycle_momentum=False), 19)
    expected = curve(OneCycleLR(optimizer_with(0.1, 0.02), max_lr=0.1, total_steps=20, cycle_momentum=False), 19)
    assert_equal(rates, expected, rtol=1e-5)


def test_tensor_learning_rates_follow_a_plateau(torchao_optimizer: Any) -> None:
    schedule = build_schedule(torchao_optimizer, "reduce_lr_on_plateau", args="patience=0,factor=0.5")
    for metric in (1.0, 1.0, 1.0):
        schedule.step(metric)
    assert [float(group["lr"]) for group in torchao_optimizer.param_groups] == pytest.approx([0.025, 0.005])


def test_floats_may_be_assigned_to_tensor_learning_rates(torchao_optimizer: Any) -> None:
    (decayed, bias) = torchao_optimizer.param_groups
    for parameter in decayed["params"] + bias["params"]:
        parameter.grad = torch.ones_like(parameter)
    before = [p.detach().clone() for p in (decayed["params"][0], bias["params"][0])]
    decayed["lr"], bias["lr"] = 0.5, 0.0
    with torch.compiler.set_stance("force_eager"):
        torchao_optimizer.step()
    # AdamW's first step moves by lr, after the decay by lr * weight_decay.
    assert torch.allclose(decayed["params"][0], before[0] * (1 - 0.5 * 0.01) - 0.5, atol=1e-5)
    assert torch.equal(bias["params"][0], before[1])
    assert isinstance(decayed["lr"], torch.Tensor)
