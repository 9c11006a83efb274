"""Steps every case on whole parameters and on shards, with the same gradients; writes ``rank<n>.pt``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import Optimizer

import lightning_optim.optimizers
from lightning_optim.stepping import Layout
from tests.sharded.cases import CASES, MESHES, STEPS, Shape, Stepped, fits, meshes, shapes_on

RANK = int(os.environ["LOCAL_RANK"])


class Sent:
    """Counts messages and their bytes: what a process puts in."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, int]] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, messages are counted."""
        originals = {name: getattr(dist, name) for name in ("all_reduce", "all_to_all_single")}

        def counted(name: str) -> Any:
            def send(first: Tensor, *args: Any, **kwargs: Any) -> Any:
                given = first if name == "all_reduce" else args[0]
                self.messages.append((name, given.nbytes))
                return originals[name](first, *args, **kwargs)

            return send

        for name in originals:
            setattr(dist, name, counted(name))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)


def gradients(shapes: list[Shape]) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        yield [torch.randn(shape, generator=generator) * (1 + index) for index, shape in enumerate(shapes)]


def compare(case: Stepped, mesh_name: str, processes: int) -> dict[str, Any]:
    """Returns how far weights and states are apart, and what the last step sent."""
    sizes, dims = MESHES[mesh_name]
    mesh = init_device_mesh("cpu", (processes,) if sizes == (-1,) else sizes)
    placements: list[Placement] = [Replicate() if dim is None else Shard(dim) for dim in dims]
    shapes = shapes_on(case, mesh_name)
    generator = torch.Generator().manual_seed(1)
    whole = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    shards = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, placements)) for p in whole]
    before = [parameter.detach().clone() for parameter in whole]
    make = getattr(lightning_optim.optimizers, case.name)
    one, other = make(whole, **case.options), make(shards, **case.options)
    for step in gradients(shapes):
        for parameter, shard, gradient in zip(whole, shards, step, strict=True):
            parameter.grad, shard.grad = gradient, distribute_tensor(gradient, mesh, placements)
        one.step()
        sent = Sent()
        with sent.counting():
            other.step()
    found = [shard.detach().full_tensor() for shard in shards]  # type: ignore[attr-defined]
    return {
        "apart": max(float((p.detach() - f).abs().max()) for p, f in zip(whole, found, strict=True)),
        "moved": min(float((p.detach() - b).abs().max()) for p, b in zip(whole, before, strict=True)),
        "states": max(map(states_apart, whole, shards, [one] * len(whole), [other] * len(whole))),
        "sent": sent.messages,
    }


def states_apart(parameter: Tensor, shard: Tensor, one: Optimizer, other: Optimizer) -> float:
    """Returns the greatest difference of state tensors, of their largest element; states must have the same entries."""
    found = [0.0]
    expected, state = one.state[parameter], other.state[shard]
    assert expected.keys() == state.keys(), (expected.keys(), state.keys())
    for name, value in expected.items():
        if not isinstance(value, Tensor):
            assert value == state[name], (name, value, state[name])
            continue
        assert isinstance(state[name], DTensor), name
        gathered = state[name].full_tensor()
        assert gathered.shape == value.shape, (name, gathered.shape, value.shape)
        assert gathered.dtype is value.dtype, name
        if value.numel():
            found.append(float((value - gathered).abs().max() / value.abs().max().clamp(min=1e-30)))
    return max(found)


def strided() -> dict[str, bool]:
    """Says, for each parameter of layers split by tensor parallelism and FSDP2, whether its part is where we say."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shards", "columns"))
    model = nn.Sequential(nn.Linear(5, 11), nn.Linear(11, 3), nn.LayerNorm(3))
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for tensor in whole.values():
        dist.broadcast(tensor, 0)
    parallelize_module(model, mesh["columns"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["shards"])
    found = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        layout = Layout.of(parameter)
        part = layout.share(whole[name])
        again = layout.wrap(part)
        same = torch.equal(part, parameter.to_local()) and part.shape == layout.local_shape
        found[name] = same and isinstance(again, DTensor) and again.placements == parameter.placements
    return found


def main(processes: int, folder: Path) -> None:
    dist.init_process_group("gloo", rank=RANK, world_size=processes)
    torch.manual_seed(0)
    results: dict[str, Any] = {
        f"{case}, {mesh}": compare(case, mesh, processes)
        for mesh in meshes(processes)
        for case in CASES
        if fits(case, mesh)
    }
    if processes == 4:
        results["strided"] = strided()
    torch.save(results, folder / f"rank{RANK}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
