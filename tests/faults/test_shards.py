"""Distributed checkpoints: a killed process leaves the one before; what is not whole, or would run, is refused."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import UnreadableCheckpoint
from lightning_optim._compat.dcp import read_whole
from lightning_optim.command._entry import main
from lightning_optim.files import check_shards
from tests.faults.files import Runs, flipped, truncated
from tests.faults.shards_worker import NAMES
from tests.faults.test_writing import files_up_to
from tests.processes import run_fresh

#: What becomes of a whole folder, and what is said of it.
BROKEN = {
    "cut off": "its __0_0.distcp is truncated: [0-9,]+ bytes are needed, [0-9,]+ there",
    "flipped": "the bytes of '.*' have changed since they were written",
    "no meta": "it is not finished: its writing was interrupted",
    "empty meta": "meta.pt cannot be read: it is empty",
    "no metadata": "its .metadata is missing, truncated or damaged",
    "half metadata": "its .metadata is missing, truncated or damaged",
    "malicious metadata": "mkdir.*nothing was run",
    "malicious meta": "mkdir.*nothing was run",
    "malicious value": "mkdir.*nothing was run",
}


def break_it(kind: str, folder: Path, ran: Path) -> None:
    shards, meta, metadata = folder / "__0_0.distcp", folder / "meta.pt", folder / ".metadata"
    if kind == "cut off":
        truncated(shards, 0.9)
    elif kind == "flipped":
        flipped(shards, whole_weight(folder))
    elif kind == "no meta":
        meta.unlink()
    elif kind == "empty meta":
        meta.write_bytes(b"")
    elif kind == "no metadata":
        metadata.unlink()
    elif kind == "half metadata":
        truncated(metadata)
    elif kind == "malicious metadata":
        metadata.write_bytes(pickle.dumps(Runs(ran)))
    elif kind == "malicious meta":
        torch.save({"epoch": Runs(ran)}, meta)
    elif kind == "malicious value":
        # In the place of a value that is no tensor.
        at = pickle.loads(metadata.read_bytes())
        index, stored = next((i, s) for i, s in at.storage_data.items() if i.fqn.endswith("betas"))
        content = bytearray(shards.read_bytes())
        torch.save({"betas": Runs(ran)}, folder / "value")
        value = (folder / "value").read_bytes()
        (folder / "value").unlink()
        at.storage_data[index].offset, stored.length = len(content), len(value)
        shards.write_bytes(bytes(content) + value)
        metadata.write_bytes(pickle.dumps(at))


def whole_weight(folder: Path) -> bytes:
    """Bytes of a tensor, for looking them up."""
    weights = read_whole(folder)["state_dict"]
    return max(weights.values(), key=lambda weight: weight.numel()).numpy().tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders in which processes were killed while they wrote the second ``last.ckpt``; ``found.json`` of all."""
    folder = tmp_path_factory.mktemp("shards")
    for kind in NAMES:
        done = run_fresh("-m", "tests.faults.shards_worker", kind, str(folder), timeout=120)
        assert done.returncode == -signal.SIGXFSZ, done.stderr[-2000:]
    shutil.copytree(folder / "ours" / "last.ckpt", folder / "ours" / "replaced" / "gone.ckpt.replaced")
    for kind in BROKEN:
        shutil.copytree(folder / "ours" / "last.ckpt", folder / "ours" / kind)
        break_it(kind, folder / "ours" / kind, folder / "ran")
    done = run_fresh("-m", "tests.faults.shards_worker", "read", str(folder), timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def found(folder: Path) -> Any:
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("kind", NAMES)
def test_a_killed_process_leaves_the_checkpoint_before(folder: Path, kind: str, tmp_path: Path) -> None:
    assert {"last.ckpt", "last.ckpt.unfinished"} <= {path.name for path in (folder / kind).iterdir()}
    assert found(folder)[f"{kind}/last.ckpt"] == "read"
    unfinished = found(folder)[f"{kind}/last.ckpt.unfinished"]
    assert "last.ckpt.unfinished cannot be read: it is not finished: its writing was interrupted. Take" in unfinished
    assert main(["consolidate", str(folder / kind / "last.ckpt"), str(tmp_path / "whole.ckpt")]) == 0
    assert torch.load(tmp_path / "whole.ckpt", weights_only=True)["global_step"] == 1


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_not_whole_is_refused_by_name(
    folder: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = found(folder)[f"ours/{kind}"]
    assert said.startswith(f"UnreadableCheckpoint: {folder / 'ours' / kind}")
    assert re.search(BROKEN[kind], said), said
    assert main(["consolidate", str(folder / "ours" / kind), str(tmp_path / "whole.ckpt")]) == 2
    assert re.search(BROKEN[kind], capsys.readouterr().err)
    assert not (folder / "ran").exists()
    assert not any(tmp_path.iterdir())


def test_a_description_that_is_cut_off_anywhere_is_refused(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    shutil.copytree(folder / "ours" / "last.ckpt", made)
    metadata = (made / ".metadata").read_bytes()
    for length in range(0, len(metadata), 1 + len(metadata) // 200):
        (made / ".metadata").write_bytes(metadata[:length])
        with pytest.raises(UnreadableCheckpoint, match=r"its \.metadata is missing, truncated or damaged"):
            check_shards(made)


def test_between_two_renames_the_one_before_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = folder / "ours" / "replaced" / "gone.ckpt"
    assert main(["consolidate", str(gone), str(folder / "whole.ckpt")]) == 2
    assert f"the checkpoint before it is {gone}.replaced. Rename it to gone.ckpt" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with files_up_to(3000):
        assert main(["consolidate", str(folder / "ours" / "last.ckpt"), str(tmp_path / "whole.ckpt")]) == 2
    assert "whole.ckpt: File too large; nothing is left there that was not before. Make room" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
