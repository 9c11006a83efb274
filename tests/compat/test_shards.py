"""Processes that are not there, and FSDP2's memory: what ``estimate_memory(strategy="fsdp2")`` stands on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import nn

from lightning_optim._compat.fake import DispatchMode, fake_tensors, tensors_in
from lightning_optim.stepping import is_sharded
from tests.compat.contract import relied_on

NEEDED_BY = "lightning_optim.estimate_memory(strategy='fsdp2')"


def test_processes_are_absent_and_gone_after_an_error() -> None:
    with relied_on("shards.absent_processes", NEEDED_BY) as absent, relied_on("shards.has_processes", NEEDED_BY) as has:
        assert not has()
        with absent(4) as mesh:
            assert (has(), dist.get_rank(), dist.get_world_size()) == (True, 0, 4)
            assert (mesh["data_parallel"].size(), mesh["tensor_parallel"].size()) == (4, 1)
        assert not has()
        with pytest.raises(ZeroDivisionError), absent(4):
            _ = 1 / 0
        assert not dist.is_initialized()


def test_fully_shard_gathers_and_frees_without_memory_and_without_the_others() -> None:
    sizes: list[int] = []
    namespaces = set()

    class Mode(DispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            namespaces.add(operation.namespace)
            return operation(*args, **(kwargs or {}))

    with (
        relied_on("shards.absent_processes", NEEDED_BY) as absent,
        relied_on("shards.watch_resizes", NEEDED_BY) as watch,
        relied_on("shards.COMMUNICATES", NEEDED_BY) as communicates,
        absent(4) as mesh,
        fake_tensors(),
    ):
        from torch.distributed.fsdp import fully_shard

        # More than any machine has.
        layer = fully_shard(nn.Linear(2**20, 2**20, bias=False), mesh=mesh["data_parallel"])
        assert is_sharded(layer.weight)
        (shard,) = tensors_in(layer.weight)
        assert shard.shape == (2**18, 2**20)
        with watch(lambda storage: sizes.append(storage.nbytes())), Mode():
            layer(torch.ones(2, 2**20)).sum().backward()
        (gradient,) = tensors_in(layer.weight.grad)
        assert gradient.shape == shard.shape
        assert communicates <= namespaces
    assert sizes[-1] == 0, "freed"
    before = len(sizes)
    torch.ones(2).untyped_storage().resize_(0)
    assert len(sizes) == before, "it watches no longer"


def test_placements_say_which_entries_a_process_has() -> None:
    needed_by = "lightning_optim.optimizers on shards"
    with (
        relied_on("shards.absent_processes", NEEDED_BY) as absent,
        relied_on("shards.split_dim", needed_by) as split_dim,
        relied_on("shards.local_indices", needed_by) as local_indices,
        relied_on("shards.along", needed_by) as along,
        absent(4),
    ):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shards", "columns"))
        layer: Any = parallelize_module(nn.Linear(5, 11), mesh["columns"], ColwiseParallel())
        fully_shard(layer, mesh=mesh["shards"])
        # Split by tensor parallelism first, then by FSDP2, which is the first dimension of the mesh.
        strided, plain = layer.weight.placements
        assert [split_dim(each) for each in (strided, plain, Shard(1), Replicate())] == [0, 0, 1, None]
        found = local_indices(layer.weight.device_mesh, (strided, plain), 0, torch.arange(11))
        assert found.tolist() == [0, 1, 2]
        assert layer.weight.to_local().shape == (3, 5)
        assert local_indices(mesh, (Shard(0), Shard(0)), 0, torch.arange(11)).tolist() == [0, 1, 2]
        assert local_indices(mesh, (Shard(1), Replicate()), 1, torch.arange(5)).tolist() == [0, 1, 2]
        for placement in (strided, plain):
            moved = along(placement, 1)
            assert (type(moved), split_dim(moved)) == (type(placement), 1)
            assert getattr(moved, "split_factor", None) == getattr(placement, "split_factor", None)


def test_a_module_is_given_a_mesh() -> None:
    module = LightningModule()
    with (
        relied_on("shards.give_mesh", NEEDED_BY) as give,
        relied_on("shards.absent_processes", NEEDED_BY) as absent,
        absent(2) as mesh,
    ):
        give(module, mesh)
        assert module.device_mesh is mesh
