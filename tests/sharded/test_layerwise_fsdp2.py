"""Two real processes with gloo and FSDP2's shards, stepped during backward: equal to Lightning's own strategy."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_optim import IncompatibleTrainer, InvalidOption
from lightning_optim._compat.shards import absent_processes, give_mesh
from lightning_optim.trainer.strategies._blocks import shard_blocks
from tests.cases import case_of
from tests.processes import run_fresh
from tests.sharded.layerwise_fsdp2_worker import (
    ACCUMULATED,
    BUCKETS,
    COMPARED,
    MAIN,
    PRECISIONS,
    RESUMED,
    SETTINGS,
    WIDTH,
)

MIB = 2**20


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All runs by name, of each process."""
    directory = tmp_path_factory.mktemp("layerwise_fsdp2")
    done = run_fresh("-m", "tests.sharded.layerwise_fsdp2_worker", str(directory), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Returns the greatest difference of two runs' whole weights."""
    assert "error" not in one, one
    assert "error" not in other, other
    assert one["steps"] == other["steps"] == 8
    assert one["weights"].keys() == other["weights"].keys()
    pairs = ((one["weights"][key], other["weights"][key]) for key in one["weights"])
    return max((mine.double() - theirs.double()).abs().max().item() for mine, theirs in pairs)


@pytest.mark.parametrize(("name", "setting"), COMPARED)
def test_equals_model_parallel_strategy(ranks: list[dict[str, Any]], name: str, setting: str) -> None:
    flags, tolerance = SETTINGS[setting]
    for rank in ranks:
        run = rank[f"{name}, {setting}"]
        assert distance(run["plain"], run["layerwise"]) <= tolerance
        if flags:
            assert distance(run["plain"], rank["adamw_torch, plain"]["plain"]) > 1e-4, "the setting changes something"


def test_schedule_free_points_are_those_of_the_gathered_parameters(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        plain, layerwise = rank["points"].values()
        assert distance(plain, layerwise) == 0.0
        for run in (plain, layerwise):
            assert len(run["apart"]["validation"]) > 2
            # Rounded alike: a copy that was gathered at the other point would be far away.
            assert max(max(differences) for differences in run["apart"].values()) < 1e-5
            trained, evaluated = (run["points"][when] for when in ("train", "validation"))
            assert (trained[4] - evaluated[-1]).abs().max() > 1e-4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_module_without_configure_model_is_sharded_block_by_block(
    ranks: list[dict[str, Any]], precision: str
) -> None:
    for rank in ranks:
        found = rank[f"without configure_model, {precision}"]
        assert distance(found["plain"], found["layerwise"]) == 0.0
        # Besides layers that autocast rounds alike, gathered in 16 bits the embedding is rounded, too.
        assert distance(found["plain"], found["by hand"]) <= (0.0 if precision == "32-true" else 2e-2)
        for form in ("plain", "layerwise"):
            assert found[form]["seen"] == {"Linear": f"torch.{PRECISIONS[precision]}", "BatchNorm1d": "torch.float32"}
        if precision == "16-mixed":
            assert len({run["scale"] for run in found.values()}) == 1
            assert 1 < found["plain"]["scale"] < 2.0**20, "some steps overflowed"


class Model(LightningModule):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))


def tied() -> dict[str, nn.Module]:
    embedding, head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
    head.weight = embedding.weight
    return {"embedding": embedding, "blocks": nn.Sequential(block(), block()), "head": head}


def is_fsdp(module: nn.Module) -> list[str]:
    return [name for name, each in module.named_modules() if isinstance(each, FSDPModule)]


@pytest.mark.parametrize(
    ("modules", "pattern", "sharded"),
    [
        ({"net": nn.Sequential(block(), block())}, None, ["net", "net.0", "net.1"]),
        (
            {"layers": nn.ModuleList([block(), block()]), "head": nn.Linear(8, 2)},
            None,
            ["layers.0", "layers.1", "head"],
        ),
        # Two stacks of equal rank, and a small one beside them.
        (
            {
                "encoder": nn.Sequential(*(block() for _ in range(3))),
                "decoder": nn.Sequential(*(block() for _ in range(3))),
                "stem": nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)),
            },
            None,
            ["encoder", *(f"encoder.{i}" for i in range(3)), "decoder", *(f"decoder.{i}" for i in range(3)), "stem"],
        ),
        ({"first": block(), "second": block()}, "first|second[.]0", ["first", "second", "second.0"]),
    ],
)
def test_which_modules_are_sharded(modules: dict[str, nn.Module], pattern: str | None, sharded: list[str]) -> None:
    module = Model(**copy.deepcopy(modules))
    with absent_processes(2) as mesh:
        give_mesh(module, mesh)
        shard_blocks(module, pattern)
        assert is_fsdp(module) == sharded
        assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
        shard_blocks(module, pattern)  # a second fit
        assert is_fsdp(module) == sharded


