"""Our optimizers on shards, in real processes with gloo: the same numbers as on whole parameters, by few messages."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

import lightning_optim.optimizers
from lightning_optim import InvalidOption, InvalidParamGroups
from lightning_optim._compat.shards import absent_processes
from tests.processes import EVERY, run_fresh
from tests.sharded.cases import CASES, LOW_RANK, MATRICES, Stepped, fits, meshes

# Four processes take twice as long on two cores: make test-sharded.
PROCESSES = (2, 4) if EVERY else (2,)
# A basis is as exact as the gaps between singular values let it be.
BASES_APART, STATES_APART = 1e-3, 1e-5
_OVERSAMPLING = 8


RUNS = [
    pytest.param(processes, mesh, case, id=f"{processes} processes, {mesh}, {case}")
    for processes in PROCESSES
    for mesh in meshes(processes)
    for case in CASES
    if fits(case, mesh)
]
ROWS = [run for run in RUNS if run.values[1] == "rows"]


@functools.cache
def ranks_of(processes: int) -> list[dict[str, Any]]:
    """All comparisons by name, of each process."""
    with tempfile.TemporaryDirectory() as folder:
        done = run_fresh("-m", "tests.sharded.worker", str(processes), folder, ranks=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.parametrize(("processes", "mesh", "case"), RUNS)
def test_shards_equal_one_process(processes: int, mesh: str, case: Stepped) -> None:
    for rank in (each[f"{case}, {mesh}"] for each in ranks_of(processes)):
        assert rank["moved"] > 1e-4
        # Split along both dimensions, sums cross processes in rows, too.
        assert rank["apart"] <= (max(case.apart, 1e-6) if mesh == "grid" and case.name == "Scale" else case.apart)
        assert rank["states"] <= (BASES_APART if "rank" in case.options else STATES_APART)


@pytest.mark.parametrize(("processes", "mesh", "case"), ROWS)
def test_all_parameters_share_messages(processes: int, mesh: str, case: Stepped) -> None:
    for rank in (each[f"{case}, {mesh}"] for each in ranks_of(processes)):
        assert len(rank["sent"]) == case.rounds


@pytest.mark.parametrize(
    ("processes", "mesh", "case"),
    [run for run in ROWS if cast(Stepped, run.values[2]).options.get("rank", 0) > 1],
)
def test_low_rank_updates_send_little(processes: int, mesh: str, case: Stepped) -> None:
    width = LOW_RANK["rank"] + _OVERSAMPLING
    matrices = [(shape[0], torch.Size(shape[1:]).numel()) for shape in MATRICES]
    for rank in (each[f"{case}, {mesh}"] for each in ranks_of(processes)):
        assert sum(size for _, size in rank["sent"]) <= sum(4 * (m + n) * width for m, n in matrices)


@pytest.mark.skipif(4 not in PROCESSES, reason="two dimensions of a mesh take four processes: make test-sharded")
def test_what_fsdp2_and_tensor_parallelism_split_is_where_the_layout_says() -> None:
    for rank in ranks_of(4):
        assert all(rank["strided"].values()), rank["strided"]
        assert len(rank["strided"]) == 6


@pytest.mark.parametrize(
    ("name", "options", "shape", "split", "error", "text"),
    [
        ("GaLoreAdamW", {**LOW_RANK, "projection": "svd"}, (8, 8), 0, InvalidOption, "use projection='randomized'"),
        ("ApolloAdamW", {**LOW_RANK, "proj": "svd"}, (8, 8), 0, InvalidOption, "use proj='random'"),
        ("GaLoreAdamW", {**LOW_RANK, "proj_type": "full"}, (8, 8), 0, InvalidOption, "use proj_type='std'"),
        ("GaLoreAdamW", {**LOW_RANK, "stack_dims": 1}, (4, 8, 8), 0, InvalidParamGroups, "stack_dims=1"),
        ("Muon", {}, (8, 4, 3), 1, InvalidParamGroups, "flattens the last 2 dimensions"),
        ("Scale", {}, (8, 4, 3), 2, InvalidParamGroups, "flattens the last 2 dimensions"),
        ("AdamMini", {}, (8, 8), 0, InvalidParamGroups, "averages squares over blocks of a whole parameter"),
    ],
)
def test_what_cannot_be_stepped_on_shards_is_refused(
    name: str, options: dict[str, Any], shape: tuple[int, ...], split: int, error: type[Exception], text: str
) -> None:
    with absent_processes(2) as mesh:
        sizes = [-(-size // 2) if dim == split else size for dim, size in enumerate(shape)]
        placed = [Shard(split)]
        shard = DTensor.from_local(torch.zeros(sizes), mesh["data_parallel"], placed, run_check=False)
        with pytest.raises(error, match=text):
            getattr(lightning_optim.optimizers, name)([nn.Parameter(shard)], **options)
