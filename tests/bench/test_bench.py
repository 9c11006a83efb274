"""``lightning-optim bench`` on a tiny module: what it measures, and that it goes on where it stopped."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning import seed_everything

from lightning_optim.bench import CLAIMS, RANKED, Candidate, chosen, demo
from lightning_optim.bench._candidates import candidate
from lightning_optim.bench._statistics import paired
from lightning_optim.build import OptimConfig
from lightning_optim.command import main
from lightning_optim.command._bench import as_text
from lightning_optim.errors import MissingDependency
from lightning_optim.table import REGISTRY
from tests.bench.tiny import PRESS_AT, Data, Tokens
from tests.models import trainer

NAMES = ("adamw_torch", "sgd,momentum=0.9", "adamw_torch_layerwise")
CLASSES = ("--model", "tests.bench.tiny.Tokens", "--data", "tests.bench.tiny.Data")
EXPENSE = ("--steps", "6", "--lrs", "3", "--seeds", "3")
#: What two runs of the same trial do not share.
TIMES = ("seconds", "step_seconds", "samples_per_second", "tokens_per_second")


def run(*arguments: str, status: int = 0) -> None:
    assert main(["bench", *arguments]) == status


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def outcomes(folder: Path) -> list[dict[str, Any]]:
    """The measurements without what depends on the clock."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines(folder)[1:]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run(*NAMES, *CLASSES, *EXPENSE, "--output", str(folder))
    return folder


@pytest.fixture(scope="module")
def report(finished: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished / "report.json").read_text())
    return found


# What is measured


def test_every_optimizer_has_the_same_budget(finished: Path) -> None:
    head, *rest = lines(finished)
    assert head["request"]["steps"] == 6
    assert [line["optimizer"] for line in rest[:3]] == list(NAMES), "memory first: what cannot run is known early"
    trials = rest[3:]
    for name in NAMES:
        mine = [line for line in trials if line["optimizer"] == name]
        assert len({line["lr"] for line in mine[:3]}) == 3
        assert [line["seed"] for line in mine] == [0, 0, 0, 1, 2, 3]
        best = min(mine[:3], key=lambda line: line["value"])
        assert {line["lr"] for line in mine[3:]} == {best["lr"]}
    rounds = [trials[begin : begin + 3] for begin in range(0, len(trials), 3)]
    assert all({line["optimizer"] for line in each} == set(NAMES) for each in rounds), "side by side"
    assert len({tuple(line["optimizer"] for line in each) for each in rounds}) > 1, "in changing order"


def test_a_pair_shares_weights_and_batches(finished: Path) -> None:
    trials = lines(finished)[4:]
    first = {(line["seed"], line["curve"][0][1]) for line in trials}
    assert len(first) == 4, "the first loss depends on the seed alone"
    # The same steps, so that nothing differs by more than a rounding.
    plain, layerwise = ([line["value"] for line in trials if line["optimizer"] == name] for name in NAMES[::2])
    assert layerwise == pytest.approx(plain, rel=1e-6)


def test_a_trial_is_what_the_trainer_does(finished: Path) -> None:
    line = next(one for one in lines(finished)[4:] if one["optimizer"] == NAMES[1] and one["seed"] == 2)
    seed_everything(2, verbose=False)
    module = Tokens(optim="sgd", lr=line["lr"], optim_args={"momentum": 0.9}, lr_scheduler="cosine", warmup_steps=0.05)
    by_hand = trainer(max_steps=6)
    by_hand.fit(module, Data())
    (metrics,) = by_hand.validate(module, Data(), verbose=False)
    assert line["metric"] == "val_loss"
    assert line["value"] == pytest.approx(metrics["val_loss"], rel=1e-6)
    assert [point[1] for point in line["curve"]] == pytest.approx(module.losses, rel=1e-6)


def test_the_report_is_computed_from_the_trials(finished: Path, report: dict[str, Any]) -> None:
    trials = lines(finished)[4:]
    values = {
        name: [line["value"] for line in trials if line["optimizer"] == name and line["seed"] > 0] for name in NAMES
    }
    for row in report["optimizers"]:
        mine = values[row["optimizer"]]
        assert row["loss"] == pytest.approx(statistics.fmean(mine))
        assert [one["value"] for one in row["values"]] == mine
        rates = [one["lr"] for one in row["tried"]]
        assert row["lr_is_at_the_edge"] == (row["lr"] in (rates[0], rates[-1]))
        assert rates[1] == REGISTRY.find(row["identifier"]).default_lr
        assert row["samples_per_second"] == pytest.approx(4 / row["step_seconds"], rel=0.5)
        assert row["tokens_per_second"] == pytest.approx(8 * row["samples_per_second"])
        assert row["peak_bytes"] > row["state_bytes"] > 0
        assert row["failures"] == {}
    reference, other, _ = report["optimizers"]
    assert reference["difference"] is None
    assert reference["step_ratio"] == 1
    interval = paired(values[NAMES[1]], values[NAMES[0]])
    found = other["difference"]
    assert [found["mean"], found["low"], found["high"]] == [interval.mean, interval.low, interval.high]
    assert (report["reference"], report["confidence"]) == (NAMES[0], 0.95)


