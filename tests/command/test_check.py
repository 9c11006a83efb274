"""``lightning-optim check``: names, wildcards and paths; the table, JSON and the exit status."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning_optim.command import main
from lightning_optim.testing import PROMISES

MOMENTUM, CLOSURE = "tests.testing.faulty.Momentum", "tests.testing.faulty.KeepsTheLoss"


def run(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0) -> str:
    assert main(["check", *argv]) == status
    captured = capsys.readouterr()
    return captured.err if status == 2 else captured.out


def test_one_promise_a_column_and_what_broke_below(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "schedule_free_sgd", CLOSURE, status=1)
    assert [line for line in text.splitlines() if len(line) > 100] == []
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[:3]}
    assert rows["optimizer"] == [str(number) for number in range(1, len(PROMISES) + 1)]
    signs = dict(zip(PROMISES, rows[CLOSURE], strict=True))
    assert {name: sign for name, sign in signs.items() if sign != "+"} == {"state_bytes": ".", "closure": "X"}
    assert dict(zip(PROMISES, rows["schedule_free_sgd"], strict=True))["schedule"] == "r"
    assert all(f"{number} {name}" in text for number, name in enumerate(PROMISES, start=1))
    flat = " ".join(text.split())
    assert f"Broken - {CLOSURE}, closure: expected the closure's loss from step(closure); it returned None" in flat
    assert "Refused - schedule_free_sgd, schedule: lr_scheduler='linear' together with" in flat
    assert "1 of 2 break no promise." in flat


def test_json_and_wildcards_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    report: dict[str, Any] = json.loads(run(capsys, "sg*,lr=0.1,momentum=0.9", "adamw_apex*", "--json"))
    assert report["ok"]
    assert list(report["promises"]) == list(PROMISES)
    (row,) = report["optimizers"]
    assert row["optimizer"] == "sgd,lr=0.1,momentum=0.9"
    assert {name: result["status"] for name, result in row["results"].items()} == dict.fromkeys(PROMISES, "kept")
    # Only matched, not named: no failure.
    assert list(report["left_out"]) == ["adamw_apex_fused"]


def test_what_is_named_and_cannot_be_tried_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "adamw_apex_fused", f"{MOMENTUM},momentum=3", status=1)
    assert "Not tried" in text
    assert "adamw_apex_fused: the package 'apex' is not installed" in text
    assert "'tests.testing.faulty.Momentum' has no option" in text
    assert "0 of 0 break no promise." in text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adamw_trch", "there is no optimizer 'adamw_trch'"),
        ("shampoo*", "no identifier matches 'shampoo*'"),
        ("tests.testing.faulty.Absent", "cannot be imported"),
    ],
)
def test_names_of_nothing_are_a_usage_error(capsys: pytest.CaptureFixture[str], name: str, said: str) -> None:
    assert said in run(capsys, "sgd", name, status=2)
