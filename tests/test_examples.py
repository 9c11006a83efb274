"""The examples, run as a user runs them: each in a process of its own."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import run_fresh

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments: str | Path) -> str:
    """Runs a script of ``examples/``."""
    script, *rest = arguments
    done = run_fresh(str(EXAMPLES / script), *map(str, rest))
    assert done.returncode == 0, f"{' '.join(done.args)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def logged(folder: Path) -> list[str]:
    """Arguments that send everything a run writes into ``folder``."""
    logger = "lightning.pytorch.loggers.CSVLogger"
    return [f"--trainer.default_root_dir={folder}", f"--trainer.logger={logger}", f"--trainer.logger.save_dir={folder}"]


def metric(run_folder: Path, name: str) -> list[str]:
    """All logged values of a metric, as written."""
    with (run_folder / "metrics.csv").open() as file:
        return [row[name] for row in csv.DictReader(file) if row[name]]


def test_demo(tmp_path: Path) -> None:
    output = run("demo.py", "--steps", "6", "--output", tmp_path)

    rows = {}
    for name in ("adamw_torch", "adamw_torch_layerwise", "adamw_8bit"):
        values = re.search(rf"^{name}" + 7 * r" +([\d.,]+)" + "$", output, re.M)
        assert values, output
        rows[name] = [float(value.replace(",", "")) for value in values.groups()]
    for train_loss, val_loss, perplexity, measured, counted, gradients, seconds in rows.values():
        assert 2 < val_loss < train_loss < math.log(256) + 1
        assert perplexity == pytest.approx(math.exp(val_loss), rel=1e-3)
        assert counted <= measured <= counted + 2 * 256 * 4  # two lookup tables
        assert gradients > 0
        assert seconds > 0
    plain, layerwise, quantized = rows.values()
    assert layerwise[:5] == plain[:5]
    assert "Bit for bit the same losses in every step: adamw_torch and adamw_torch_layerwise." in output
    assert plain[5] == quantized[5] == pytest.approx(plain[4] / 2, rel=1e-3), "two states per gradient"
    assert layerwise[5] < plain[5] / 4
    assert quantized[1] == pytest.approx(plain[1], abs=0.01), "the same seed and batches lead to almost the same loss"
    assert quantized[3] < 0.31 * plain[3]

    for name in rows:
        path = tmp_path / f"{name}.ckpt"
        assert f"{path} ({path.stat().st_size / 2**20:.2f} MiB, read with torch.load(weights_only=True))" in output
        assert torch.load(path, weights_only=True)["hyper_parameters"]["optim"] == name
    samples = re.findall(r"writes:\n((?:    \| .*\n)+)", output)
    assert [sample.startswith("    | The ") and len(sample) > 200 for sample in samples] == [True, True, True]

    picture = tmp_path / "losses.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    assert str(picture) in output


def test_gpt_command_line_and_its_saved_config(tmp_path: Path) -> None:
    first, second = (tmp_path / "lightning_logs" / f"version_{number}" for number in (0, 1))
    arguments = ["--optim", "lion_8bit", "--lr", "3e-4", "--trainer.max_steps", "3", "--trainer.log_every_n_steps", "1"]
    output = run("gpt.py", "fit", "--config", EXAMPLES / "gpt.yaml", *arguments, *logged(tmp_path))
    assert "optim='lion_8bit': bitsandbytes.optim.Lion (lr=0.0003" in output

    assert "optim='lion_8bit'" in run("gpt.py", "fit", "--config", first / "config.yaml")
    losses = metric(first, "train_loss")
    assert len(set(losses)) == 3
    assert metric(second, "train_loss") == losses


def test_digits_learns_with_a_schedule_free_optimizer(tmp_path: Path) -> None:
    arguments = ["--optim", "schedule_free_adamw", "--trainer.max_epochs", "3"]
    run("digits.py", "fit", "--config", EXAMPLES / "digits.yaml", *arguments, *logged(tmp_path))
    accuracies = metric(tmp_path / "lightning_logs" / "version_0", "val_accuracy")
    assert len(accuracies) == 3
    assert float(accuracies[-1]) > 0.9


def test_muon_steps_the_matrices_of_the_blocks(tmp_path: Path) -> None:
    short = ["--trainer.max_steps", "12", "--trainer.limit_val_batches", "1", "--trainer.log_every_n_steps", "1"]
    short += ["--data.batch_size", "4"]
    configs = ["--config", EXAMPLES / "gpt.yaml", "--config", EXAMPLES / "muon.yaml"]
    output = run("gpt.py", "fit", *configs, *short, *logged(tmp_path))
    groups = re.findall(r"^  (\S+) +(\d+) tensors? +[\d,]+ elements  lr=([\d.]+)", output, re.M)
    blocks = 3
    assert groups == [
        (".*query_key_value[.]weight/decay", str(blocks), "0.02"),
        ("decay", str(3 * blocks), "0.02"),
        ("adamw_torch/decay", "1", "0.004"),
        ("adamw_torch/no_decay", str(8 * blocks + 2), "0.004"),
    ]
    losses = [float(loss) for loss in metric(tmp_path / "lightning_logs" / "version_0", "train_loss")]
    assert losses[-1] < losses[0] - 1


def test_gan_comes_closer_to_real_digits(tmp_path: Path) -> None:
    output = run("gan.py", "--epochs", "15", "--output", tmp_path)
    for part, name in (("generator", "schedule_free_adamw"), ("discriminator", "adamw_8bit")):
        assert f"optim='{name}'" in output, part
    found = re.search(r"Distance from real digits: ([\d.]+) before, ([\d.]+) after", output)
    assert found, output
    before, after = map(float, found.groups())
    assert after < before / 3
    assert (tmp_path / "gan.png").read_bytes().startswith(b"\x89PNG")


def test_lora_learns_and_saves_the_adapter_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = run("lora.py", "--steps", "8", "--output", tmp_path)
    elements = [int(found.replace(",", "")) for found in re.findall(r"^  \S+ +\d+ tensors +([\d,]+)", output, re.M)]
    width, hidden, blocks, rank = 256, 512, 2, 16
    adapters = blocks * rank * (4 * (width + width) + 3 * (width + hidden))
    assert elements[-1] == adapters, "the last report is of the adapters alone"
    assert sum(elements[:-1]) > 10 * adapters
    losses = re.search(r"Loss on code: ([\d.]+) before, ([\d.]+) after, ([\d.]+) loaded", output)
    assert losses, output
    before, after, loaded = map(float, losses.groups())
    assert after < before - 0.1
    assert loaded == after
    saved = load_file(tmp_path / "lora_adapter" / "adapter_model.safetensors")
    assert all(".lora_" in name for name in saved)
    assert sum(tensor.numel() for tensor in saved.values()) == adapters


def test_two_processes_hold_half_each_and_one_goes_on(tmp_path: Path) -> None:
    shards, whole, longer = (str(tmp_path / f"{name}.ckpt") for name in ("shards", "whole", "longer"))
    output = run("sharded.py", "--steps", "3", "--output", tmp_path)
    done = run_fresh("-m", "lightning_optim", "consolidate", shards, whole)
    assert done.returncode == 0, done.stderr
    output += run("sharded.py", "--devices", "1", "--steps", "4", "--resume", whole, "--output", tmp_path)

    held = re.findall(r"of (\d) holds ([\d.]+) of ([\d.]+) MiB of weights, ([\d.]+) of ([\d.]+) MiB of state", output)
    (two, *half), (one, *all_of_it) = held
    assert (two, one) == ("2", "1")
    for mine, everything in (half[:2], half[2:]):
        assert float(mine) == pytest.approx(float(everything) / 2, abs=0.01)
    assert all_of_it == [half[1], half[1], half[3], half[3]]
    perplexities = {path: float(value) for path, value in re.findall(r"Perplexity of (\S+): ([\d.]+)", output)}
    assert perplexities[whole] == pytest.approx(perplexities[shards], rel=2e-3)  # two processes see a window twice
    assert perplexities[longer] < perplexities[whole]
    assert torch.load(longer, weights_only=True)["global_step"] == 4


def test_fabric_goes_on_from_a_checkpoint_bit_for_bit() -> None:
    output = run("fabric.py", "--optim", "stable_adamw", "--epochs", "2")
    before, after = map(float, re.findall(r": ([\d.]+)% right", output))
    assert before < 50
    assert after > 90
    assert "Interrupted after 1 epochs: the weights are the same, bit for bit" in output


def test_port_trains_to_the_same_losses_with_fewer_lines() -> None:
    output = run("port/compare.py")
    found = re.findall(r"^(.+): (\d+) losses, from ([\d.]+) to ([\d.]+); largest difference (\S+)$", output, re.M)
    assert [name for name, *_ in found] == ["AdamW, warm-up and cosine", "schedule-free AdamW"]
    tolerances = (0.0, 1e-4)
    for (_, *values), tolerance in zip(found, tolerances, strict=True):
        count, first, last, apart = map(float, values)
        assert count == 3 * (math.ceil(0.8 * 1797 / 32) + 1)
        assert last < first / 5
        assert apart <= tolerance
    lines = re.search(r"before.py: (\d+) lines. after.py: (\d+) lines. (\d+) go, (\d+) come.", output)
    assert lines, output
    before, after, gone, came = map(int, lines.groups())
    assert after == before - gone + came
    assert after < before / 3
