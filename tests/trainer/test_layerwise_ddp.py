"""Two real processes with gloo, stepped during backward: equal to Lightning's DDP, and nothing hangs."""

from __future__ import annotations

import pickle
import subprocess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim import LayerwiseDDPStrategy
from tests.layerwise_ddp_worker import ACCUMULATED_NORM, BUCKETS, CHAINED, COMPARED, HOWS, LAYOUTS, OVERFLOWS, leg
from tests.models import TOKENS, LitTokens, trainer
from tests.processes import run_fresh

MIB = 2**20
Run = dict[str, Any]


def start(task: str, *arguments: object, timeout: int = 300, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    return run_fresh("-m", "tests.layerwise_ddp_worker", task, *map(str, arguments), timeout=timeout, ranks=ranks)


@pytest.fixture(scope="module")
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes have left their runs, and the chain's checkpoints.

    With ``-k NAME``, where no other test looks at a run, they only compare that name with DDP.
    """
    directory = tmp_path_factory.mktemp("layerwise_ddp")
    looking = [test for test in request.session.items if {"directory", "ranks"} & {*getattr(test, "fixturenames", ())}]
    tests = [test for test in looking if isinstance(test, pytest.Function) and test.module is request.module]
    compares = all(test.originalname == test_equals_ddp.__name__ for test in tests)
    names = {test.callspec.params["name"] for test in tests} if compares else set()
    for name in () if names else CHAINED:
        leg(name, directory / name / "plain")
        leg(name + "_layerwise", directory / name / "layerwise", directory / name / "plain" / "step=5.ckpt")
    done = start("runs", directory, *names)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.fixture(scope="module")
def ranks(directory: Path) -> list[dict[str, Any]]:
    """All runs by name, of each process."""
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def stepped(ranks: list[dict[str, Any]], run: str) -> list[Run]:
    """Returns a run layer by layer, of each process, that made its ten steps and was the same on both at any time."""
    runs = [rank[run]["layerwise"] for rank in ranks]
    for noted in runs:
        assert "error" not in noted, noted
        assert noted["steps"] == 10
        assert len(noted["same"]) >= 10
        assert all(noted["same"])
    return runs


def assert_equals_ddp(ranks: list[dict[str, Any]], run: str) -> None:
    for rank, noted in zip(ranks, stepped(ranks, run), strict=True):
        assert rank[run]["ddp"]["steps"] == 10
        assert equal(noted["weights"], rank[run]["ddp"]["weights"])


@pytest.mark.parametrize(("name", "setting"), COMPARED)
def test_equals_ddp(ranks: list[dict[str, Any]], name: str, setting: str) -> None:
    assert_equals_ddp(ranks, f"{name}, {setting}")


def test_forked_processes_do_the_same(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    done = start("notebook", tmp_path / "forked.pt", timeout=120, ranks=1)
    assert done.returncode == 0, done.stderr[-3000:]
    forked = torch.load(tmp_path / "forked.pt", weights_only=True)
    assert equal(forked["weights"], ranks[0][f"adamw_8bit, {ACCUMULATED_NORM}"]["ddp"]["weights"])


def test_what_is_sent_to_spawned_processes() -> None:
    run, model = trainer(strategy="layerwise_ddp_spawn", devices=2), LitTokens(optim="adamw_8bit_layerwise", lr=0.5)
    arrived, module = pickle.loads(ForkingPickler.dumps((run, model)))
    assert isinstance(arrived.strategy, LayerwiseDDPStrategy)
    assert arrived.strategy.launcher._start_method == "spawn"
    assert module.optim_config == model.optim_config


def test_all_take_the_first_processs_weights_at_the_start(ranks: list[dict[str, Any]]) -> None:
    assert_equals_ddp(ranks, "seeded by rank")
    for rank in ranks:
        assert equal(rank["seeded by rank"]["layerwise"]["weights"], ranks[0]["adamw_torch, plain"]["ddp"]["weights"])


@pytest.mark.parametrize("accumulation", ["accumulation", ACCUMULATED_NORM])
def test_micro_batches_that_accumulate_send_nothing(ranks: list[dict[str, Any]], accumulation: str) -> None:
    for run in stepped(ranks, f"adamw_torch, {accumulation}"):
        steps = [batch % 7 in (2, 5, 6) for batch in range(len(run["reduced"]))]  # seven batches in an epoch
        assert [count > 0 for count in run["reduced"]] == steps
        assert sum(steps) == 10


@pytest.mark.parametrize("bucket_mb", BUCKETS)
def test_gradients_alive_are_at_most_a_bucket_and_the_largest(
    ranks: list[dict[str, Any]], bucket_mb: float | None
) -> None:
    run = f"bucket_mb={bucket_mb}"
    assert_equals_ddp(ranks, run)
    largest = (2 * TOKENS) ** 2 * 4
    for rank, noted in zip(ranks, stepped(ranks, run), strict=True):
        everything = sum(weight.nbytes for weight in noted["weights"].values())
        assert rank[run]["ddp"]["peak"] == everything
        bucket = everything / 2 if bucket_mb is None else bucket_mb * MIB
        assert noted["peak"] <= bucket + largest < everything


def test_log_grad_norm_is_the_norm_of_what_ddp_averages(ranks: list[dict[str, Any]]) -> None:
    for accumulate in (1, 3):
        run = f"log_grad_norm, {accumulate}"
        assert_equals_ddp(ranks, run)
        for rank, noted in zip(ranks, stepped(ranks, run), strict=True):
            logged = [norm for norm, sent in zip(noted["norms"], noted["reduced"], strict=True) if sent]
            assert len(logged) == 10
            assert equal(logged, rank[run]["ddp"]["own_norms"])


def test_several_optimizers_as_one(ranks: list[dict[str, Any]]) -> None:
    assert_equals_ddp(ranks, "several optimizers")


@pytest.mark.parametrize("how", HOWS)
def test_other_norm_clipping_equals_clipping_by_hand_under_ddp(ranks: list[dict[str, Any]], how: str) -> None:
    assert_equals_ddp(ranks, how)
    assert not equal(ranks[0][how]["ddp"]["weights"], ranks[0]["adamw_torch, plain"]["ddp"]["weights"])


@pytest.mark.parametrize("where", OVERFLOWS)
def test_an_overflow_in_one_process_lowers_the_scale_of_both(ranks: list[dict[str, Any]], where: str) -> None:
    run = f"overflow, {where}"
    scales = [noted["scales"] for noted in stepped(ranks, run)]
    assert scales[0] == scales[1] == ranks[0][run]["ddp"]["scales"]
    assert scales[0][0] > scales[0][3]
    if where == "one":
        # Here alone it is decided bucket by bucket: the buckets without overflow were stepped.
        assert not equal(ranks[0][run]["layerwise"]["weights"], ranks[0][run]["ddp"]["weights"])
    else:
        assert_equals_ddp(ranks, run)


def test_buffers_are_those_of_the_first_process_as_in_ddp(ranks: list[dict[str, Any]]) -> None:
    run = "buffers"
    for key, forwards in (("trained", 9), ("validated", 3 * 2)):
        first, second = (rank[run]["layerwise"][key] for rank in ranks)
        assert len(first) == forwards
        assert equal(first, second)
        assert equal(first, ranks[0][run]["ddp"][key])
    for rank in ranks:
        assert all(rank[run]["layerwise"]["same"])
    assert equal(ranks[0][run]["layerwise"]["weights"], ranks[0][run]["ddp"]["weights"])


@pytest.mark.parametrize(("name", "options"), LAYOUTS)
def test_gradients_keep_the_layout_of_their_parameters(
    ranks: list[dict[str, Any]], name: str, options: dict[str, Any]
) -> None:
    assert_equals_ddp(ranks, f"layouts, {name}, {options}")


def test_gradients_may_arrive_in_another_order_in_each_process(ranks: list[dict[str, Any]]) -> None:
    assert_equals_ddp(ranks, "branches")


def test_an_optimizer_of_the_modules_own(ranks: list[dict[str, Any]]) -> None:
    assert_equals_ddp(ranks, "own optimizer")
    own = ranks[0]["own optimizer"]
    assert own["layerwise"]["peak"] < own["ddp"]["peak"]


def test_a_parameter_unfrozen_later_is_averaged_too(ranks: list[dict[str, Any]]) -> None:
    frozen, trained = (
        ranks[0][run]["layerwise"]["weights"]["model.linear.weight"] for run in ("unfrozen later", "adamw_torch, plain")
    )
    stepped(ranks, "unfrozen later")
    assert not equal(frozen, trained)


def test_a_parameter_may_be_missing_in_some_micro_batches(ranks: list[dict[str, Any]]) -> None:
    assert_equals_ddp(ranks, "only in last micro-batches")
    for run in stepped(ranks, "only in first micro-batches"):
        assert not equal(run["weights"]["extra"], torch.ones(TOKENS))


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ("unused", ["'extra' got no gradient in process 0", "ddp_find_unused_parameters_true"]),
        ("unused in one process", ["'extra' got no gradient in process 1", "requires_grad_(False)"]),
        ("manual", ["strategy='layerwise_ddp'", "manual optimization", "strategy='ddp'"]),
        ("sparse", ["'model.embedding.weight'", "sparse=False", "strategy='ddp'"]),
        ("plain strategy", ["optim='adamw_8bit_layerwise'", "'ddp'", "strategy='layerwise_ddp'"]),
    ],
)
def test_refused_by_both_processes(ranks: list[dict[str, Any]], run: str, says: list[str]) -> None:
    for rank in ranks:
        noted = rank[run]
        assert noted["error"] == "IncompatibleTrainer"
        assert all(part in noted["text"] for part in says), noted["text"]
        assert noted["batches"] == 0
        assert noted["hooked"] == []
    assert_equals_ddp(ranks, "after refusals")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_parameter_that_becomes_unused_in_one_process_is_an_error_and_not_a_hang(rank: int) -> None:
    done = start("unused later", rank, timeout=90)
    assert done.returncode != 0
    assert "'extra' got no gradient in this process" in done.stderr


@pytest.mark.parametrize("given", [{"find_unused_parameters": True}, {"ddp_comm_hook": print}])
def test_arguments_of_distributed_data_parallel_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(given))}.*use DDPStrategy"):
        LayerwiseDDPStrategy(**given)


@pytest.mark.parametrize("name", CHAINED)
def test_plain_then_layerwise_then_two_processes_then_plain_equals_plain(name: str, directory: Path) -> None:
    """Each leg starts from a checkpoint of the one before, within the schedule."""
    legs = directory / name
    resumed = leg(name, legs / "resumed", legs / "layerwise_ddp" / "step=15.ckpt")
    for other in ("layerwise", "layerwise_ddp", "resumed"):
        assert len(list((legs / other).iterdir())) == {"layerwise": 3, "layerwise_ddp": 2, "resumed": 1}[other]
    whole = torch.load(legs / "plain" / "step=20.ckpt", weights_only=True)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert equal(whole[key], resumed[key]), key


def test_a_monitor_logs_the_truth_on_every_process(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        plain, layerwise = rank["monitor"]["ddp"], rank["monitor"]["layerwise"]
        assert len(plain["true"]) == 10
        for step, true in enumerate(plain["true"]):
            assert true.keys() == {"optim/grad_norm", "optim/update_ratio", "optim/momentum_norm"}
            for name, value in true.items():
                assert plain["logged"][step][name] == pytest.approx(value, rel=1e-5), name
                assert layerwise["logged"][step][name] == pytest.approx(value, rel=1e-5), name
