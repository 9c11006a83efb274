"""What is no checkpoint, or no longer one, is refused by name, with what to do; nothing that it holds is run."""

from __future__ import annotations

import re
import shutil
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import OptimCallback, OptimCLI, UnreadableCheckpoint
from lightning_optim.command._entry import main
from lightning_optim.files import check_file
from tests.faults.files import FOREIGN, Runs, flipped
from tests.models import ForeignTokens, LitTokens, loader, trainer

WIDTH = 8


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("saved") / "good.ckpt"
    run = trainer(max_steps=2)
    run.fit(LitTokens(WIDTH, lr=1e-2), loader(2))
    run.save_checkpoint(file)
    return file


@pytest.fixture
def file(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(saved, tmp_path / "step=2.ckpt"))


def fit(file: Path, **flags: Any) -> LitTokens:
    model = LitTokens(WIDTH, lr=1e-2)
    trainer(max_steps=4).fit(model, loader(2), ckpt_path=file, **flags)
    return model


def refused(file: Path, match: str, read: Any) -> UnreadableCheckpoint:
    with pytest.raises(UnreadableCheckpoint, match=match) as caught:
        read(file)
    assert str(caught.value).startswith(f"{file} cannot be read: ")
    assert not file.with_suffix(".ran").exists()
    return caught.value


@pytest.mark.parametrize("kind", FOREIGN)
def test_it_is_refused_by_name(file: Path, kind: str) -> None:
    make, match = FOREIGN[kind]
    make(file)
    error = refused(file, match, fit)
    # What a user sees last is ours, and says what to do.
    assert re.search(r"Take another checkpoint|weights_only=False|load_state_dict|migrate", str(error))
    assert "UnreadableCheckpoint" in traceback.format_exception(error)[-1]
    if "Trainer" not in match and "alone" not in match:
        refused(file, match, LitTokens.load_from_checkpoint)


def test_optim_callback_and_the_other_runs_refuse_it_too(file: Path) -> None:
    FOREIGN["truncated"][0](file)
    run = trainer(max_steps=4, callbacks=[OptimCallback("adamw_torch")])
    refused(file, "truncated", lambda path: run.fit(ForeignTokens(WIDTH), loader(2), ckpt_path=path))
    for method in (run.validate, run.test, run.predict):
        refused(file, "truncated", lambda path, method=method: method(LitTokens(WIDTH), loader(1), ckpt_path=path))


def test_a_flipped_bit_is_found(file: Path) -> None:
    weight = torch.load(file, weights_only=True)["state_dict"]["model.linear.weight"]
    flipped(file, weight.numpy().tobytes())
    # Torch itself takes it.
    assert not torch.equal(torch.load(file, weights_only=True)["state_dict"]["model.linear.weight"], weight)
    for read in (fit, LitTokens.load_from_checkpoint):
        refused(file, "its bytes have changed since it was written: the checksum of '.*/data/[0-9]+' is wrong", read)


def test_a_flipped_bit_anywhere_is_found_or_harmless(file: Path) -> None:
    content, good = file.read_bytes(), torch.load(file, weights_only=True)["state_dict"]
    generator = torch.Generator().manual_seed(0)
    found = 0
    for place in torch.randint(len(content), (60,), generator=generator).tolist():
        file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            check_file(file)
        except UnreadableCheckpoint:
            found += 1
            continue
        # Between the records, or where torch looks itself.
        try:
            read = torch.load(file, weights_only=True)["state_dict"]
        except RuntimeError:
            refused(file, "damaged", fit)
            continue
        assert all(torch.equal(read[name], good[name]) for name in good)
    assert found > 30


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state_dict": torch.ones(9)}, tmp_path / "without.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    check_file(tmp_path / "without.ckpt")


def test_the_command_line_refuses_it_too(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FOREIGN["truncated"][0](file)
    monkeypatch.setattr("sys.argv", ["train.py", "fit", "--optim", "sgd", "--ckpt_path", str(file)])
    with pytest.raises(SystemExit):
        OptimCLI(ForeignTokens, seed_everything_default=False)
    assert f"{file} cannot be read: it is truncated" in " ".join(capsys.readouterr().err.split())


def test_a_folder_is_refused(tmp_path: Path) -> None:
    for name, held, text in (
        ("shards", ["meta.pt", ".metadata", "__0_0.distcp"], "lightning-optim consolidate .*shards FILE"),
        ("half", ["__0_0.distcp"], "it is not finished: its writing was interrupted"),
        ("last.ckpt.unfinished", [".metadata", "meta.pt"], "it is not finished"),
        ("letters", ["letter.txt"], "it is a folder, and no checkpoint"),
    ):
        (tmp_path / name).mkdir()
        for inside in held:
            (tmp_path / name / inside).touch()
        for read in (fit, LitTokens.load_from_checkpoint):
            refused(tmp_path / name, text, read)


def test_what_lightning_alone_does(file: Path) -> None:
    """As docs/checkpoints.md says: truncated, torch does not name the file; changed, it trains on."""
    FOREIGN["truncated"][0](file)
    with pytest.raises((OSError, RuntimeError)) as caught:
        trainer(max_steps=4).fit(ForeignTokens(WIDTH), loader(2), ckpt_path=file)
    assert file.name not in str(caught.value)
    torch.save({"state_dict": Runs(file.with_suffix(".ran"))}, file)
    with pytest.raises(Exception, match="mkdir"):
        trainer(max_steps=4).fit(ForeignTokens(WIDTH), loader(2), ckpt_path=file)
    assert not file.with_suffix(".ran").exists()


def test_who_asks_for_code_gets_it(file: Path) -> None:
    """``weights_only=False`` is the user's word."""
    held = torch.load(file, weights_only=True)
    held["ran"] = Runs(file.with_suffix(".ran"))
    torch.save(held, file)
    refused(file, "mkdir.*weights_only=False", fit)
    fit(file, weights_only=False)
    assert file.with_suffix(".ran").exists()


CONFIGS = {
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "zeros": bytes(10),
    "too deep": b"[" * 20_000,
    "code": b"!!python/object/apply:os.mkdir [ran]",
    "no mapping": b"- 1",
}


@pytest.mark.parametrize("command", ["memory", "info", "recommend", "bench", "convert"])
@pytest.mark.parametrize("kind", [*CONFIGS, "a folder", "nothing"])
def test_commands_refuse_files_of_something_else(
    kind: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yaml"
    if kind == "a folder":
        file.mkdir()
    elif kind in CONFIGS:
        file.write_bytes(CONFIGS[kind])
    flags = ["--steps", "2", "--no-picture"] if command == "bench" else []
    assert main([command, *([] if command == "convert" else ["--config"]), str(file), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lightning-optim {command}: error: ")
    assert str(file) in error
    assert [path.name for path in tmp_path.iterdir()] == (["run.yaml"] if kind != "nothing" else [])
