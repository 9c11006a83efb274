"""Whether dealing Muon's matrices out among processes that hold whole parameters (DDP) would pay.

Today every process orthogonalizes every matrix. Dealt out, each would orthogonalize its share and send the results to
the others, the same bits. Both take turns on the same matrices in two processes with gloo, and are compared, by the CPU
seconds of the busier process and by wall-clock time. Next to it stands what decides it elsewhere: floating-point
operations saved per byte sent::

    python benchmarks/dealt.py --output docs/bench                # what docs/sharded.md shows
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial

import ratios
import torch
import torch.distributed as dist
from processes import RANK, from_all, say, start
from ratios import Ratio
from torch import Tensor

from lightning_optim.optimizers._newton_schulz import orthogonalize
from lightning_optim.stepping._together import _balanced

PROCESSES = 2
# Of a block of a transformer.
WIDTHS = (128, 256, 512)
STEPS = 5
COEFFICIENTS = (3.4445, -4.775, 2.0315)


def shapes(width: int) -> list[tuple[int, int]]:
    """Returns the shapes of a block's matrices."""
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]


def operations(shape: tuple[int, int]) -> int:
    """Returns the floating-point operations of an orthogonalization: three products per iteration."""
    short, long = sorted(shape)
    return STEPS * 2 * (2 * short * short * long + short**3)


def orthogonalized(matrix: Tensor) -> Tensor:
    """Returns a matrix as Muon makes it."""
    found = orthogonalize([matrix], size=1, dtype=matrix.dtype, steps=STEPS, coefficients=COEFFICIENTS, eps=1e-7)
    return found[0].contiguous()


def everywhere(matrices: list[Tensor]) -> list[Tensor]:
    """Has every process orthogonalize all."""
    return [orthogonalized(each) for each in matrices]


def owners(matrices: list[Tensor]) -> list[int]:
    """Returns who orthogonalizes each, balanced as for sharded parameters."""
    return _balanced([operations((each.shape[0], each.shape[1])) for each in matrices], PROCESSES)


def dealt(matrices: list[Tensor]) -> list[Tensor]:
    """Has every process orthogonalize its share and send it to the others, each by one message."""
    dealt_to = owners(matrices)
    results = [torch.empty(0)] * len(matrices)
    for index, owner in enumerate(dealt_to):
        if owner == RANK:
            results[index] = orthogonalized(matrices[index])
    for process in range(PROCESSES):
        share = [index for index, owner in enumerate(dealt_to) if owner == process]
        sizes = [matrices[index].numel() for index in share]
        own = process == RANK
        flat = torch.cat([results[i].flatten() for i in share]) if own else matrices[0].new_empty(sum(sizes))
        dist.broadcast(flat, process)
        for index, part in zip(share, torch.split(flat, sizes), strict=True):
            results[index] = part.view(matrices[index].shape)
    return results


def seconds(work: Callable[[], object]) -> list[float]:
    """Returns the wall-clock time and this process's CPU seconds until all processes are done, who start together."""
    dist.barrier()
    started = time.perf_counter(), time.process_time()
    work()
    dist.barrier()
    return [time.perf_counter() - started[0], time.process_time() - started[1]]


def measure(width: int, rounds: int, wall: bool) -> ratios.Record:
    """Returns the record of one width."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in shapes(width)]
    both = {"everywhere": partial(everywhere, matrices), "dealt": partial(dealt, matrices)}
    one, other = (work() for work in both.values())
    assert all(map(torch.equal, one, other))
    taken: dict[str, list[list[float]]] = {name: [] for name in both}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample([*both], 2):
            taken[name].append(seconds(both[name]))
    # [rounds, 2]: of the process that takes longest.
    most = {name: torch.tensor(from_all(own), dtype=torch.float64).amax(0) for name, own in taken.items()}
    elapsed, worked = (
        Ratio.of(most["dealt"][:, kind].tolist(), most["everywhere"][:, kind].tolist()) for kind in (0, 1)
    )
    whose, costs = owners(matrices), [operations(shape) for shape in shapes(width)]
    own = [sum(cost for cost, owner in zip(costs, whose, strict=True) if owner == rank) for rank in range(PROCESSES)]
    sent = [
        sum(m.nbytes for m, owner in zip(matrices, whose, strict=True) if owner == rank) for rank in range(PROCESSES)
    ]
    return {
        "model": f"block of width {width}",
        "optimizer": "muon",
        "variant": "dealt",
        "against": "everywhere",
        "width": width,
        "milliseconds": round(float(most["everywhere"][:, 0 if wall else 1].median()) * 1e3, 3),
        "ratio": ratios.as_kept(elapsed if wall else worked),
        "wall_ratio": ratios.as_kept(elapsed),
        "saved_operations": sum(costs) - max(own),
        "sent_bytes": max(sent),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="of both (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny matrices, two rounds: whether it runs")
    ratios.add_options(parser)
    arguments = parser.parse_args()
    start(PROCESSES)
    torch.set_num_threads(arguments.threads)
    dist.init_process_group("gloo")
    widths, rounds = ((16, 32), 2) if arguments.quick else (WIDTHS, arguments.rounds)
    measured = ratios.report([measure(width, rounds, arguments.wall) for width in widths], arguments.wall)
    if not arguments.wall:
        measured["time"] = "CPU seconds of the busier process"
    titles = f"{'dealt, x everywhere':>24}{'wall-clock time':>24}{'saved GFLOP':>14}{'sent MiB':>11}{'FLOP/byte':>11}"
    say(f"{'':<22}{'everywhere, ms':>16}{titles}")
    for one in measured["records"]:
        saved, sent = one["saved_operations"], one["sent_bytes"]
        say(
            f"{one['model']:<22}{one['milliseconds']:>16.2f}{Ratio(**one['ratio'])!s:>24}{Ratio(**one['wall_ratio'])!s:>24}"
            f"{saved / 1e9:>14.2f}{sent / 2**20:>11.2f}{saved / sent:>11.0f}"
        )
    say("", ratios.legend(measured))
    if RANK == 0:
        ratios.finish(measured, arguments, "dealt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
