"""What the tests on XLA devices train, and what they count."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
import torch_xla
from torch import Tensor, nn
from torch.nn import functional as F
from torch_xla.debug import metrics

from tests.models import LitTokens, loader, trainer

SINGLE, ALL = "single_xla_syncfree", "xla_syncfree"


def xla_trainer(strategy: str = SINGLE, **flags: Any) -> L.Trainer:
    # Lightning's sampler for several processes shuffles, also if there is one.
    return trainer(accelerator="pjrt", strategy=strategy, use_distributed_sampler=False, **flags)


def fit(optim: str, strategy: str = SINGLE, steps: int = 20, lr: float = 1e-2, **flags: Any) -> LitTokens:
    """Trains on an XLA device; ``strategy="cpu"`` is the same run on the host."""
    torch.manual_seed(0)
    module = LitTokens(optim=optim, lr=lr, **flags.pop("module", {}))
    make = trainer if strategy == "cpu" else lambda **given: xla_trainer(strategy, **given)
    run = make(max_steps=steps, **flags)
    run.fit(module, loader(), loader(batches=2, seed=1))
    assert run.global_step == steps
    return module


def weights(module: nn.Module) -> Tensor:
    """All parameters in one float32 vector on the host."""
    return torch.cat([parameter.detach().float().cpu().flatten() for parameter in module.parameters()])


def apart(one: nn.Module, other: nn.Module) -> float:
    """The largest difference between the parameters of two modules."""
    return float((weights(one) - weights(other)).abs().max())


def on_host(state: Any) -> Any:
    """What a checkpoint makes of a state dict: a file of host tensors, read with ``weights_only``."""
    file = io.BytesIO()
    move = torch.utils._pytree.tree_map
    torch.save(move(lambda value: value.cpu() if isinstance(value, Tensor) else value, state), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def small_model(device: Any = "xla", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)]
    return nn.Sequential(*layers).to(device, dtype)


def steps(
    module: nn.Module, optimizer: torch.optim.Optimizer, count: int, step: Callable[[], Any] | None = None
) -> None:
    """Takes plain steps on one batch, each of them one graph."""
    parameter = next(module.parameters())
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(16, size, generator=generator).to(parameter.device, parameter.dtype) for size in (32, 8))
    for _ in range(count):
        optimizer.zero_grad()
        F.mse_loss(module(x), y).backward()
        (step or optimizer.step)()
        torch_xla.sync()


def counts() -> dict[str, int]:
    """What torch_xla has counted so far: operations by name, compilations, transfers."""
    counted = {name: metrics.counter_value(name) for name in metrics.counter_names()}
    samples = {name: (metrics.metric_data(name) or [0])[0] for name in metrics.metric_names()}
    return {**counted, **samples}


@contextmanager
def counting() -> Iterator[Mapping[str, int]]:
    """Fills the mapping with what torch_xla counts meanwhile."""
    before, counted = counts(), {}
    yield counted
    counted.update({name: count - before.get(name, 0) for name, count in counts().items()})


def graph_of(tensors: list[Tensor]) -> str:
    """The operations that are recorded and have not run."""
    return torch_xla._XLAC._get_xla_tensors_text(tensors)
