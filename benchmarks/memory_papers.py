"""Counts bytes of optimizer state next to those that papers give: docs/bench/memory_papers.json, for docs/memory.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_optim import estimate_memory
from lightning_optim.bench._run import machine

# As the training script of https://github.com/jiaweizzhao/GaLore chooses them.
BLOCKS = ("query", "key", "value", "out", "gate", "up", "down")


@dataclass(frozen=True)
class Figure:
    """One figure of a paper and the requests that come near it."""

    shape: str
    optim: str
    paper: str
    requests: Sequence[str]


GALORE = tuple(
    Figure(f"llama-{size}", "galore_adamw", paper, (f"rank={rank},state_dtype=parameter", f"rank={rank}"))
    for size, rank, paper in (("60m", 128, "0.13"), ("130m", 256, "0.28"), ("350m", 256, "0.54"), ("1b", 512, "1.78"))
)
NARROW = "state_dtype=parameter"
APOLLO = (
    Figure("llama-7b", "adamw_8bit", "13", ("", "quantize_embeddings=True")),
    Figure("llama-7b", "galore_adamw_8bit", "4.9", ("rank=1024", f"rank=1024,{NARROW},quantize_embeddings=True")),
    Figure("llama-7b", "apollo_adamw", "1.6", ("rank=256", f"rank=256,{NARROW}")),
    Figure("llama-7b", "apollo_adamw", "0.0", ("rank=1,scale=128,scale_type=tensor",)),
)


def state(shape: str, optim: str, args: str, blocks_only: bool = False, precision: str = "bf16-true") -> int:
    """Returns the bytes of a state."""
    targets = list(BLOCKS) if blocks_only else None
    return estimate_memory(
        shape, optim, optim_args=args or None, optim_target_modules=targets, precision=precision
    ).state


def main() -> None:
    """Counts and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs/bench/memory_papers.json")
    output = parser.parse_args().output
    galore: list[dict[str, Any]] = []
    for figure in GALORE:
        found = [state(figure.shape, figure.optim, args) for args in figure.requests]
        found.append(state(figure.shape, figure.optim, figure.requests[0], blocks_only=True))
        galore.append({"shape": figure.shape, "paper": figure.paper, "bytes": found})
    apollo = [
        {"optim": one.optim, "paper": one.paper, "options": args, "bytes": state(one.shape, one.optim, args)}
        for one in APOLLO
        for args in one.requests
    ]
    medium = [
        {"optim": optim, "options": args, "bytes": state("gpt2-medium", optim, args, precision="32-true")}
        for optim, args in (("adamw_torch", ""), ("adamw_8bit", "quantize_embeddings=True"), ("adamw_8bit", ""))
    ]
    report = {
        "command": "python benchmarks/memory_papers.py",
        "machine": {"device": "counted, nothing was allocated", "versions": machine()["versions"]},
        "galore": galore,
        "apollo": apollo,
        "gpt2-medium": medium,
    }
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {output}")


if __name__ == "__main__":
    main()
