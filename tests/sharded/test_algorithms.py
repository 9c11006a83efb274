"""Our optimizers on shards, in real processes with gloo: the same numbers as on whole parameters, by few messages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

import lightning_optim.optimizers
from lightning_optim import InvalidOption, InvalidParamGroups
from lightning_optim._compat.shards import absent_processes
from tests.processes import run_fresh
from tests.sharded.cases import CASES, LOW_RANK, MATRICES, Stepped, fits, meshes

# Four processes take twice as long on two cores: make test-sharded.
PROCESSES = (2, 4) if os.environ.get("LIGHTNING_OPTIM_SHARDED_TESTS") else (2,)
# A basis is as exact as the gaps between singular values let it be.
BASES_APART, STATES_APART = 1e-3, 1e-5
_OVERSAMPLING = 8


@pytest.fixture(scope="module", params=PROCESSES, ids=lambda count: f"{count} processes")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All comparisons by name, of each process."""
    folder: Path = tmp_path_factory.mktemp("sharded")
    done = run_fresh("-m", "tests.sharded.worker", str(request.param), str(folder), ranks=request.param)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(request.param)]


def compared(ranks: list[dict[str, Any]], case: Stepped, mesh: str) -> list[dict[str, Any]]:
    if mesh not in meshes(len(ranks)) or not fits(case, mesh):
        pytest.skip(f"{case} is not spread as {mesh} over {len(ranks)} processes")
    return [rank[f"{case}, {mesh}"] for rank in ranks]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mesh", meshes(max(PROCESSES)))
def test_shards_equal_one_process(ranks: list[dict[str, Any]], case: Stepped, mesh: str) -> None:
    for rank in compared(ranks, case, mesh):
        assert rank["moved"] > 1e-4
        # Split along both dimensions, sums cross processes in rows, too.
        assert rank["apart"] <= (max(case.apart, 1e-6) if mesh == "grid" and case.name == "Scale" else case.apart)
        assert rank["states"] <= (BASES_APART if "rank" in case.options else STATES_APART)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_parameters_share_messages(ranks: list[dict[str, Any]], case: Stepped) -> None:
    for rank in compared(ranks, case, "rows"):
        assert len(rank["sent"]) == case.rounds


@pytest.mark.parametrize("case", [case for case in CASES if case.options.get("rank", 0) > 1], ids=str)
def test_low_rank_updates_send_little(ranks: list[dict[str, Any]], case: Stepped) -> None:
    width = LOW_RANK["rank"] + _OVERSAMPLING
    matrices = [(shape[0], torch.Size(shape[1:]).numel()) for shape in MATRICES]
    for rank in compared(ranks, case, "rows"):
        assert sum(size for _, size in rank["sent"]) <= sum(4 * (m + n) * width for m, n in matrices)


def test_a_part_of_what_fsdp2_and_tensor_parallelism_split_is_where_the_layout_says(
    ranks: list[dict[str, Any]],
) -> None:
    if len(ranks) < 4:
        pytest.skip("two dimensions of a mesh take four processes: make test-sharded")
    for rank in ranks:
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
        ("AdamMini", {}, (8, 8), 0, InvalidParamGroups, "looks at whole matrices"),
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
