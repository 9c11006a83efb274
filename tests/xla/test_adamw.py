"""``adamw_torch_xla`` takes the sync-free kernel, equals torch's AdamW, and exchanges its state with it."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import pytest
import torch

pytest.importorskip("torch_xla", reason="needs torch_xla: make test-xla")

import torch_xla

from lightning_optim import build_optimizer
from lightning_optim.optimizers.adapters._xla import AdamW
from tests.xla.runs import counting, graph_of, on_host, small_model, steps, weights

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-6},
}
# Between XLA's rounding and the host's after ten steps of 1e-2. AdamW divides by what may be tiny.
CLOSE = 1e-4
# What torch's AdamW consists of, and no model in these tests.
PARTS = ("xla::lerp", "xla::addcdiv")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_torch(options: dict[str, Any]) -> None:
    here, there = small_model(), small_model("cpu")
    steps(here, AdamW(here.parameters(), lr=1e-2, **options), 10)
    steps(there, torch.optim.AdamW(there.parameters(), lr=1e-2, **options), 10)
    assert (weights(here) - weights(there)).abs().max() < CLOSE


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_narrow_parameters_are_computed_in_float32(options: dict[str, Any]) -> None:
    """Upstream's kernel makes them NaN: in bfloat16, 0.999 is 1 and the bias correction 0."""
    here, there = small_model(dtype=torch.bfloat16), small_model("cpu", torch.bfloat16)
    optimizer = AdamW(here.parameters(), lr=1e-2, **options)
    steps(here, optimizer, 10)
    steps(there, torch.optim.AdamW(there.parameters(), lr=1e-2, **options), 10)
    assert all(parameter.dtype is torch.bfloat16 for parameter in here.parameters())
    # As far apart as bfloat16's 8 bits make two orders of rounding; a step that is lost moves the weights by 1e-2.
    assert (weights(here) - weights(there)).abs().mean() < 5e-3
    assert {state["step"].dtype for state in optimizer.state.values()} == {torch.float32}


def test_upstream_needs_the_mending() -> None:
    """As soon as this fails, the adapter can do without."""
    from torch_xla.amp import syncfree

    module = small_model(dtype=torch.bfloat16)
    optimizer = syncfree.AdamW(module.parameters(), lr=1e-2)
    found_inf = torch.zeros((), dtype=torch.bfloat16, device="xla")
    steps(module, optimizer, 2, lambda: optimizer.step(found_inf=found_inf))
    assert weights(module).isnan().any()


def test_the_kernel_is_in_the_graph() -> None:
    for optimizer_class, taken in ((AdamW, True), (torch.optim.AdamW, False)):
        module = small_model()
        optimizer = optimizer_class(module.parameters(), lr=1e-2)
        steps(module, optimizer, 1)
        graphs: list[str] = []

        def step(optimizer: Any = optimizer, module: Any = module, graphs: list[str] = graphs) -> None:
            optimizer.step()
            graphs.append(graph_of([parameter.data for parameter in module.parameters()]))

        with counting() as counted:
            steps(module, optimizer, 1, step)
        parameters = len(list(module.parameters()))
        assert graphs[0].count("xla::adam_optimizer_step(") == (parameters if taken else 0)
        assert [counted.get(part, 0) for part in PARTS] == [0 if taken else parameters] * len(PARTS)


def test_a_step_reads_nothing_and_a_new_learning_rate_compiles_nothing() -> None:
    module = small_model()
    # Equal numbers are one input of the graph: a learning rate that equals the decay would be another graph.
    optimizer = build_optimizer(module, "adamw_torch_xla", lr=1e-2, weight_decay=0.1)
    steps(module, optimizer, 3)
    with counting() as counted:
        for lr in (3e-3, 2e-3, 1e-3):
            for group in optimizer.param_groups:
                group["lr"] = lr
            steps(module, optimizer, 1)
    assert counted["CachedCompile"] == 3
    assert counted.get("UncachedCompile", 0) == 0
    assert counted.get("TransferFromDeviceTime", 0) == 0
    assert not [name for name, count in counted.items() if name.startswith("aten::") and count]


def test_found_inf_skips_the_step() -> None:
    module = small_model()
    optimizer = AdamW(module.parameters(), lr=1e-2)
    steps(module, optimizer, 2)
    before = weights(module)
    overflow = torch.ones((), device="xla")
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    optimizer.step(found_inf=overflow)
    torch_xla.sync()
    assert torch.equal(weights(module), before)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}
    # With and without it in one run.
    steps(module, optimizer, 1)
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}
    assert weights(module).isfinite().all()


def test_the_closure_runs_with_gradients_and_its_result_is_returned() -> None:
    module = small_model()
    optimizer = AdamW(module.parameters(), lr=1e-3)
    x = torch.ones(4, 32, device="xla")

    def closure() -> torch.Tensor:
        loss = module(x).square().mean()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert float(second) < float(first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_resumes_exactly(options: dict[str, Any], dtype: torch.dtype) -> None:
    module = small_model(dtype=dtype)
    optimizer = AdamW(module.parameters(), lr=1e-2, **options)
    steps(module, optimizer, 5)
    saved = on_host([module.state_dict(), optimizer.state_dict()])
    steps(module, optimizer, 5)

    resumed = small_model(dtype=dtype)
    resumed.load_state_dict(saved[0])
    again = AdamW(resumed.parameters())
    again.load_state_dict(saved[1])
    assert {state["step"].device.type for state in again.state.values()} == {"xla"}
    steps(resumed, again, 5)
    assert torch.equal(weights(resumed), weights(module))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("first", ["xla", "cpu"])
def test_its_state_is_that_of_torch(first: str, options: dict[str, Any]) -> None:
    """Five steps here and five there, in either order, are ten steps of either."""
    classes = {"xla": AdamW, "cpu": torch.optim.AdamW}
    second = "cpu" if first == "xla" else "xla"
    begun, moved = small_model(first), small_model(second)
    optimizer = classes[first](begun.parameters(), lr=1e-2, **options)
    steps(begun, optimizer, 5)
    moved.load_state_dict(on_host(begun.state_dict()))
    other = classes[second](moved.parameters(), lr=1.0)
    state = on_host(optimizer.state_dict())
    other.load_state_dict(state)
    assert state["state"][0].keys() == on_host(other.state_dict())["state"][0].keys()
    steps(begun, optimizer, 5)
    steps(moved, other, 5)
    assert (weights(begun) - weights(moved)).abs().max() < CLOSE


def test_tracing_takes_a_third_of_the_time_of_torch() -> None:
    """The host's time for one step, 36 parameters; the optimizers take turns, the medians are compared."""
    makers = {
        "sync-free": lambda parameters: build_optimizer(parameters, "adamw_torch_xla", lr=1e-3),
        "torch": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        "torch foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
    }
    runs, times = {}, {name: [] for name in makers}
    for name, make in makers.items():
        parameters = [torch.nn.Parameter(torch.ones(16, 16, device="xla")) for _ in range(36)]
        runs[name] = parameters, make(parameters)
    gc.disable()
    try:
        for turn in range(25):
            for name, (parameters, optimizer) in runs.items():
                for parameter in parameters:
                    parameter.grad = torch.ones_like(parameter)
                torch_xla.sync(wait=True)
                start = time.perf_counter()
                optimizer.step()
                if turn >= 5:
                    times[name].append(time.perf_counter() - start)
                torch_xla.sync(wait=True)
    finally:
        gc.enable()
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    print({name: f"{1e3 * seconds:.2f} ms" for name, seconds in medians.items()})
    assert 3 * medians["sync-free"] < min(medians["torch"], medians["torch foreach"]), medians
