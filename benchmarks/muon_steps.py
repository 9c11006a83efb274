"""How many steps Muon needs for AdamW's final loss, on the built-in GPT: both at their best of five learning rates.

AdamW trains all steps, Muon a share of them (``--shares``), each with its own cosine schedule to the end. The best rate
of one seed trains with three others, and the losses are compared in pairs. Prints a table and writes
``docs/bench/muon_steps.json``; about 20 minutes on 2 cores, 4 with ``--quick``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from lightning_optim import OptimConfig
from lightning_optim.bench import Judgement, demo, quiet, train
from lightning_optim.bench._run import machine

# Each with its best in the middle.
RATES = {
    "adamw_torch": (5.62e-4, 1e-3, 1.78e-3, 3.16e-3, 5.62e-3),
    "muon": (3.16e-3, 5.62e-3, 1e-2, 1.78e-2, 3.16e-2),
}
SEEDS = (1, 2, 3)
# Muon's updates are scaled so that learning rates of AdamW fit, and all parameters share one.
OPTIONS: dict[str, dict[str, Any]] = {"adamw_torch": {}, "muon": {"lr_scale": "match_rms_adamw"}}


def final_loss(name: str, lr: float, seed: int, steps: int, quick: bool) -> float:
    """Returns the validation loss at the end of a training; infinite if it diverged."""
    workload = demo(quick)
    config = OptimConfig(name, lr=lr, optim_args=OPTIONS[name], **workload.shared)
    with quiet():
        value = train(workload, config, seed, steps, Judgement(), lambda: None)["value"]
    return float("inf") if value is None else value


def best(name: str, steps: int, quick: bool) -> dict[str, Any]:
    """Returns the losses of one seed by learning rate, and those of the other seeds at the best."""
    by_rate = {lr: final_loss(name, lr, 0, steps, quick) for lr in RATES[name]}
    lr = min(by_rate, key=lambda rate: by_rate[rate])
    losses = [final_loss(name, lr, seed, steps, quick) for seed in SEEDS]
    print(f"{name}, {steps} steps: lr {lr:g}, loss {statistics.fmean(losses):.4f}", flush=True)
    return {"steps": steps, "by_rate": by_rate, "lr": lr, "losses": losses, "loss": statistics.fmean(losses)}


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="of AdamW")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.75, 1.0], help="of these for Muon")
    parser.add_argument("--quick", action="store_true", help="the smaller GPT, fewer sequences per batch")
    parser.add_argument("--output", type=Path, default=Path("docs/bench/muon_steps.json"))
    arguments = parser.parse_args()
    adamw = best("adamw_torch", arguments.steps, arguments.quick)
    muon = {share: best("muon", round(share * arguments.steps), arguments.quick) for share in arguments.shares}
    print("\nshare of steps  difference to AdamW, by seed (negative: Muon is better)")
    for share, found in muon.items():
        pairs = [one - other for one, other in zip(found["losses"], adamw["losses"], strict=True)]
        print(f"{share:<15g} {', '.join(f'{pair:+.4f}' for pair in pairs)}")
    report = {
        "workload": demo(arguments.quick).name,
        "machine": machine(),
        "options": OPTIONS,
        "adamw_torch": adamw,
        "muon": {str(share): found for share, found in muon.items()},
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
