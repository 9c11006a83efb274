"""check_optimizer: every row keeps the promises, and of each promise a class that breaks only that one is found out."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer

from lightning_optim import REGISTRY, IncompatibleTrainer, InvalidOption, UnknownOptimizer
from lightning_optim.table import Buffer, StateLayout
from lightning_optim.testing import PROMISES, BrokenPromise, check_optimizer, check_results, held
from tests.cases import NAMES
from tests.testing import faulty

MOMENTUM = dataclasses.replace(
    REGISTRY.find("tests.testing.faulty.Momentum"),
    name="momentum",
    state=StateLayout(buffers=(Buffer("momentum"),)),
)
FORGETFUL = dataclasses.replace(MOMENTUM, name="forgetful", state=StateLayout(buffers=()))
# What breaks a promise, and what is said.
FAULTY: dict[str, tuple[Any, str]] = {
    "trains": (faulty.Forgets, r"expected a lower loss after 20 steps; it went from [\d.]+ to [\d.]+"),
    "schedule": (faulty.KeepsItsFirstRate, "divided the learning rate by 10; the step is 1.00 times as large"),
    "groups": (faulty.TakesTheFirstGroupsRate, "a tenth of the learning rate; they are 1.00 times as large"),
    "missing_gradients": (faulty.DecaysWithoutGradients, "expected no movement without any gradient; "),
    "shapes": (faulty.AsksForRows, "parameters of any shape; IndexError"),
    "bf16_weights": (faulty.NeedsSingularValues, "steps of bfloat16 parameters; NotImplementedError"),
    "fp16_scaling": (
        faulty.CountsWhatIsSkipped,
        "expected an overflow to change nothing; .*'rounds'.* is 4 instead of 3",
    ),
    "accumulation": (faulty.AveragesArrivals, "the same step from four backward passes as from one"),
    "resume": (faulty.CountsItsLoads, "expected the saved state after loading; .*loads"),
    "weights_only": (faulty.KeepsFractions, r"torch.load\(weights_only=True\) to read the state; .*Fraction"),
    "deepcopy": (faulty.CannotBeCopied, "TypeError: there is one of each"),
    "pickle": (faulty.CannotBePickled, "TypeError: it holds a file"),
    "distributed_checkpoint": (faulty.DividesByTheGradient, "ZeroDivisionError: a gradient is zero"),
    "layerwise": (faulty.ClipsAll, "expected the same bits in both forms"),
    "state_bytes": (FORGETFUL, "expected 0 bytes of state; it takes 25408"),
    "closure": (faulty.KeepsTheLoss, r"the closure's loss from step\(closure\); it returned None"),
    "constructor": (faulty.TakesLists, "an iterator of parameters to be taken; TypeError"),
}


@pytest.mark.parametrize("name", NAMES)
def test_rows_keep_their_promises(name: str) -> None:
    """What a row refuses is said by its rule; the rest holds."""
    row = REGISTRY[name]
    refused = {promise for promise, no in (("schedule", row.averages_weights), ("layerwise", row.coupled)) if no}
    for result in held(name, {}):
        expected = "refused" if result.promise in refused else "kept"
        assert (result.status, result.text if expected == "kept" else "") == (expected, ""), result


def test_every_promise_is_broken_by_a_class() -> None:
    assert FAULTY.keys() == PROMISES.keys()
    assert all(promise.__doc__ for promise in PROMISES.values())


@pytest.mark.parametrize("promise", PROMISES)
def test_a_class_that_breaks_one_promise_is_found_out(promise: str) -> None:
    optim, text = FAULTY[promise]
    results = check_results(optim)
    assert list(results) == list(PROMISES)
    assert [name for name, result in results.items() if result.status == "broken"] == [promise], results
    assert [name for name, result in results.items() if result.status == "unsaid"] == (
        [] if promise == "state_bytes" else ["state_bytes"]
    )
    with pytest.raises(BrokenPromise, match=f"(?s)^optim='.*' breaks the promise '{promise}': .*{text}"):
        for _ in held(optim, {}, _raise, [promise]):
            pass


def _raise(error: BrokenPromise) -> None:
    raise error


def test_the_first_broken_promise_is_raised() -> None:
    with pytest.raises(BrokenPromise) as error:
        check_optimizer(faulty.AsksForRows)
    assert (error.value.promise, error.value.optim) == ("shapes", "tests.testing.faulty.AsksForRows")
    assert error.value.expected == "steps of parameters of any shape"
    assert isinstance(error.value.__cause__, IndexError)


def test_a_right_class_and_a_row_that_is_not_registered_pass() -> None:
    random.seed(3)
    before = torch.random.get_rng_state(), random.getstate()
    check_optimizer(faulty.Momentum, lr=0.01, weight_decay=0.1)
    assert check_results(MOMENTUM)["state_bytes"].status == "kept"
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == random.getstate()
    assert "momentum" not in REGISTRY


def test_rounding_is_told_from_another_result() -> None:
    (result,) = held(faulty.RoundsStacks, {}, promises=["layerwise"])
    assert result.status == "kept"
    assert result.text.endswith("as if gradients were rounded otherwise")


def test_what_the_row_refuses_is_not_broken() -> None:
    results = check_results("adafactor", optim_args={"relative_step": True})
    assert {result.status for result in results.values()} == {"kept", "refused"}
    assert "relative_step=True, which computes the learning rate itself" in results["groups"].text


def local() -> type[Optimizer]:
    class Local(SGD):
        pass

    return Local


@pytest.mark.parametrize(
    ("optim", "error", "text"),
    [
        (local(), InvalidOption, "local.<locals>.Local cannot be found by this path"),
        (3, InvalidOption, "an identifier, a dotted path, a class or a row can be checked, got 3"),
        ("adamw_torhc", UnknownOptimizer, "adamw_torch"),
        ("tests.testing.faulty.Absent", UnknownOptimizer, "cannot be imported"),
        (dataclasses.replace(MOMENTUM, default_lr=None), IncompatibleTrainer, "Give lr"),
    ],
    ids=["local", "number", "typo", "absent", "without lr"],
)
def test_what_cannot_be_built_is_said_at_once(optim: Any, error: type[Exception], text: str) -> None:
    for check in (check_optimizer, check_results):
        with pytest.raises(error, match=text):
            check(optim)