def test_text_and_picture(finished: Path) -> None:
    text = (finished / "report.txt").read_text()
    assert [line for line in text.splitlines() if len(line) > 100 and "bench.png" not in line] == []
    for part in (
        "adamw_torch_layerwise",
        "sgd +",
        "  sgd,momentum=0.9\n",
        "95% interval",
        "Student's t-interval",
        "torch 2.",
    ):
        assert " ".join(part.split()) in " ".join(text.split())
    picture = (finished / "bench.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert 10_000 < len(picture) < 200_000


# Going on


def test_a_finished_comparison_trains_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (finished / "trials.jsonl").read_bytes()
    monkeypatch.setattr(Tokens, "training_step", lambda *_: pytest.fail("it trains"))
    run(*NAMES, *CLASSES, *EXPENSE, "--output", str(finished))
    assert (finished / "trials.jsonl").read_bytes() == before


def test_ctrl_c_and_a_torn_line(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A shell starts what runs in the background with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command = (*NAMES, *CLASSES, *EXPENSE, "--output", str(tmp_path))
    # In the fourth step of the third trial: a fit for memory has three steps.
    monkeypatch.setenv(PRESS_AT, str(3 * 3 + 2 * 6 + 4))
    run(*command, status=128 + signal.SIGINT)
    assert "2 of 18 trainings are in" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stopped = (tmp_path / "trials.jsonl").read_bytes()
    assert len(lines(tmp_path)) == 1 + 3 + 2
    assert not (tmp_path / "report.json").exists()

    # As after a power cut in the middle of a line.
    (tmp_path / "trials.jsonl").write_bytes(stopped[:-7])
    run(*command)
    assert (tmp_path / "trials.jsonl").read_bytes().startswith(stopped[: stopped[:-7].rfind(b"\n") + 1])
    assert outcomes(tmp_path) == outcomes(finished), "as if nothing had happened"


def test_more_seeds_and_optimizers_add_to_what_is_there(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_bytes((finished / "trials.jsonl").read_bytes())
    run(*NAMES[:2], *CLASSES, "--steps", "6", "--lrs", "3", "--seeds", "4", "--output", str(tmp_path))
    added = lines(tmp_path)[len(lines(finished)) :]
    assert [(line["optimizer"], line["seed"]) for line in added] in (
        [(NAMES[0], 4), (NAMES[1], 4)],
        [(NAMES[1], 4), (NAMES[0], 4)],
    )


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (("--steps", "7"), "steps was 6 and is 7"),
        (("--data", "tests.bench.tiny.OtherData"), "workload was"),
        (("--metric", "train_loss"), "metric was None and is 'train_loss'"),
    ],
)
def test_another_request_is_refused(
    finished: Path, changed: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "trials.jsonl").read_bytes()
    run(*NAMES, *CLASSES, *EXPENSE, "--output", str(finished), *changed, status=2)
    error = capsys.readouterr().err
    assert text in error
    assert "take another --output, or delete the file" in error
    assert (finished / "trials.jsonl").read_bytes() == before


def test_a_changed_source_is_another_request(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("inspect.getsourcefile", lambda _: __file__)
    run(*NAMES, *CLASSES, *EXPENSE, "--output", str(finished), status=2)
    assert "facts.sources" in capsys.readouterr().err


# Configuration files, modules that cannot be changed, failures


def test_a_config_for_a_module_of_another_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        """
optim: adamw_8bit
lr: 2.0e-3
optim_args: {betas: [0.8, 0.9]}
weight_decay: 0.3
model: {class_path: tests.bench.tiny.Foreign, init_args: {width: 16}}
data: {class_path: tests.bench.tiny.Data}
trainer:
  accelerator: cpu
  max_steps: 4
  accumulate_grad_batches: 2
  callbacks:
  - {class_path: ModelCheckpoint}
"""
    )
    run(
        *("adamw_8bit", "schedule_free_sgd", "--config", str(config), "--lrs", "1", "--seeds", "3", "--no-picture"),
        *("--output", str(tmp_path / "out"), "--json"),
    )
    report = json.loads(capsys.readouterr().out)
    mine, other = report["optimizers"]
    assert (mine["lr"], other["lr"]) == (2e-3, 1.0)
    assert report["metric"] == "training loss", "it validates nothing"
    assert report["request"]["shared"] == {"weight_decay": 0.3}
    assert report["request"]["config"]["optim_args"] == {"betas": [0.8, 0.9]}
    assert report["left_out_of_config"] == [
        "callbacks that end a trial early or have nothing to write to: 'ModelCheckpoint'"
    ]
    assert not (tmp_path / "out" / "bench.png").exists()
    first, last = mine["curve"][0]["loss"], mine["curve"][-1]["loss"]
    assert last < first, "not by the module's own optimizer, whose learning rate is 0"


def test_a_rate_that_diverges_does_not_end_the_comparison(tmp_path: Path) -> None:
    run("adamw_torch", "sgd,lr=1e30", *CLASSES, "--steps", "4", "--lrs", "1", "--output", str(tmp_path))
    _, row = json.loads((tmp_path / "report.json").read_text())["optimizers"]
    assert (row["lr"], row["loss"], row["difference"]) == (None, None, None)
    assert row["failures"] == {"diverged": 1}
    assert "1 diverged" in (tmp_path / "report.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--lrs", "4"), "give an odd number such as 3"),
        (("--seeds", "2"), "an interval needs at least 3"),
        (("--steps", "0"), "--steps 0 is no training"),
        (("--metric", "val_acc"), "it logs: train_loss, val_loss. Name one of these: --metric NAME"),
        (("adamw_torch",), "'adamw_torch' named more than once"),
        (("lion8bit",), "Close names: 'lion_8bit'"),
        (("adamw_apex_fused",), "the package 'apex' is not installed"),
        (("torch.optim.LBFGS,lr=0",), "a grid of learning rates needs one above 0"),
        (("sgd,betas=1",), "'sgd' has no option 'betas'"),
        (("--model", "tests.bench.tiny.Data"), "is no LightningModule"),
        (("--model", "tests.bench.no_such.Module"), "No module named 'tests.bench.no_such'"),
        (("--config", "no_such.yaml"), "there is no such file"),
    ],
)
def test_refusals(tmp_path: Path, arguments: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = tuple(name for name in arguments if arguments[0][0] != "-")
    options = arguments[len(names) :]
    given = ("adamw_torch", *(names or ("sgd",)), *CLASSES, "--steps", "1", "--lrs", "1", *options)
    run(*given, "--output", str(tmp_path), status=2)
    assert text in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("trainer_config", "text"),
    [
        ("trainer: {devices: 2, max_steps: 1}", "a trial runs on one device: write devices: 1"),
        ("trainer: {max_epochs: 3}", "add --steps N, or max_steps"),
        ("trainer: {max_stepz: 3}", "max_stepz"),
        ("trainer: {max_steps: 1}\nckpt_path: last.ckpt", "every trial starts from scratch"),
    ],
)
def test_configs_that_a_trial_cannot_follow(
    tmp_path: Path, trainer_config: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(trainer_config)
    run("adamw_torch", "sgd", *CLASSES, "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path), status=2)
    assert text in " ".join(capsys.readouterr().err.split())


def test_one_optimizer_or_data_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("adamw_torch", *CLASSES, "--steps", "1", "--output", str(tmp_path), status=2)
    assert "cannot be compared; name two or more" in capsys.readouterr().err
    run("--data", "tests.bench.tiny.Data", "--output", str(tmp_path), status=2)
    assert "add --model CLASS or --config FILE" in capsys.readouterr().err


def test_without_matplotlib_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run("adamw_torch", "sgd", *CLASSES, "--steps", "1", "--output", str(tmp_path), status=2)
    assert "pip install matplotlib. Or leave the picture out: --no-picture" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_figures_are_what_the_command_wrote() -> None:
    # `make bench-quick` gives the folder that it has just written to; otherwise those of the page are read.
    folder = Path(os.environ.get("LIGHTNING_OPTIM_BENCH_FIGURES", Path(__file__).parents[2] / "docs" / "bench"))
    written = json.loads((folder / "report.json").read_text())
    assert as_text(written) + "\n" == (folder / "report.txt").read_text()
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert [row["failures"] for row in written["optimizers"]] == [{}] * len(written["optimizers"])
    # It is the command that `make bench-quick` runs.
    asked = demo(quick=True)
    assert written["request"]["facts"]["model"] == asked.facts["model"]
    shown = [written[name] for name in ("workload", "steps", "rates", "seeds")]
    assert shown == [asked.name, 75, 5, 3]


# What is compared


def test_the_built_in_comparison() -> None:
    quick, left_out = chosen([], demo(quick=True), quick=True)
    assert [one.name for one in quick] == [
        name for name in RANKED if REGISTRY.find(name).availability() and not REGISTRY.find(name).compiles
    ]
    assert set(left_out) == set(RANKED) - {one.name for one in quick}
    assert {name for claim in CLAIMS for name in claim.places} == set(RANKED)
    by_name = {one.name: one for one in quick}
    assert by_name["galore_adamw"].config.optim_target_modules == "all-linear"
    assert by_name["galore_adamw"].config.optim_args == {"rank": "32", "update_proj_gap": "50"}
    assert by_name["adamw_torch"].config.weight_decay == 0.1


def test_grids_are_around_the_default() -> None:
    one = Candidate("lion_8bit", OptimConfig(optim="lion_8bit", lr=1e-4))
    assert one.rates(1) == [1e-4]
    assert one.rates(3) == [3.16e-5, 1e-4, 3.16e-4]
    assert one.rates(5) == [1e-5, 3.16e-5, 1e-4, 3.16e-4, 1e-3]
    assert candidate("sgd,lr=0.5", demo(quick=True)).rates(1) == [0.5]
    assert candidate("schedule_free_adamw", demo(quick=True)).config.lr_scheduler is None
    with pytest.raises(MissingDependency):
        candidate("adamw_apex_fused", demo(quick=True))
