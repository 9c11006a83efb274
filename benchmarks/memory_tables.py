"""Estimates what training models of 7, 13 and 70 billion parameters takes, by identifier and strategy.

Writes ``docs/bench/memory.json``, whose tables are in README.md and docs/memory.md. Nothing is allocated, and the bytes
are the same on every machine. The commands in the file print the same numbers for all identifiers::

    python benchmarks/memory_tables.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_optim import REGISTRY, OptimConfig
from lightning_optim.bench._run import machine
from lightning_optim.choose import Estimator, MemoryEstimate, Strategy, find_shape
from lightning_optim.choose._estimate import REFUSALS

IDENTIFIERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "muon",
    "lion_32bit",
    "adamw_8bit",
    "adamw_torch_4bit",
    "lion_8bit",
    "galore_adamw",
    "galore_adamw_8bit",
    "apollo_adamw",
    "apollo_mini",
    "adafactor",
    "lomo",
)
PARTS = (
    "parameters",
    "state",
    "gradients",
    "communication",
    "activations",
    "temporaries",
    "pageable",
    "peak",
    "moment",
)


@dataclass(frozen=True)
class Column:
    """A way to train, and on how many devices."""

    strategy: Strategy
    devices: int = 1
    layerwise: bool = False

    @property
    def flags(self) -> str:
        """What the command is told."""
        return f"--strategy {self.strategy} --devices {self.devices}" if self.devices > 1 else ""


COLUMNS = (
    Column("auto"),
    Column("auto", layerwise=True),
    Column("ddp", 8),
    Column("layerwise_ddp", 8, layerwise=True),
    Column("fsdp2", 8),
    Column("layerwise_fsdp2", 8, layerwise=True),
)


def records(size: str, column: Column, identifiers: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields an estimate per identifier, or why it is not trained so."""
    shape = find_shape(f"llama-{size}")
    estimator = Estimator(
        f"llama-{size}",
        batch=(1, shape.length),
        precision="bf16-true",
        strategy=column.strategy,
        devices=column.devices,
        activation_checkpointing=True,
    )
    command = f"lightning-optim memory --llama {size} --activation-checkpointing {column.flags}".rstrip()
    with estimator.opened():
        for name in identifiers:
            by_nature = bool(REGISTRY.find(name).layerwise)
            if by_nature and not column.layerwise:
                continue
            asked = f"{name}_layerwise" if column.layerwise and not by_nature else name
            record: dict[str, Any] = {"shape": f"llama-{size}", **asdict(column), "optim": name, "asked": asked}
            try:
                record |= _kept(estimator.estimate(OptimConfig(asked)))
            except REFUSALS as error:
                record["refused"] = error.text
            yield {**record, "command": command}


def _kept(estimate: MemoryEstimate) -> dict[str, Any]:
    found = estimate.as_dict()
    return {name: found[name] for name in PARTS}


def main() -> None:
    """Estimates and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["7b", "13b", "70b"], help="of LLaMA (default: %(default)s)")
    parser.add_argument("--identifiers", nargs="+", default=IDENTIFIERS, help="names without _layerwise")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs/bench/memory.json")
    arguments = parser.parse_args()
    found = []
    for size in arguments.sizes:
        for column in COLUMNS:
            found += records(size, column, arguments.identifiers)
            print(f"llama-{size}, {column}", flush=True)
    versions = machine()["versions"]
    report = {
        "command": "python benchmarks/memory_tables.py",
        "how": "bf16-true, activation checkpointing, one sequence of the longest length per device; estimated for CUDA",
        "machine": {"device": "estimated, nothing was allocated", "versions": versions},
        "records": found,
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