@pytest.mark.parametrize(
    ("modules", "pattern", "error", "text"),
    [
        ({"first": nn.Linear(4, 4)}, None, IncompatibleTrainer, "shard=r'encoder|decoder'"),
        ({"first": nn.Linear(4, 4)}, "second", InvalidOption, "shard='second' is the whole name of no module of Model"),
        ({"first": nn.Linear(4, 4)}, "(", InvalidOption, "is not a regular expression"),
        (
            {"net": nn.Sequential(block(), block()), "scale": nn.Parameter(torch.ones(1))},
            None,
            IncompatibleTrainer,
            "'scale'",
        ),
        (tied(), None, IncompatibleTrainer, "'embedding.weight' and 'head.weight' are one parameter"),
        ({"net": nn.ModuleDict(tied())}, None, IncompatibleTrainer, "'net.embedding' and 'net.head', which"),
    ],
)
def test_what_cannot_be_sharded_by_itself(
    modules: dict[str, Any], pattern: str | None, error: type[Exception], text: str
) -> None:
    module = Model(**modules)
    with absent_processes(2) as mesh:
        give_mesh(module, mesh)
        with pytest.raises(error, match=re.escape(text)):
            shard_blocks(module, pattern)


def test_clipping_by_norm_takes_the_norm_over_all_shards(ranks: list[dict[str, Any]]) -> None:
    norms = [rank["log_grad_norm"]["norms"] for rank in ranks]
    assert len(norms[0]) == 8
    assert norms[0] == norms[1]
    assert distance(ranks[0]["log_grad_norm"], ranks[0]["adamw_torch, plain"]["plain"]) == 0


@pytest.mark.parametrize("setting", ["accumulation", ACCUMULATED])
def test_micro_batches_that_accumulate_send_nothing(ranks: list[dict[str, Any]], setting: str) -> None:
    for rank in ranks:
        run = rank[f"adamw_torch, {setting}"]
        steps = [batch % 4 in (2, 3) for batch in range(16)]  # four batches in an epoch
        assert [count > 0 for count in run["layerwise"]["reduced"]] == steps
        assert all(run["plain"]["reduced"]), "Lightning's own reduces every micro-batch"


@pytest.mark.parametrize("bucket_mb", BUCKETS)
def test_gradients_alive_are_at_most_a_bucket_and_the_largest_shard(
    ranks: list[dict[str, Any]], bucket_mb: float | None
) -> None:
    largest = WIDTH * WIDTH * 4 / 2
    for rank in ranks:
        run = rank[f"bucket_mb={bucket_mb}"]
        everything = run["plain"]["peak"]
        assert everything == sum(weight.nbytes for weight in run["plain"]["weights"].values()) / 2
        bucket = everything / 2 if bucket_mb is None else bucket_mb * MIB
        assert run["layerwise"]["peak"] <= bucket + largest < everything
        assert distance(run["plain"], run["layerwise"]) == 0


@pytest.mark.parametrize(("first", "second", "whole_file"), RESUMED)
def test_resumes_exactly_and_moves_to_and_from_the_plain_strategy(
    ranks: list[dict[str, Any]], first: str, second: str, whole_file: bool
) -> None:
    for rank in ranks:
        resumed = rank[f"{first}, {second}, {whole_file}"]
        assert len(resumed["reduced"]) == 4, "it started in the middle"
        name = case_of(first).name
        assert distance(resumed, rank[f"{name}, norm clipping"]["plain"]) == 0


def test_several_optimizers_as_one_are_sharded_and_resume_from_each_other(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        several = rank["several optimizers"]
        assert len(several) == 4
        assert all(distance(several[MAIN], run) == 0 for run in several.values())
        assert distance(several[MAIN], rank[f"{MAIN}, norm clipping"]["plain"]) > 1e-3, "the part changes something"


def test_gradients_that_fit_a_budget_wait_for_their_norm(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        run = rank["norm_budget_mb"]
        assert distance(run, rank["adamw_torch, norm clipping"]["layerwise"]) == 0
        assert run["peak"] == rank["adamw_torch, plain"]["plain"]["peak"]
        assert sum(run["reduced"]) < sum(rank["adamw_torch, norm clipping"]["layerwise"]["reduced"])


def test_refused_under_the_plain_strategy(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        refusal = rank["plain strategy"]
        assert refusal["error"] == "IncompatibleTrainer"
        assert "optim='adamw_torch_layerwise'" in refusal["text"]
        assert "'layerwise_fsdp2'" in refusal["text"]


def test_a_monitor_logs_the_truth_on_every_process(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        plain, layerwise = rank["monitor"]["adamw_torch"], rank["monitor"]["adamw_torch_layerwise"]
        assert len(plain["true"]) == 8
        for step, true in enumerate(plain["true"]):
            assert true.keys() == {"optim/grad_norm", "optim/update_ratio", "optim/momentum_norm"}
            for name, value in true.items():
                assert plain["logged"][step][name] == pytest.approx(value, rel=1e-5), name
                assert layerwise["logged"][step][name] == pytest.approx(value, rel=1e-5), name
