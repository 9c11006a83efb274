"""What ``lightning_optim._compat`` relies on in packages that need not be installed; see ``test_compat.py``."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect

import pytest
import torch
from torch import nn

from lightning_optim import REGISTRY
from tests.compat.contract import relied_on


def test_the_optimizers_of_torchao_have_one_base_class() -> None:
    optim = pytest.importorskip("torchao.optim", reason="torchao is not installed here")
    with relied_on("torchao.AdamBase", "adamw_torch_4bit and adamw_torch_8bit") as base:
        assert issubclass(optim.AdamW8bit, base)
        assert issubclass(optim.AdamW4bit, base)
        optimizer = optim.AdamW8bit(nn.Linear(2, 2).parameters())
        assert {"params", "lr", "betas", "eps", "weight_decay", "amsgrad"} <= optimizer.param_groups[0].keys()
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)


def test_torchao_is_called_usable_where_it_can_be_imported() -> None:
    """Its own metadata does not say which torch it takes; the row does."""
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed here")
    try:
        importlib.import_module("torchao.optim")
        imported = True
    except ImportError:
        imported = False
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torchao", "torch")]
    assert imported == bool(REGISTRY["adamw_torch_8bit"].availability()), (
        f"{' with '.join(versions)} {'can' if imported else 'cannot'} be imported: mend REQUIREMENTS in "
        "lightning_optim/table/rows/_torchao.py and the extra in pyproject.toml"
    )


def test_adam_is_one_operation_of_xla() -> None:
    pytest.importorskip("torch_xla", reason="torch_xla is not installed here: `make test-xla`")
    with relied_on("torch_xla.adam_step", "adamw_torch_xla") as adam_step:
        zero, parameter, first, second, unused = (
            torch.full((2,), value, device="xla") for value in (0.0, 1.0, 0.0, 0.0, 0.0)
        )
        step, gradient = torch.zeros((), device="xla"), torch.ones(2, device="xla")
        moments = [first], [second], [unused]
        options = {"lr": 0.25, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 0.0}
        flags = {"amsgrad": False, "maximize": False, "use_adamw": True}
        adam_step(zero[0], [step], [parameter], [gradient], *moments, **options, **flags)
        torch.testing.assert_close(parameter.cpu(), torch.full((2,), 0.75))
        assert step.item() == 1


def test_tpus_can_be_counted() -> None:
    """That the number is right takes a TPU: elsewhere the function asks the network for one."""
    tpu = pytest.importorskip("torch_xla._internal.tpu", reason="torch_xla is not installed here: `make test-xla`")
    with relied_on("torch_xla.tpu_count", "accelerator='pjrt'"):
        assert not inspect.signature(tpu.num_available_devices).parameters
