"""Muon on CPU: what stacks gain, a step in units of torch's, and when a stack changes the bits of a matrix.

python benchmarks/muon.py --output docs/bench    # writes muon.json there, too
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from lightning_optim.bench._run import machine
from lightning_optim.optimizers import Muon
from lightning_optim.optimizers._newton_schulz import orthogonalize, stack_size

COUNT, ROUNDS = 16, 15
STACKED = ((8, 8), (16, 16), (16, 64), (32, 32))
STEPPED = ((32, 32), (64, 64), (128, 128))
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ITERATION = {"steps": 5, "coefficients": (3.4445, -4.775, 2.0315), "eps": 1e-7}


def main() -> None:
    """Prints the ratios of the tables in docs/muon.md, and how many shapes' bits change."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for muon.json")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    measured = {"stacks": time_stacks(), "steps": time_steps()}
    generator = random.Random(0)
    shapes = [(generator.randint(1, 90), generator.randint(1, 90)) for _ in range(60)]
    shapes += [(16 * generator.randint(1, 8), 16 * generator.randint(1, 8)) for _ in range(30)]
    bits = {}
    for dtype in DTYPES:
        groups: dict[bool, list[bool]] = {False: [], True: []}
        for shape in shapes:
            groups[is_aligned(shape, dtype)].append(depends_on_the_stack(shape, dtype))
        texts = [f"{sum(found)} of {len(found)} shapes {'' if key else 'not '}aligned" for key, found in groups.items()]
        print(f"{dtype}: the stack changes bits of {', of '.join(texts)}")
        bits[str(dtype).removeprefix("torch.")] = {
            "aligned" if key else "not aligned": [sum(found), len(found)] for key, found in groups.items()
        }
    print(json.dumps(machine()))
    if output:
        kept = {"command": "python benchmarks/muon.py", "machine": machine(), **measured, "bits": bits}
        (output / "muon.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def time_stacks() -> list[dict[str, object]]:
    """Prints and returns the time of orthogonalizing matrices alone, in units of that in stacks."""
    measured: list[dict[str, object]] = []
    for shape in STACKED:
        matrices = list(torch.randn(COUNT, *shape))
        size = stack_size(shape, torch.float32, CPU)
        ratio = statistics.median(seconds(matrices, 1) / seconds(matrices, size) for _ in range(ROUNDS))
        print(f"| {shape[0]}x{shape[1]}, {size} in a stack | {ratio:.1f} |")
        measured.append({"shape": shape, "stack": size, "ratio": ratio})
    return measured


def time_steps() -> list[dict[str, object]]:
    """Prints and returns the time of a step of torch's Muon, in units of ours."""
    measured: list[dict[str, object]] = []
    for shape in STEPPED:
        ratio = statistics.median(step_seconds(torch.optim.Muon, shape) / step_seconds(Muon, shape) for _ in range(5))
        print(f"| {shape[0]}x{shape[1]} | {ratio:.0f} |")
        measured.append({"shape": shape, "ratio": ratio})
    return measured


def seconds(matrices: list[Tensor], size: int) -> float:
    """Returns what it takes to orthogonalize matrices in stacks of this size."""
    begun = time.perf_counter()
    for start in range(0, len(matrices), size):
        orthogonalize(matrices[start : start + size], size=size, dtype=torch.float32, **ITERATION)
    return time.perf_counter() - begun


def step_seconds(optimizer: type[torch.optim.Optimizer], shape: tuple[int, int]) -> float:
    """Returns what a step over equal matrices takes."""
    params = [torch.randn(shape).requires_grad_() for _ in range(COUNT)]
    for parameter in params:
        parameter.grad = torch.randn(shape)
    built = optimizer(params)
    built.step()
    begun = time.perf_counter()
    built.step()
    return time.perf_counter() - begun


def is_aligned(shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether matrices of this shape are stacked if they are small."""
    short, long = sorted(shape)
    return all(size * dtype.itemsize % 64 == 0 for size in (short * long, short * short))


def depends_on_the_stack(shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether a matrix gets other bits in another place of a stack, in another size of it, or beside others."""
    generator = torch.Generator().manual_seed(0)
    matrices = list(torch.randn(8, *shape, generator=generator))
    found = [
        orthogonalize(matrices[start : start + count], size=size, dtype=dtype, **ITERATION)[7 - start]
        for start, count, size in ((0, 8, 8), (7, 1, 8), (4, 4, 4), (6, 2, 2), (5, 3, 7))
    ]
    return not all(torch.equal(found[0], each) for each in found)


if __name__ == "__main__":
    main()
