"""Distributed checkpoints, read without running what they hold."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tests.compat.contract import relied_on

NEEDED_BY = "lightning-optim consolidate, and resuming from a distributed checkpoint,"
SAVED: dict[str, Any] = {
    "state_dict": {"w": torch.arange(12.0).reshape(3, 4), "half": torch.ones(3, dtype=torch.bfloat16)},
    "optimizer_0": {
        "state": {"w": {"step": torch.tensor(1.0), "kept": [True, None]}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["w"]}],
    },
}


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_what_was_saved_is_listed_and_read(tmp_path: Path) -> None:
    dcp.save(SAVED, checkpoint_id=tmp_path / "folder")
    with relied_on("dcp.entries", NEEDED_BY) as entries, relied_on("dcp.read_whole", NEEDED_BY) as read_whole:
        found = {entry.name: entry for entry in entries(tmp_path / "folder")}
        assert found["state_dict.w"].is_tensor
        assert not found["optimizer_0.param_groups.0.betas"].is_tensor
        assert not any(entry.transformed for entry in found.values())
        sizes = {file.name: file.stat().st_size for file in (tmp_path / "folder").glob("*.distcp")}
        assert {entry.file for entry in found.values()} == set(sizes)
        assert max(entry.end for entry in found.values()) == sum(sizes.values())
        read = read_whole(tmp_path / "folder")
        assert torch.equal(read["state_dict"]["w"], SAVED["state_dict"]["w"])
        assert read["optimizer_0"]["param_groups"] == SAVED["optimizer_0"]["param_groups"]
        assert read["optimizer_0"]["state"]["w"]["kept"] == [True, None]


@pytest.mark.usefixtures("alone")
def test_nothing_is_run(tmp_path: Path) -> None:
    with relied_on("dcp.entries", NEEDED_BY) as entries, relied_on("dcp.read_whole", NEEDED_BY) as read_whole:
        dcp.save({"value": Runs(tmp_path / "ran")}, checkpoint_id=tmp_path / "value")
        # Torch's own error, which is no Exception.
        with pytest.raises(BaseException, match="mkdir"):
            read_whole(tmp_path / "value")
        folder = tmp_path / "metadata"
        folder.mkdir()
        (folder / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
        with pytest.raises(pickle.UnpicklingError, match="mkdir was not expected"):
            entries(folder)
        # Torch 2.9 does not say why it could not read the description.
        with pytest.raises(BaseException, match=r"mkdir was not expected|metadata is not None"):
            read_whole(folder)
        assert not (tmp_path / "ran").exists()
        # What it is kept from.
        with suppress(AttributeError):
            dcp.FileSystemReader(folder).read_metadata()
        assert (tmp_path / "ran").exists()
