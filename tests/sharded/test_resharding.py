"""Checkpoints of sharded parameters move between numbers of processes, and to and from one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lightning_optim import InvalidOption
from lightning_optim._compat.shards import absent_processes
from lightning_optim.command._entry import main
from lightning_optim.optimizers import Muon
from tests.cases import CASES
from tests.processes import EVERY, run_fresh
from tests.sharded.devices_worker import MOVED, OnOneDevice, fit, made

#: What torch, optimi and we keep in different ways; the rest, and four processes, take minutes: make test-sharded.
NAMES = [case.name for case in CASES if case.row.sharded] if EVERY else ["adamw_torch", "galore_adafactor", "muon"]
SIZES = (1, 2, 4) if EVERY else (1, 2)
PAIRS = [(one, other) for one in SIZES for other in SIZES if EVERY or one != other]
#: The last two are those of one process without shards: it wrote the checkpoint, or reads it.
FORMS = ("shards", "whole", "plain", "whole to plain")
ASKED = [
    (form, one, other)
    for one, other in PAIRS
    for form in FORMS
    if (form != "plain" or one == 1) and (form != "whole to plain" or other == 1)
]
Found = dict[str, Any]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Found]]:
    """What each process found that read the checkpoints of all numbers of processes."""
    folder = tmp_path_factory.mktemp("resharding")
    for size in SIZES:
        (folder / str(size)).mkdir()
        _run(folder, size)
    for size in SIZES:
        _run(folder, size, *(str(one) for one, other in PAIRS if other == size))
    return {
        size: [torch.load(folder / f"{size}-rank{rank}.pt", weights_only=True) for rank in range(size)]
        for size in SIZES
    }


def _run(folder: Path, size: int, *reads: str) -> None:
    words = ("tests.sharded.reshard_worker", str(size), str(folder), ",".join(NAMES), *reads)
    done = run_fresh("-m", *words, ranks=size, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("form", "one", "other"), ASKED)
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_moves_between_numbers_of_processes(
    moved: dict[int, list[Found]], name: str, form: str, one: int, other: int
) -> None:
    for rank in moved[other]:
        found = rank[f"{name}, {form}, {one}"]
        assert found["read"] == {}
        if one == other:
            assert found["went on"] == {}
        assert all(difference < 1e-5 for difference in found["went on"].values())


@pytest.fixture(scope="module")
def between_devices(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Found], list[Found]]:
    """Where checkpoints are; how one device ended; how each of two processes went on from there."""
    folder = tmp_path_factory.mktemp("devices")
    one = {first: fit(made(OnOneDevice, first), 4, None, folder / f"{first}.ckpt").ended for first, *_ in MOVED}
    done = run_fresh("-m", "tests.sharded.devices_worker", str(folder), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, one, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("first", [first for first, *_ in MOVED])
def test_a_checkpoint_of_one_device_goes_on_in_shards(
    between_devices: tuple[Path, dict[str, Found], list[Found]], first: str
) -> None:
    _, one, ranks = between_devices
    for rank in ranks:
        assert equal(rank[first]["begun"], one[first])
        assert not equal(rank[first]["ended"], one[first])


@pytest.mark.parametrize(("first", "third"), [(first, third) for first, _, third in MOVED])
def test_a_distributed_checkpoint_goes_on_on_one_device(
    between_devices: tuple[Path, dict[str, Found], list[Found]], tmp_path: Path, first: str, third: str
) -> None:
    folder, _, ranks = between_devices
    file = tmp_path / "one.ckpt"
    assert main(["consolidate", str(folder / f"{first}, shards"), str(file)]) == 0
    noted = fit(made(OnOneDevice, third), 8, file, tmp_path / "after.ckpt")
    assert equal(noted.begun, ranks[0][first]["ended"])
    loaded = OnOneDevice.load_from_checkpoint(file, weights_only=True).state_dict()
    assert all(torch.equal(weight, ranks[0][first]["ended"][f"{name} "]) for name, weight in loaded.items())


def test_old_entries_of_a_whole_state_are_spread() -> None:
    alone = nn.Parameter(torch.randn(8, 6))
    writer = Muon([alone], lr=0.1)
    alone.grad = torch.randn(8, 6)
    writer.step()
    state = writer.state_dict()
    # Earlier versions and torch count in tensors; lists are kept as they are.
    state["state"][0].update(step=torch.tensor(1.0), found=[True, False])
    with absent_processes(2) as mesh:
        shard = DTensor.from_local(torch.zeros(4, 6), mesh["data_parallel"], [Shard(0)], run_check=False)
        parameter = nn.Parameter(shard)
        reader = Muon([parameter], lr=0.1)
        reader.load_state_dict(state)
        loaded = reader.state[parameter]
        assert (loaded["step"], loaded["found"]) == (1, [True, False])
        momentum = loaded["momentum_buffer"]
        assert isinstance(momentum, DTensor)
        assert momentum.shape == (8, 6)
        assert torch.equal(momentum.to_local(), writer.state[alone]["momentum_buffer"][:4])
        state["state"][0]["momentum_buffer"] = torch.zeros(9, 6)
        with pytest.raises(
            InvalidOption, match=r"'momentum_buffer' of shape \(9, 6\) for a parameter of shape \(8, 6\)"
        ):
            reader.load_state_dict(state)


def test_what_is_no_distributed_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["consolidate", str(tmp_path), str(tmp_path / "one.ckpt")]) == 2
    assert "is no distributed checkpoint: there is no meta.pt in it" in capsys.readouterr().err
