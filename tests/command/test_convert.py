"""``lightning-optim convert``: what it prints is a file, and nothing is lost of what it read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lightning_optim import command

GIVEN = {
    "optim": "galore_adamw",
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "gradient_accumulation_steps": 4,
    "warmup_ratio": 0.1,
    "dataloader_num_workers": 4,
    "eval_on_start": True,
    "ddp_timeout": 1800,
    "model_name_or_path": "gpt2",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "args.json"
    path.write_text(json.dumps(GIVEN))
    return path


def test_text_is_a_file_and_names_everything(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["convert", str(file)]) == 0
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    assert (config["optim"], config["lr"], config["warmup_steps"]) == ("galore_adamw", 1e-3, 0.1)
    assert config["trainer"] == {"max_epochs": 3, "gradient_clip_val": 1.0, "accumulate_grad_batches": 4}
    # What is in the file stands in the YAML, in a comment, or in both.
    for name in GIVEN.keys() - {"optim", "learning_rate", "warmup_ratio"}:
        assert name in printed
    order = (
        "Written, with a difference",
        "Without an effect there",
        "Yours to write",
        "No counterpart",
        "Not arguments of",
    )
    assert sorted(order, key=printed.index) == list(order)
    assert max(map(len, printed.splitlines())) <= 100


def test_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["convert", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert yaml.safe_load(report["yaml"]) == report["config"]
    said = {name for remark in report["remarks"] for name in remark["values"]}
    assert {*report["written"], *said, *report["silent"]} == GIVEN.keys() | {"per_device_train_batch_size"}
    assert report["silent"] == ["ddp_timeout"]


def test_output(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "run.yaml"
    assert command.main(["convert", str(file), "--output", str(target)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"Wrote {target}\n\nWritten, with a difference\n")
    assert command.main(["convert", str(file)]) == 0
    assert target.read_text() == capsys.readouterr().out
    assert command.main(["convert", str(file), "--output", str(target)]) == 2
    assert "it exists; name another file" in capsys.readouterr().err
    assert command.main(["convert", str(file), "--output", str(tmp_path / "none" / "run.yaml")]) == 2
    assert f"there is no folder {tmp_path / 'none'}; make it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"optim": "sophia"}', "there is no optimizer 'sophia'"),
        ('{"learning_rate": -1}', "lr=-1"),
        ('{"lr_scheduler_type": "warmup_stable_decay"}', "needs 'num_decay_steps'"),
        ('{"width": 1}', "has no key of TrainingArguments"),
    ],
)
def test_mistakes_exit_with_2(file: Path, content: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(content)
    assert command.main(["convert", str(file)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert text in printed.err
