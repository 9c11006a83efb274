"""State bytes of the estimate equal those of an optimizer that was built and stepped, plain and layerwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_optim import OptimConfig, build_optimizer, estimate_memory
from lightning_optim.choose import Estimator
from tests.build.test_memory import Shapes, assert_exact, stepped
from tests.cases import BY_NAME, KINDS, NAMES
from tests.models import TokenModel

PRECISION = {torch.float32: "32-true", torch.bfloat16: "bf16-true"}


@pytest.mark.parametrize(
    ("name", "shapes", "dtype"),
    [(name, Shapes, torch.bfloat16) for name in NAMES] + [(name, TokenModel, torch.float32) for name in KINDS],
)
def test_state_is_exact(name: str, shapes: type[nn.Module], dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    with torch.device("meta"):
        model = shapes()
    estimator = Estimator(model, precision=PRECISION[dtype], accelerator="cpu")
    forms = [OptimConfig(form, optim_args=case.options) for form in (name, *case.forms[1:])]
    real = stepped(name, shapes(), dtype, optim_args=case.options)
    assert_exact(name, real)
    assert [estimator.estimate(form).state for form in forms] == [real.state_bytes] * len(forms)


def test_state_of_a_class_that_no_row_describes_is_measured_without_memory() -> None:
    model = Shapes()
    optimizer = build_optimizer(model, "torch.optim.NAdam")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    real = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert estimate_memory(Shapes(), "torch.optim.NAdam", accelerator="cpu").state == real


def test_state_follows_groups_and_targets() -> None:
    groups = {"whole.weight": {"optim_bits": 32}}
    plain, wide = (
        estimate_memory(Shapes(), "adamw_8bit", param_groups=chosen, accelerator="cpu") for chosen in (None, groups)
    )
    assert wide.state - plain.state == 2 * 4096 * 4 - 2 * (4096 + 16 * 4)
    some, every = (
        estimate_memory(Shapes(), "galore_adamw", optim_args="rank=4", optim_target_modules=chosen, accelerator="cpu")
        for chosen in (["whole"], None)
    )
    assert some.state > every.state
