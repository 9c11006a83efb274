"""The table of strategies: each cell trains, equal to one process, or is refused before the first batch."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from lightning_optim import REGISTRY, build_optimizer
from lightning_optim._compat.shards import absent_processes
from lightning_optim.optimizers import OwnOptimizer
from lightning_optim.table import ROWS, STRATEGIES, strategies
from tests.cases import ELSEWHERE
from tests.processes import EVERY, run_fresh
from tests.sharded.cases import GRID, GRID_NAMES, WAYS

#: Every kind of answer; the rest take a minute: make test-sharded.
QUICK = (
    "adamw_torch_fused",
    "adafactor",
    "galore_adamw",
    "muon",
    "schedule_free_adamw",
    "lomo",
    "prodigy",
    "adamw_8bit",
    "adamw_apex_fused",
)
NAMES = tuple(name for row in ROWS for name in (row.name, *row.aliases)) if EVERY else QUICK
# Compiling torchao's steps takes a minute in each process.
ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1"}
OURS = ("IncompatibleTrainer", "MissingDependency")
Found = dict[str, Any]


@functools.cache
def ranks_of(processes: int) -> list[dict[str, Found]]:
    """What came of every fit, by strategy and name, in each process."""
    with tempfile.TemporaryDirectory() as folder:
        words = "tests.sharded.strategies_worker", str(processes), folder, ",".join(NAMES)
        done = run_fresh("-m", *words, ranks=processes, timeout=550, environment=ENVIRONMENT)
        assert done.returncode == 0, done.stderr[-3000:]
        files = [Path(folder) / f"{processes}-rank{rank}.pt" for rank in range(processes)]
        return [torch.load(file, weights_only=True) for file in files]


def assert_equal_to_one_process(ranks: list[Found], alone: Found, apart: float) -> None:
    for rank in ranks:
        assert "error" not in rank, rank
        assert rank["batches"] == alone["batches"] == 3
        assert rank["weights"].keys() == alone["weights"].keys()
        for name, weight in alone["weights"].items():
            assert torch.equal(rank["weights"][name], ranks[0]["weights"][name])
            assert (rank["weights"][name] - weight).abs().max() <= apart, name
    losses = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
    assert torch.allclose(losses, torch.tensor(alone["losses"]), rtol=1e-5, atol=1e-5)


def assert_refused(rank: Found, why: str) -> None:
    assert rank["error"] == "IncompatibleTrainer"
    assert why in rank["text"]
    assert rank["batches"] == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_each_cell_of_the_table(name: str, way: str) -> None:
    row = REGISTRY[name]
    # What steps during backward under tensor parallelism is layerwise_fsdp2 as well.
    cell = strategies(row)[way if way in STRATEGIES else "layerwise_fsdp2"]
    ranks = [rank[f"{way}, {name}"] for rank in ranks_of(WAYS[way].processes)]
    if row.name in ELSEWHERE:
        # No column of the table is for a CPU, and the package may be missing as well.
        for rank in ranks:
            assert rank["error"] in OURS
            assert name in rank["text"]
            assert rank["batches"] == 0
        return
    if not cell.trains:
        for rank in ranks:
            assert_refused(rank, cell.why)
        return
    alone = ranks_of(1)[0][f"single_device, {name}"]
    assert cell.why == ""
    # Nothing but the mean of exact gradients crosses processes that have copies.
    copies = way in ("single_device", "ddp", "layerwise_ddp")
    assert_equal_to_one_process(ranks, alone, 0.0 if copies else 1e-6)
    assert all(weight.isfinite().all() for weight in alone["weights"].values())


@pytest.mark.skipif(not EVERY, reason="two dimensions of a mesh take four processes: make test-sharded")
@pytest.mark.parametrize("way", [way.name for way in GRID])
@pytest.mark.parametrize("name", GRID_NAMES)
def test_a_transformer_split_and_sharded_equals_one_process(name: str, way: str) -> None:
    ranks = [rank[f"{way}, {name}"] for rank in ranks_of(4)]
    assert_equal_to_one_process(ranks, ranks_of(1)[0][f"{way}, {name}"], 1e-6)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_say_why_they_do_not_step_shards(row: Any) -> None:
    assert bool(row.unsharded) != row.sharded
    if row.target.startswith("lightning_optim.optimizers:"):
        kind = row.load()
        assert issubclass(kind, OwnOptimizer)
        assert (kind.sharded, kind.unsharded) == (row.sharded, row.unsharded)


@pytest.mark.parametrize(
    ("path", "refused"),
    [
        ("torch.optim.LBFGS", {"ddp", "layerwise_ddp", "fsdp2", "layerwise_fsdp2", "tensor_parallel"}),
        ("torch.optim.NAdam", set()),
        ("adamw_layerwise", {"ddp", "fsdp2", "tensor_parallel"}),
    ],
)
def test_what_no_row_describes_has_its_strategies_too(path: str, refused: set[str]) -> None:
    assert {key for key, support in strategies(REGISTRY.find(path)).items() if not support.trains} == refused


def test_a_group_of_several_kinds_is_stepped_one_by_one_and_says_so() -> None:
    with absent_processes(2) as mesh:
        shard = DTensor.from_local(torch.zeros(2, 3), mesh["data_parallel"], [Shard(0)], run_check=False)
        parameters = [nn.Parameter(shard), nn.Parameter(torch.zeros(3, 3))]
        optimizer = build_optimizer(
            [("split", parameters[0]), ("left", parameters[1])], "adamw_torch_fused", lr=0.5, weight_decay=0.0
        )
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        with pytest.warns(UserWarning, match="without its fused kernel"):
            optimizer.step()
        assert optimizer.param_groups[0]["fused"] is False
        for parameter in parameters:
            stepped = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            assert torch.allclose(stepped, torch.full_like(stepped, -0.5))
