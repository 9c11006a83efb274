"""``torch.compile`` around a step: every optimizer moves its parameters as it does without."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim import Layerwise, OptimMixin, build_optimizer
from tests.cases import BY_NAME, CASES, Case
from tests.models import trainer

# One for each class whose step is ours to answer for, and one of torch's with our hooks on it; identifiers that differ
# in arguments alone add nothing but seconds.
CLASSES = tuple({case.upstream: case for case in CASES if not case.upstream.startswith("torch.optim:")}.values())
CLASSES = tuple(case for case in (*CLASSES, BY_NAME["adamw_torch_fused"]) if case.name != "adamw_torch_4bit")


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    # Otherwise the compiler gives up on a step that it has compiled for many optimizers, and nothing is tested.
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def twins() -> nn.Sequential:
    """Two matrices of one shape, and large enough to be quantized: what is compiled for the first fits the second."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


def moved(
    case: Case, backend: str | None, loop: Callable[[nn.Module, Optimizer], Callable[[], object]], name: str
) -> Tensor:
    """Parameters after three steps of a loop, compiled unless ``backend`` is ``None``."""
    model = twins()
    optimizer = build_optimizer(model, name, lr=case.lr, optim_args=case.options)
    if case.averages:
        optimizer.train()
    inputs = torch.randn(8, 64)
    step = loop(model, optimizer)
    step = step if backend is None else torch.compile(step, backend=backend)
    for _ in range(3):
        if Layerwise.of(optimizer) is None:
            (model(inputs) - inputs).square().mean().backward()
        step()
        optimizer.zero_grad()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def step_alone(model: nn.Module, optimizer: Optimizer) -> Callable[[], object]:
    return optimizer.step


def step_in_backward(model: nn.Module, optimizer: Optimizer) -> Callable[[], object]:
    layerwise = Layerwise.of(optimizer)
    assert layerwise is not None
    inputs = torch.ones(8, 64)

    def step() -> None:
        with layerwise.stepping():
            (model(inputs) - inputs).square().mean().backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("case", CLASSES, ids=lambda case: case.name)
def test_a_compiled_step_moves_every_parameter_as_it_is(case: Case) -> None:
    plain = moved(case, None, step_alone, case.plain)
    assert torch.equal(plain, moved(case, "eager", step_alone, case.plain))


@pytest.mark.parametrize("name", ["galore_adamw"])
def test_inductor_leaves_a_step_of_ours_alone(name: str) -> None:
    case = BY_NAME[name]
    plain = moved(case, None, step_alone, name)
    assert torch.equal(plain, moved(case, "inductor", step_alone, name))


def test_apollo_with_exact_decompositions() -> None:
    case = Case("apollo_adamw", "", options={"rank": 4, "proj": "svd"})
    plain = moved(case, None, step_alone, case.name)
    assert torch.equal(plain, moved(case, "eager", step_alone, case.name))


@pytest.mark.parametrize("name", ["galore_adamw", "lion_8bit"])
def test_stepping_in_a_compiled_backward(name: str) -> None:
    case = BY_NAME[name]
    plain = moved(case, None, step_in_backward, case.layerwise)
    assert torch.equal(plain, moved(case, "eager", step_in_backward, case.layerwise))


class ByHand(OptimMixin, L.LightningModule):
    """Manual optimization: the step is part of the training step, which Lightning has compiled."""

    def __init__(self, optim: str) -> None:
        super().__init__(optim=optim, lr=1e-2, optim_args={"rank": 4})
        self.automatic_optimization = False
        self.model = twins()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = (self.model(batch) - batch).square().mean()
        self.manual_backward(loss)
        optimizer.step()
        return loss


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_layerwise"])
def test_a_compiled_module_with_manual_optimization(name: str) -> None:
    def fitted(compiled: bool) -> Tensor:
        module = ByHand(name)
        data = torch.utils.data.DataLoader(torch.randn(24, 64, generator=torch.Generator().manual_seed(0)), 8)
        trainer(max_steps=3).fit(torch.compile(module, backend="eager") if compiled else module, data)
        return nn.utils.parameters_to_vector(module.parameters()).detach()

    assert torch.equal(fitted(False), fitted(True))
