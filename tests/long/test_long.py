"""Long and wide trainings: nothing grows, and what runs side by side does not touch each other. ``make test-long``.

``make test`` takes a little of it.
"""

from __future__ import annotations

import gc
import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from lightning_optim import Layerwise, build_optimizer
from tests.cases import case_of
from tests.models import LitTokens, loader, trainer
from tests.processes import run_fresh

LONG = bool(os.environ.get("LIGHTNING_OPTIM_LONG_TESTS"))
STEPS, FITS, PARAMETERS = (10_000, 300, 2000) if LONG else (400, 20, 200)
MIB = 2**20
#: One of each way to step and to keep states.
NAMES = ("adamw_torch_layerwise", "galore_adamw", "schedule_free_adamw_layerwise", "adamw_8bit", "muon_layerwise")


class Counts(Callback):
    """Notes, after every tenth of the steps, what could grow."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.seen: list[Counter[str]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            self.seen.append(counted(trainer, pl_module))


def of_process() -> Counter[str]:
    """Returns this process's resident bytes, open files and threads, as Linux tells them."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Counter(
        memory=pages * os.sysconf("SC_PAGE_SIZE"),
        files=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
    )


def counted(run: L.Trainer, module: L.LightningModule) -> Counter[str]:
    """Returns how much there is of what could grow, in this process and of this training."""
    gc.collect()
    (optimizer,) = run.optimizers
    found = of_process() + Counter(
        callbacks=len(run.callbacks),  # type: ignore[attr-defined]
        states=sum(len(state) for state in optimizer.state.values()),
        tensors=sum(isinstance(each, Tensor) for each in gc.get_objects()),
        hooks=sum(len(own) for each in module.modules() for name, own in vars(each).items() if name.endswith("_hooks")),
    )
    for parameter in module.parameters():
        found["hooks"] += len(parameter._backward_hooks or ())
        found["hooks"] += len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())
    return found


@pytest.mark.parametrize("name", NAMES if LONG else NAMES[:1])
def test_many_steps_let_nothing_grow(name: str) -> None:
    case, counts = case_of(name), Counts(STEPS // 10)
    model = LitTokens(width=16, optim=name, lr=1e-4, optim_args=case.options, lr_scheduler=case.schedule)
    run = trainer(max_steps=STEPS, callbacks=[counts])
    run.fit(model, loader(20, batch_size=1))
    model.losses.clear()
    assert run.global_step == STEPS
    assert len(counts.seen) == 10
    # The first tenths find buckets and subspaces.
    early, last = counts.seen[3], counts.seen[-1]
    assert last["memory"] - early["memory"] < 16 * MIB
    assert {key: value for key, value in last.items() if key != "memory"} == {
        key: value for key, value in early.items() if key != "memory"
    }


def alive() -> Counter[str]:
    """Returns how many objects there are of each class that a fit makes."""
    gc.collect()
    kinds = (type(each) for each in gc.get_objects())
    mine = Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    return Counter({name: count for name, count in mine.items() if name.startswith("lightning")})


def test_many_fits_leave_nothing_behind(tmp_path: Path) -> None:
    def fit(number: int) -> None:
        name = NAMES[number % len(NAMES)]
        case = case_of(name)
        model = LitTokens(width=16, optim=name, lr=1e-3, optim_args=case.options, lr_scheduler=case.schedule)
        saver = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=2, enable_version_counter=False)
        run = trainer(max_steps=2, callbacks=[saver], enable_checkpointing=True)
        run.fit(model, loader(2, batch_size=1))
        assert run.global_step == 2

    half = FITS // 2
    for number in range(half):
        fit(number)
    before, objects = of_process(), alive()
    for number in range(half):
        fit(number)
    after = of_process()
    assert after["memory"] - before["memory"] < 16 * MIB
    assert (after["files"], after["threads"]) == (before["files"], before["threads"])
    grown = {name: count - objects[name] for name, count in alive().items() if count > objects[name]}
    assert not grown


class Wide(nn.Module):
    """Many small parameters, each with a gradient."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(parameters // 2))
        self.head = nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        for part in self.parts:
            hidden = hidden + 0.01 * torch.tanh(part(hidden))
        loss: Tensor = self.head(hidden).square().mean()
        return loss


def stepped(name: str, parameters: int, steps: int = 4, seed: int = 0) -> list[Tensor]:
    """Returns the weights after some steps in a loop of one's own."""
    generator = torch.Generator().manual_seed(seed)
    model = Wide(parameters)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    inputs = torch.randn(8, 4, generator=generator)
    case = case_of(name)
    optimizer = build_optimizer(model, name, lr=1e-2, optim_args=case.options)
    layerwise = Layerwise.of(optimizer)
    for _ in range(steps):
        if layerwise is None:
            model(inputs).backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            layerwise.backward(model(inputs))
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "muon"])
def test_many_parameters(name: str) -> None:
    plain, layerwise = stepped(name, PARAMETERS), stepped(f"{name}_layerwise", PARAMETERS)
    assert all(map(torch.equal, plain, layerwise))


def test_threads_do_not_touch_each_other() -> None:
    names = [f"{name}_layerwise" for name in ("adamw_torch", "galore_adamw", "muon", "adafactor")]
    alone = {name: stepped(name, 20, steps=20) for name in names}
    together: dict[str, list[Tensor]] = {}

    def run(name: str) -> Callable[[], None]:
        return lambda: together.update({name: stepped(name, 20, steps=20)})

    threads = [threading.Thread(target=run(name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together.keys() == alone.keys()
    for name in names:
        assert all(map(torch.equal, together[name], alone[name])), name


def child(name: str, seed: int, to: Any) -> None:
    """Sends the weights that a process of its own comes to, as lists: a tensor would travel by a file descriptor."""
    torch.set_num_threads(1)
    to.send([weight.tolist() for weight in stepped(name, 10, seed=seed)])
    to.close()


@pytest.mark.parametrize("method", ["fork", "spawn"] if LONG else ["fork"])
def test_children_step_as_their_parent(method: str) -> None:
    names = ("adamw_torch_layerwise", "schedule_free_adamw", "galore_adamw_layerwise")
    context = torch.multiprocessing.get_context(method)
    for seed, name in enumerate(names):
        # What the parent has stepped before must not matter.
        expected = stepped(name, 10, seed=seed)
        receives, sends = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(name, seed, sends))
        process.start()
        sends.close()
        found = receives.recv()
        process.join(60)
        assert process.exitcode == 0
        assert found == [weight.tolist() for weight in expected]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    directory = tmp_path_factory.mktemp("ranks")
    done = run_fresh("-m", "tests.long.ranks_worker", str(directory), ranks=4)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.mark.skipif(not LONG, reason="four processes take long to start: make test-long")
def test_four_processes_stay_alike(ranks: list[dict[str, Tensor]]) -> None:
    for name, plain in (("adamw_torch_layerwise", "adamw_torch"), ("muon_layerwise", "muon")):
        for rank in ranks:
            assert torch.equal(rank[name], ranks[0][name])
            assert float((rank[name] - rank[plain]).abs().max()) < 1e-5, "up to the order of a sum"
            assert float((rank[name] - rank["start"]).abs().max()) > 1e-3
