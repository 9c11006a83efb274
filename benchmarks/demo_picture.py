"""Trains the demo's GPT with six optimizers and keeps what the picture in README.md shows: ``docs/bench/demo.json``.

Plain AdamW, GaLore and Muon try three learning rates each with a seed of its own; the other forms of AdamW take
AdamW's. Then each trains once with the same seed on the same batches. ``make figures`` draws the picture; about 20
minutes on 2 cores::

    python benchmarks/demo_picture.py
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything
from optimizers_convergence import quiet_trainer

from lightning_optim.bench import GPT, PythonTopics, quiet
from lightning_optim.bench._run import machine
from lightning_optim.build import measured_bytes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from demo import SETTINGS, Recorder  # noqa: E402

PROJECTION = {"rank": 32, "update_proj_gap": 50}  # a quarter of the width
# By identifier: options, and the rates to try, or whose rate it takes.
OPTIMIZERS: dict[str, tuple[dict[str, Any], tuple[float, ...] | str]] = {
    "adamw_torch": ({}, (1e-3, 2e-3, 4e-3)),
    "adamw_torch_layerwise": ({}, "adamw_torch"),
    "adamw_8bit": ({}, "adamw_torch"),
    "adamw_8bit_layerwise": ({}, "adamw_torch"),
    "galore_adamw": (PROJECTION, (1e-2, 2e-2, 4e-2)),
    # Muon's updates are scaled so that learning rates of AdamW fit, and all parameters share one.
    "muon": ({"lr_scale": "match_rms_adamw"}, (1e-2, 2e-2, 4e-2)),
}
CHOOSING_SEED, SEED = 1, 0


def train(optimizer: str, lr: float, seed: int, steps: int, model: dict[str, int]) -> dict[str, Any]:
    """Trains from scratch and returns what the picture shows."""
    seed_everything(seed, verbose=False)
    settings = {**SETTINGS, "lr": lr, "optim_args": OPTIMIZERS[optimizer][0]}
    module, data, record = GPT(optim=optimizer, **settings, **model), PythonTopics(), Recorder()
    trainer = quiet_trainer(steps, record)
    with quiet():
        trainer.fit(module, data)
    return {
        "val_loss": record.val_losses[steps],
        "state_bytes": measured_bytes(trainer.optimizers[0].state_dict()),
        "gradient_bytes": record.gradient_bytes,
        "train_losses": record.train_losses,
    }


def main() -> None:
    """Trains and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250, help="of a training (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="of the GPT (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/bench/demo.json", help="file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # several wait for each other on a busy machine, and sums depend on their number
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*LeafSpec.*")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

    model = {"layers": 3, "width": arguments.width, "heads": 4}
    rates: dict[str, float] = {}
    records: list[dict[str, Any]] = []
    for optimizer, (options, tried) in OPTIMIZERS.items():
        losses = {}
        if isinstance(tried, str):
            rates[optimizer] = rates[tried]
        else:
            for lr in tried:
                losses[lr] = train(optimizer, lr, CHOOSING_SEED, arguments.steps, model)["val_loss"]
                print(f"{optimizer}, lr {lr:g}: {losses[lr]:.4f}", flush=True)
            rates[optimizer] = min(losses, key=lambda lr: losses[lr])
        found = train(optimizer, rates[optimizer], SEED, arguments.steps, model)
        print(
            f"{optimizer}, lr {rates[optimizer]:g}: {found['val_loss']:.4f}, state {found['state_bytes']:,}", flush=True
        )
        same = [one["optimizer"] for one in records if one["train_losses"] == found["train_losses"]]
        records.append(
            {
                "optimizer": optimizer,
                "options": options,
                "lr": rates[optimizer],
                "tried": {f"{lr:g}": round(loss, 4) for lr, loss in losses.items()},
                "losses_of": same[0] if same else optimizer,  # bit for bit the same in every step
                **found,
            }
        )
    for record in records:
        record["val_loss"] = round(record["val_loss"], 4)
        record["train_losses"] = [round(loss, 4) for loss in record["train_losses"]]
    parameters = sum(parameter.numel() for parameter in GPT(**model).parameters())
    report = {
        "command": "python benchmarks/demo_picture.py",
        "workload": f"the GPT of examples/ ({parameters:,} parameters) on the Python documentation, byte by byte",
        "steps": arguments.steps,
        "seed": SEED,
        "choosing_seed": CHOOSING_SEED,
        "settings": {name: value for name, value in SETTINGS.items() if name != "lr"},
        "parameter_bytes": 4 * parameters,
        "machine": machine(),
        "records": records,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(_unwrapped(json.dumps(report, indent=1)) + "\n", encoding="utf-8")
    print(f"written: {arguments.output}")


def _unwrapped(text: str) -> str:
    """Puts lists of numbers on one line each."""
    return re.sub(r"\[[-\d.,\s]+\]", lambda found: " ".join(found[0].split()), text)


if __name__ == "__main__":
    main()
