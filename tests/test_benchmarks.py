"""The benchmarks run; their times mean something only on a quiet machine and are not looked at here."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import command
from tests.processes import run_fresh

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: str) -> str:
    """Returns what a benchmark prints."""
    done = run_fresh(str(BENCHMARKS / script), *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_imports_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = runpy.run_path(str(BENCHMARKS / "optimizers.py"))
    seconds = script["measure_imports"]("json", {"fractions"}, 2)
    assert {name: len(times) for name, times in seconds.items()} == {"json": 2, "fractions": 2}
    assert all(time > 0 for times in seconds.values() for time in times)


def test_layerwise_benchmark_runs() -> None:
    printed = run("layerwise.py", "--quick")
    for part in ("layerwise default foreach", "per parameter in hooks", "live gradients are within", "torch 2."):
        assert part in printed


def test_families_benchmark_runs_and_compares(tmp_path: Path) -> None:
    printed = run("families.py", "--quick", "sgd", "--output", str(tmp_path))
    written = json.loads((tmp_path / "families.json").read_text())
    for one in written["records"]:
        assert one["milliseconds"] > 0
        assert 0 < one["ratio"]["low"] <= one["ratio"]["median"] <= one["ratio"]["high"]
        assert re.search(rf"^{re.escape(one['variant'])} .*{one['ratio']['median']:.2f} \(", printed, re.MULTILINE) or (
            one["variant"] == "plain"
        )
    assert {one["model"] for one in written["records"]} == {"deep and narrow", "gpt"}
    assert {"layerwise", "bucket_mb=0", "clipped by value"} <= {one["variant"] for one in written["records"]}


def test_what_moved_between_two_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    ratios = runpy.run_path(str(BENCHMARKS / "ratios.py"))
    # 95% of the medians of ten values lie between the second and the ninth: 1 - 2 * 11 / 1024.
    spread = ratios["Ratio"].of([float(number) for number in range(1, 11)], [1.0] * 10)
    assert (spread.low, spread.median, spread.high) == (2.0, 5.5, 9.0)
    few = ratios["Ratio"].of([1.0, 3.0], [1.0, 1.0])
    assert (few.low, few.high) == (1.0, 3.0)

    def run_of(device: str, **medians: float) -> dict[str, Any]:
        keys = {"model": "gpt", "optimizer": "sgd", "against": "plain"}
        kept = [
            {**keys, "variant": name, "ratio": {"median": value, "low": value - 0.05, "high": value + 0.05}}
            for name, value in medians.items()
        ]
        return {"machine": {"device": device}, "records": kept}

    before = run_of("one", slower=1.0, faster=1.0, same=1.0, gone=1.0)
    told = list(ratios["moved"](before, run_of("one", slower=1.11, faster=0.89, same=1.09, new=2.0)))
    assert told == [
        "2 of 3 ratios moved beyond their intervals",
        "slower  gpt / sgd / slower / plain: 1.00 (0.95 - 1.05) is now 1.11 (1.06 - 1.16)",
        "faster  gpt / sgd / faster / plain: 1.00 (0.95 - 1.05) is now 0.89 (0.84 - 0.94)",
    ]
    assert "another machine: one" in next(ratios["moved"](before, run_of("two")))


def test_monitor_benchmark_runs() -> None:
    printed = run("monitor.py", "--quick")
    rows = re.findall(r"^(?:deep and narrow|gpt) .* (\d+\.\d+) +(\d\.\d+) \(", printed, re.MULTILINE)
    assert len(rows) == 12
    assert all(float(milliseconds) > 0 and float(ratio) > 0 for milliseconds, ratio in rows)


def test_sharded_benchmark_counts_what_is_sent(tmp_path: Path) -> None:
    printed = run("sharded.py", "--quick", "scale", "adafactor", "galore_adamw", "muon", "--output", str(tmp_path))
    written = json.loads((tmp_path / "sharded.json").read_text())
    found = {(one["variant"], one["optimizer"]): one for one in written["records"]}
    assert {strategy for strategy, _ in found} == {"fsdp2", "layerwise_fsdp2"}
    # A block of width 64: attention's matrices as two, and two of the feed-forward part; then the embedding.
    matrices, embedding = ((192, 64), (64, 64), (256, 64), (64, 256)), (256, 64)
    norms = 4 * 64 + 2 * 64
    parameters = 4 * (sum(m * n for m, n in (*matrices, embedding)) + norms + 192 + 64 + 256 + 64)
    columns = 4 * sum(n for _, n in (*matrices, embedding))
    for (_, optimizer), one in found.items():
        sent, messages = one["bytes"], one["messages"]
        # Half of all gradients is reduced elsewhere.
        assert abs(sent["reduced"] / (parameters / 2) - 1) < 0.01
        # For forward and, but for the rest of the model, for backward again.
        assert sent["reduced"] < sent["gathered"] < parameters
        assert sent["other"] < 1024
        expected = {
            "adamw_torch": 0,
            # The outputs are rows, which no process splits.
            "scale": 0,
            # Means of columns, and per tensor their mean and a root mean square.
            "adafactor": columns + 2 * 4 * 5 + 4 * 10,
            # Half of half of every matrix comes, and as much of the results goes.
            "muon": sum(m * n for m, n in matrices) * 4 // 2,
        }
        if optimizer in expected:
            assert sent["optimizer"] == expected[optimizer], optimizer
            assert one["first_bytes"] == expected[optimizer], optimizer
        assert (messages == 0) == (sent["optimizer"] == 0)
        assert 0 < one["ratio"]["low"] <= one["ratio"]["median"] <= one["ratio"]["high"]
        assert re.search(rf"^{optimizer} .* {one['ratio']['median']:.2f} \(", printed, re.MULTILINE)
    galore = found["fsdp2", "galore_adamw"]
    assert galore["first_bytes"] > 5 * galore["bytes"]["optimizer"] > 0


def test_dealt_matrices_have_the_same_bits(tmp_path: Path) -> None:
    printed = run("dealt.py", "--quick", "--output", str(tmp_path))
    for one in json.loads((tmp_path / "dealt.json").read_text())["records"]:
        assert one["ratio"]["median"] > 0
        assert f"{one['saved_operations'] / one['sent_bytes']:.0f}\n" in printed
        # Of matrices with 12 w^2 elements each process makes at most what is two thirds of all, and sends it.
        assert 12 * one["width"] ** 2 * 2 <= one["sent_bytes"] <= 12 * one["width"] ** 2 * 3


def test_a_stack_of_aligned_matrices_changes_no_bits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(BENCHMARKS / "muon.py"))
    for shape, dtype in (((16, 16), torch.float32), ((16, 48), torch.bfloat16), ((24, 16), torch.float64)):
        assert script["is_aligned"](shape, dtype)
        assert not script["depends_on_the_stack"](shape, dtype)
    for small in ("STACKED", "STEPPED"):
        monkeypatch.setitem(script["main"].__globals__, small, ((8, 8), (16, 16)))
    script["time_stacks"]()
    script["time_steps"]()
    ratios = re.findall(r"^\| \d+x\d+.* \| (\d+(?:\.\d)?) \|$", capsys.readouterr().out, re.MULTILINE)
    assert len(ratios) == 4
    assert all(float(ratio) > 0 for ratio in ratios)


def test_optimizers_benchmark_runs(tmp_path: Path) -> None:
    size = ("--side", "64", "--count", "4", "--fast", "--threads", "1", "--output", str(tmp_path))
    printed = run("optimizers.py", *size, "--convergence", "--steps", "2", "--seeds", "1", "--no-imports")
    kept = json.loads((tmp_path / "optimizers.json").read_text(encoding="utf-8"))
    shown = BENCHMARKS.parent / "docs" / "bench" / "optimizers.json"
    assert kept.keys() == json.loads(shown.read_text(encoding="utf-8")).keys()
    assert f" {kept['large']['ratios']['GaLoreAdamW']['adamw'][1]:.2f} " in printed
    assert "1 thread(s) on" in printed
    assert "torch 2." in printed

    # What does not depend on the machine: bytes of state per element, of AdamW's moments in full and of ours.
    states = printed.split("State:")[1].split("Projection")[0]
    for name, expected in (
        ("AnyPrecisionAdamW", 8.0),
        ("GrokAdamW", 12.0),
        ("GaLoreAdamW", 3 * 16 / 64 * 4),
        ("LOMO", 0.0),
        ("AdaLomo", 2 / 64 * 4),
    ):
        assert float(re.findall(rf"^{name} +(\S+)", states, re.MULTILINE)[0]) == expected

    # Every optimizer was stepped, in both tables, and none in no time.
    small, large = printed.split("Step:")[1:]
    for table in (small, large.split("Projection")[0]):
        rows = re.findall(r"^(\w+)(?: \*)? +(\d+\.\d+) +(\d+\.\d+) ", table, re.MULTILINE)
        assert {name for name, *_ in rows} >= {
            "GaLoreAdamW",
            "ApolloAdamW",
            "Adafactor",
            "GrokAdamW",
            "LOMO",
            "AdaLomo",
        }
        assert all(float(milliseconds) > 0 and float(ratio) > 0 for _, milliseconds, ratio in rows)

    assert [float(energy) > 99 for energy in re.findall(r"(\S+)% of the energy", printed)] == [True, True]
    (losses,) = re.findall(r"^0 +(\S+) +(\S+) +(\S+)", printed, re.MULTILINE)
    assert abs(float(losses[2]) - float(losses[1]) / float(losses[0])) < 2e-4
    verdicts = re.findall(r"^(PASS|MISSED|SKIPPED) +\S", printed.split("Targets:")[1], re.MULTILINE)
    assert len(verdicts) == 7
    assert not re.findall(r"\bnan\b|\binf\b", printed)


def test_states_beside_the_papers_are_those_of_the_file() -> None:
    script = runpy.run_path(str(BENCHMARKS / "memory_papers.py"))
    kept = json.loads((BENCHMARKS.parent / "docs" / "bench" / "memory_papers.json").read_text(encoding="utf-8"))
    figure = script["GALORE"][0]
    found = [script["state"](figure.shape, figure.optim, args) for args in figure.requests]
    assert kept["galore"][0]["bytes"][:2] == found
    assert kept["galore"][0]["paper"] == figure.paper


def test_tables_of_memory_hold_what_the_command_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "memory.json"
    monkeypatch.setattr(
        sys,
        "argv",
        ["memory_tables.py", "--sizes", "60m", "--identifiers", "adamw_8bit", "lomo", "--output", str(path)],
    )
    runpy.run_path(str(BENCHMARKS / "memory_tables.py"))["main"]()
    records = json.loads(path.read_text(encoding="utf-8"))["records"]
    assert [one["asked"] for one in records if "peak" in one] == [
        *("adamw_8bit", "adamw_8bit_layerwise", "lomo"),
        *("adamw_8bit", "adamw_8bit_layerwise", "lomo", "lomo"),
    ]
    assert [one["asked"] for one in records if "refused" in one] == ["adamw_8bit", "adamw_8bit_layerwise"]
    assert all("kernels take whole tensors" in one["refused"] for one in records if "refused" in one)
    for one in (records[0], records[-1]):
        capsys.readouterr()
        assert command.main([*one["command"].split()[1:], "--optim", one["asked"], "--json"]) == 0
        (estimate,) = json.loads(capsys.readouterr().out)["estimates"]
        assert {name: estimate[name] for name in ("state", "gradients", "peak")} == {
            name: one[name] for name in ("state", "gradients", "peak")
        }


def test_what_the_picture_of_the_demo_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = runpy.run_path(str(BENCHMARKS / "demo_picture.py"))
    few = {"adamw_torch": ({}, (2e-3, 4e-3)), "adamw_torch_layerwise": ({}, "adamw_torch")}
    monkeypatch.setitem(script["main"].__globals__, "OPTIMIZERS", few)
    path = tmp_path / "demo.json"
    monkeypatch.setattr(sys, "argv", ["demo_picture.py", "--steps", "3", "--width", "32", "--output", str(path)])
    script["main"]()
    plain, layerwise = json.loads(path.read_text(encoding="utf-8"))["records"]
    assert plain["lr"] == float(min(plain["tried"], key=plain["tried"].get))
    assert layerwise["losses_of"] == "adamw_torch"
    assert layerwise["train_losses"] == plain["train_losses"]
    assert len(plain["train_losses"]) == 3
    assert layerwise["gradient_bytes"] < plain["gradient_bytes"]
    assert plain["gradient_bytes"] == pytest.approx(plain["state_bytes"] / 2, rel=1e-2)


def test_steps_of_muon_and_adamw_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = runpy.run_path(str(BENCHMARKS / "muon_steps.py"))
    for name, small in {"RATES": dict.fromkeys(("adamw_torch", "muon"), (1e-3, 3e-3)), "SEEDS": (1,)}.items():
        monkeypatch.setitem(script["main"].__globals__, name, small)
    command = ["muon_steps.py", "--quick", "--steps", "4", "--shares", "0.75", "--output", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", command)
    script["main"]()
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["muon"]["0.75"]["steps"] == 3
    assert len(report["adamw_torch"]["by_rate"]) == 2
    difference = report["muon"]["0.75"]["losses"][0] - report["adamw_torch"]["losses"][0]
    assert f"{difference:+.4f}" in capsys.readouterr().out


def test_survey_page_is_what_its_figures_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = runpy.run_path(str(BENCHMARKS / "survey_page.py"))
    docs = BENCHMARKS.parent / "docs"
    report = json.loads((docs / "bench" / "survey.json").read_text(encoding="utf-8"))
    assert script["page"](report) == (docs / "other-optimizers.md").read_text(encoding="utf-8")
    tried = [record for records in report["collections"].values() for record in records]
    assert len(tried) >= 200
    at = list(report["promises"]).index("layerwise")
    broken = [each["texts"]["layerwise"] for each in tried if each["problem"] is None and each["signs"][at] == "X"]
    assert all(text.startswith("expected no error; ") for text in broken)


def test_survey_survives_what_hangs_and_what_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = runpy.run_path(str(BENCHMARKS / "survey.py"))
    hold = script["_try"]
    good = hold("torch.optim.Rprop", torch.optim.Rprop, 60.0)
    assert good["results"]["schedule"]["status"] == "broken"
    assert good["results"]["constructor"]["status"] == "kept"
    hanging = hold(f"{__name__}.Hanging", Hanging, 2.0)
    assert [each["status"] for each in hanging["results"].values()][:2] == ["late", "untried"]
    crashing = hold(f"{__name__}.Crashing", Crashing, 60.0)
    assert crashing["results"]["trains"] == {"status": "late", "text": "the process ended with 3"}
    missing = hold("torch.optim.Nothing", torch.optim.Optimizer, 60.0)
    assert (missing["results"], missing["problem"].partition(":")[0]) == ({}, "UnknownOptimizer")


class Hanging(torch.optim.SGD):
    """Never ends its step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        time.sleep(1000)


class Crashing(torch.optim.SGD):
    """Ends the process."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        os._exit(3)
