"""Every identifier trains on an XLA device as on the host, at the device's pace, or is refused with the reason."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torch_xla", reason="needs torch_xla: make test-xla")

import torch_xla
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_optim import REGISTRY, IncompatibleTrainer, Layerwise, MissingDependency, build_optimizer
from tests.cases import BY_NAME, NAMES, Case
from tests.models import LENGTH, TOKENS, TokenModel
from tests.xla.runs import apart, counting, on_host

CASES = {**BY_NAME, "adamw_torch_xla": Case("adamw_torch_xla", "", options={"betas": (0.8, 0.95)})}
RUNS = [name for name in CASES if not REGISTRY[name].xla and REGISTRY[name].devices in (None, frozenset({"xla"}))]
# The same on the host, where the row is for XLA alone.
ON_HOST = {"adamw_torch_xla": "adamw_torch"}
# After 10 steps, between XLA's rounding and the host's; AnyPrecision's second moment is bfloat16.
CLOSE, CLOSE_IN_BFLOAT16 = 1e-5, 1e-3
# rmsprop's case is centered: it divides by the root of a difference of nearly equal numbers, which takes up how a
# processor rounds sums (1.8e-5 apart on one, below 1e-5 on another).
TOLERANCES = {"adamw_anyprecision": CLOSE_IN_BFLOAT16, "rmsprop": 1e-4}
# How often a step awaits a value from the device. Prodigy's next learning rate is a number.
LOOKS = {"prodigy": 1}


def make(name: str, device: str) -> tuple[TokenModel, Optimizer]:
    case = CASES[name]
    torch.manual_seed(0)
    model = TokenModel().to(device)
    # Muon iterates in bfloat16 on XLA devices and in float32 on the host, unless told.
    options = {"ns_dtype": "float32", **case.options} if case.row.takes == "hidden matrices" else case.options
    built = name if device == "xla" else ON_HOST.get(name, name)
    optimizer = build_optimizer(model, built, lr=case.lr, optim_args=options)
    if case.averages:
        optimizer.train()  # type: ignore[attr-defined]
    return model, optimizer


def train(model: TokenModel, optimizer: Optimizer, first: int, last: int) -> None:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, TOKENS, (16, 16, LENGTH), generator=generator)
    layerwise = Layerwise.of(optimizer)
    for batch in tokens[first:last]:
        loss = F.cross_entropy(model(batch.to(device)).flatten(0, 1), ((3 * batch + 1) % TOKENS).to(device).flatten())
        if layerwise is not None:
            layerwise.backward(loss)
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch_xla.sync()


def test_which_run_is_no_accident() -> None:
    assert {"adamw", "adamw_torch", "adamw_torch_xla", "sgd", "adafactor", "schedule_free_adamw"} <= set(RUNS)
    assert len(RUNS) > 12


@pytest.mark.parametrize("name", RUNS)
def test_trains_as_on_the_host_and_resumes(name: str) -> None:
    (here, optimizer), (there, reference) = make(name, "xla"), make(name, "cpu")
    train(here, optimizer, 0, 7)
    with counting() as counted:
        train(here, optimizer, 7, 10)
    # Not in every step: a graph that is compiled anew, a look at a value, an operation that only the host has.
    assert counted.get("UncachedCompile", 0) <= 1
    assert counted.get("TransferFromDeviceTime", 0) == 3 * LOOKS.get(name, 0)
    assert not [operation for operation, count in counted.items() if operation.startswith("aten::") and count]
    train(there, reference, 0, 10)
    assert apart(here, there) < TOLERANCES.get(name, CLOSE)

    saved = on_host([here.state_dict(), optimizer.state_dict()])
    train(here, optimizer, 10, 16)
    resumed, again = make(name, "xla")
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(resumed, again, 10, 16)
    assert apart(resumed, here) == 0.0


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RUNS])
def test_others_are_refused(name: str) -> None:
    spec = REGISTRY[name]
    model = TokenModel().to("xla")
    # A package that this environment lacks is said first.
    error, text = (IncompatibleTrainer, "XLA|xla") if spec.availability() else (MissingDependency, "pip install")
    with pytest.raises(error, match=text):
        build_optimizer(model, name)
    assert spec.xla or "xla" not in (spec.devices or ())
