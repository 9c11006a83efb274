"""Checkpoints of every optimizer that steps shards: written in one number of processes, read in another.

Written are, in ``FOLDER/<processes>``: one distributed checkpoint of all optimizers (``shards``), the same in whole
tensors (``whole.pt``), what one process without shards writes (``plain.pt``, by one process only), and what they ended
with (``ended.pt``). ``FOLDER/<processes>-rank<n>.pt`` says what came of reading.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_optim import build_optimizer
from lightning_optim.stepping import Layout
from tests.cases import case_of

RANK = int(os.environ.get("LOCAL_RANK", 0))
#: Steps before the checkpoint and after it.
BEFORE, AFTER = 3, 2
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)

Found = dict[str, Tensor]
Saved = dict[str, Any]


def model() -> nn.Sequential:
    """Returns layers whose rows two and four processes do not divide, or are fewer than they."""
    torch.manual_seed(0)
    layers = nn.Embedding(13, 16), nn.Linear(16, 37), nn.Linear(37, 16), nn.LayerNorm(16), nn.Conv1d(5, 6, 3)
    return nn.Sequential(*layers, nn.Linear(64, 64), nn.Linear(16, 3))


class Trained:
    """A model with an optimizer; the gradients of a step are the same in any number of processes."""

    def __init__(self, name: str, mesh: DeviceMesh | None) -> None:
        case = case_of(name)
        self.model = model()
        if mesh is not None:
            for layer in self.model:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = build_optimizer(
            self.model,
            case.plain,
            lr=case.lr,
            weight_decay=0.1,
            optim_args=case.options,
            optim_target_modules="all-linear" if case.projects else None,
        )
        if case.averages:
            self.optimizer.train()

    def step(self, first: int, count: int) -> None:
        for number in range(first, first + count):
            generator = torch.Generator().manual_seed(number)
            for parameter in self.model.parameters():
                layout = Layout.of(parameter)
                parameter.grad = layout.wrap(layout.share(torch.randn(parameter.shape, generator=generator)))
            self.optimizer.step()
        self.optimizer.zero_grad()

    def has(self) -> Found:
        """Returns weights and states, whole, by name."""
        found = {}
        for name, parameter in self.model.named_parameters():
            state = {f"{name}: {key}": value for key, value in self.optimizer.state[parameter].items()}
            found.update(flat({name: parameter, **state}))
        return found

    def written(self, options: StateDictOptions | None = None) -> Saved:
        return {
            "model": get_model_state_dict(self.model, options=options),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=options),
        }

    def read(self, saved: Saved, options: StateDictOptions | None = None) -> None:
        set_model_state_dict(self.model, saved["model"], options=options)
        set_optimizer_state_dict(self.model, self.optimizer, saved["optimizer"], options=options)


def flat(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a state, whole, and its numbers as tensors."""
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield key, (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        elif isinstance(value, (bool, int, float)):
            yield key, torch.tensor(value)
        elif isinstance(value, (list, tuple)):
            yield from flat({f"{key}.{index}": item for index, item in enumerate(value)})


def apart(one: Found, other: Found) -> dict[str, float]:
    """Returns by how much what differs does; infinite where only one has it, or in another shape or dtype."""
    found = {name: float("inf") for name in one.keys() ^ other.keys()}
    for name in one.keys() & other.keys():
        mine, theirs = one[name], other[name]
        if mine.shape != theirs.shape or mine.dtype is not theirs.dtype:
            found[name] = float("inf")
        elif not torch.equal(mine, theirs):
            found[name] = float((mine.double() - theirs.double()).abs().nan_to_num(torch.inf).max())
    return found


def write(names: list[str], folder: Path, mesh: DeviceMesh) -> None:
    shards, whole, plain, ended = {}, {}, {}, {}
    for name in names:
        trained = Trained(name, mesh)
        trained.step(0, BEFORE)
        shards[name] = copy.deepcopy(trained.written())
        whole[name] = copy.deepcopy(trained.written(StateDictOptions(full_state_dict=True)))
        ended[name] = {"saved": trained.has()}
        trained.step(BEFORE, AFTER)
        ended[name]["ended"] = trained.has()
        if mesh.size() == 1:
            alone = Trained(name, None)
            alone.step(0, BEFORE)
            plain[name] = copy.deepcopy({"model": alone.model.state_dict(), "optimizer": alone.optimizer.state_dict()})
    dcp.save(shards, checkpoint_id=folder / "shards")
    if RANK == 0:
        torch.save(whole, folder / "whole.pt")
        torch.save(plain, folder / "plain.pt")
        torch.save(ended, folder / "ended.pt")


def read(names: list[str], folder: Path, mesh: DeviceMesh) -> Iterator[tuple[str, dict[str, Trained]]]:
    """Yields what was read in each form."""
    shards = {name: Trained(name, mesh) for name in names}
    saved = {name: trained.written() for name, trained in shards.items()}
    dcp.load(saved, checkpoint_id=folder / "shards")
    for name, trained in shards.items():
        trained.read(saved[name])
    yield "shards", shards
    whole, saved = {}, torch.load(folder / "whole.pt", weights_only=True)
    for name in names:
        whole[name] = Trained(name, mesh)
        # torch distributes no state without tensors.
        states = saved[name]["optimizer"]["state"].values()
        if any(isinstance(value, Tensor) and value.ndim for state in states for value in state.values()):
            whole[name].read(saved[name] if RANK == 0 else {"model": {}, "optimizer": {}}, FROM_FIRST)
        else:
            set_model_state_dict(whole[name].model, saved[name]["model"], options=FROM_FIRST)
            whole[name].optimizer.load_state_dict(saved[name]["optimizer"])
    yield "whole", whole
    plain, saved = {}, torch.load(folder / "plain.pt", weights_only=True)
    for name in saved:
        plain[name] = Trained(name, mesh)
        set_model_state_dict(plain[name].model, saved[name]["model"], options=FROM_FIRST)
        plain[name].optimizer.load_state_dict(saved[name]["optimizer"])
    yield "plain", plain
    if mesh.size() == 1:
        alone, saved = {}, torch.load(folder / "whole.pt", weights_only=True)
        for name in names:
            alone[name] = Trained(name, None)
            alone[name].model.load_state_dict(saved[name]["model"])
            alone[name].optimizer.load_state_dict(saved[name]["optimizer"])
        yield "whole to plain", alone


def compared(names: list[str], folder: Path, mesh: DeviceMesh) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields how what was read differs from what was written, and how it goes on."""
    ended = torch.load(folder / "ended.pt", weights_only=True)
    for form, all_trained in read(names, folder, mesh):
        for name, trained in all_trained.items():
            found = {"read": apart(trained.has(), ended[name]["saved"])}
            trained.step(BEFORE, AFTER)
            yield f"{name}, {form}", {**found, "went on": apart(trained.has(), ended[name]["ended"])}


def main(processes: int, folder: Path, names: list[str], others: list[int]) -> None:
    """Reads what other numbers of processes wrote; without any, writes."""
    store = dist.HashStore() if processes == 1 else None
    dist.init_process_group("gloo", rank=RANK, world_size=processes, store=store)
    mesh = init_device_mesh("cpu", (processes,))
    if not others:
        write(names, folder / str(processes), mesh)
    results = {
        f"{what}, {other}": found for other in others for what, found in compared(names, folder / str(other), mesh)
    }
    torch.save(results, folder / f"{processes}-rank{RANK}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","), [int(word) for word in sys.argv[4:]])
