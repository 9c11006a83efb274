"""What cannot be written whole is not written, what was there stays, and the error says which file and what to do."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_optim.bench._records import Records
from lightning_optim.command._entry import main
from lightning_optim.errors import InvalidOption
from lightning_optim.files import written_whole
from tests.models import ForeignTokens, LitTokens, loader, trainer

BEFORE = b"weeks of training"


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Has the kernel refuse to write more into one file, as on a full disk."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Saves(Callback):
    """Saves as ``ModelCheckpoint`` does while a fit runs."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.save_checkpoint(self.file)


def save(run: Any, file: Path, module: Any = None) -> None:
    run.callbacks.append(Saves(file))
    run.fit(module or LitTokens(8), loader(1))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    file.write_bytes(BEFORE)
    with (
        files_up_to(4000),
        pytest.raises(OSError, match=rf"cannot write {file}: File too large; nothing is left .* Make room") as caught,
    ):
        save(trainer(max_steps=1), file)
    assert caught.value.errno == errno.EFBIG
    assert file.read_bytes() == BEFORE
    assert names(tmp_path) == ["last.ckpt"]


def test_a_device_without_room() -> None:
    """/dev/full says what a full disk says; a device is written, not replaced."""
    with pytest.raises(OSError, match=r"cannot write /dev/full: No space left on device; .* Make room"):
        save(trainer(max_steps=1), Path("/dev/full"))
    assert not Path("/dev/full").is_file()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, a folder in which not even root may write")
def test_a_folder_that_nothing_can_be_written_to(tmp_path: Path) -> None:
    # Root may write to every folder but those of the kernel.
    with pytest.raises(OSError, match=r"cannot write /proc/last\.ckpt: "):
        save(trainer(max_steps=1), Path("/proc/last.ckpt"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*last\.ckpt: "):
        save(trainer(max_steps=1), tmp_path / "file" / "last.ckpt")
    assert names(tmp_path) == ["file"]


def test_links_and_permissions(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").write_bytes(BEFORE)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    with written_whole(tmp_path / "link") as beside:
        beside.write_text("new")
        assert (tmp_path / "disk" / "real").read_bytes() == BEFORE
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "real").read_text() == "new"
    assert names(tmp_path) == ["disk", "link"]
    with pytest.raises(FileExistsError), written_whole(tmp_path / "link", new=True):
        pass
    with pytest.raises(FileExistsError):
        _late(tmp_path / "late")
    assert (tmp_path / "late").read_bytes() == BEFORE
    assert names(tmp_path) == ["disk", "late", "link"]
    with pytest.raises(KeyboardInterrupt):
        _interrupted(tmp_path / "late")
    assert (tmp_path / "late").read_bytes() == BEFORE
    assert names(tmp_path) == ["disk", "late", "link"]


def _late(path: Path) -> None:
    with written_whole(path, new=True) as beside:
        beside.touch()
        # Somebody else was faster.
        path.write_bytes(BEFORE)


def _interrupted(path: Path) -> None:
    with written_whole(path) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt


@pytest.fixture
def hugging_face(tmp_path: Path) -> str:
    (tmp_path / "hf.yaml").write_text("learning_rate: 1e-4\n")
    return str(tmp_path / "hf.yaml")


def test_commands_leave_nothing_half_written(
    hugging_face: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(tmp_path)
    (tmp_path / "kept.svg").write_bytes(BEFORE)
    memory = ["memory", "--llama", "60m", "--optim", "sgd", "--picture"]
    for words, output in (
        (["convert", hugging_face, "--output"], tmp_path / "run.yaml"),
        (memory, tmp_path / "kept.svg"),
    ):
        for limit, where in ((100, output), (None, Path("/dev/full"))):
            with files_up_to(limit) if limit else nullcontext():
                status = main([*words, str(where)])
            captured = capsys.readouterr()
            assert status == 2
            assert f"error: cannot write {where}: " in captured.err
            if where != Path("/dev/full") or words[0] != "convert":
                assert "Make room" in captured.err
    assert (tmp_path / "kept.svg").read_bytes() == BEFORE
    assert names(tmp_path) == sorted([*before, "kept.svg"])


def test_measurements_survive_a_full_disk(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    records = Records(file, {"steps": 3})
    records.append({"kind": "trial", "loss": 1.0})
    before = file.read_bytes()
    with (
        files_up_to(len(before) + 10),
        pytest.raises(InvalidOption, match=f"cannot write {file}: .*Make room"),
    ):
        records.append({"kind": "trial", "loss": 2.0})
    assert file.read_bytes() == before
    # Cut off in the middle of a line, by a crash.
    file.write_bytes(before + b'{"kind": "tri')
    again = Records(file, {"steps": 3})
    assert again.find(kind="trial") == {"kind": "trial", "loss": 1.0}
    again.append({"kind": "trial", "loss": 2.0})
    assert [json.loads(line) for line in file.read_bytes().splitlines()][-1] == {"kind": "trial", "loss": 2.0}


@pytest.mark.parametrize("content", [b"Dear all", b"[1]\n[2]", b"\x89PNG\r\n\x1a\n\0\0", b'{"format": 1}\n'])
def test_a_file_of_somebody_else_is_left_alone(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    file.write_bytes(content)
    with pytest.raises(InvalidOption, match="take another --output"):
        Records(file, {"steps": 3})
    assert file.read_bytes() == content


def test_a_killed_process_leaves_the_file_before(tmp_path: Path) -> None:
    """The signal of a file that gets too large ends the process within a write; a part of the new file is there."""
    file = tmp_path / "last.ckpt"
    file.write_bytes(BEFORE)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with files_up_to(4000), written_whole(file) as beside, beside.open("wb") as out:
            out.write(bytes(3000))
            out.flush()
            out.write(bytes(3000))
            out.flush()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ
    assert file.read_bytes() == BEFORE
    assert (tmp_path / "last.ckpt.unfinished").stat().st_size == 4000
    # What is left is taken away by the next one.
    with written_whole(file) as beside:
        torch.save({"state_dict": {}}, beside)
    assert names(tmp_path) == ["last.ckpt"]
    shutil.rmtree(tmp_path)


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or os.stat("/dev/shm").st_dev == os.stat(tempfile.gettempdir()).st_dev,
    reason="needs a second disk",
)
@pytest.mark.parametrize("module", [LitTokens, ForeignTokens])
def test_a_copy_from_the_disk_of_temporary_files_is_cut_off(module: type[Any], tmp_path: Path) -> None:
    """As docs/checkpoints.md says, Lightning alone loses the file before; with this package it stays."""
    file = tmp_path / "last.ckpt"
    file.write_bytes(BEFORE)
    model, run = module(8), trainer(max_steps=1)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        child = os.fork()
        if not child:
            tempfile.tempdir = other
            sys.setprofile(_dies_in_a_copy)
            save(run, file, model)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert file.read_bytes() == (BEFORE if module is LitTokens else b"")


def _dies_in_a_copy(frame: Any, event: str, argument: Any) -> None:
    if event == "c_call" and argument.__name__ in ("sendfile", "copy_file_range"):
        os.kill(os.getpid(), signal.SIGKILL)
