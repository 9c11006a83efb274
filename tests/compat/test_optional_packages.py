"""What ``lightning_optim._compat`` relies on in packages that need not be installed; see ``test_compat.py``."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_optim import REGISTRY
from tests.compat.contract import relied_on


def test_the_optimizers_of_torchao_have_one_base_class() -> None:
    optim = pytest.importorskip("torchao.optim", reason="torchao is not installed here")
    with relied_on("torchao.AdamBase", "adamw_torch_4bit, adamw_torch_8bit and adamw_torch_fp8") as base:
        (upstream,) = base.__bases__
        assert issubclass(optim.AdamW8bit, upstream)
        assert issubclass(optim.AdamW4bit, upstream)
        assert issubclass(optim.AdamWFp8, upstream)
        optimizer = optim.AdamW8bit(nn.Linear(2, 2).parameters())
        assert {"params", "lr", "betas", "eps", "weight_decay", "amsgrad"} <= optimizer.param_groups[0].keys()
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)


def test_the_optimizers_of_torchao_ask_for_each_moment() -> None:
    optim = pytest.importorskip("torchao.optim", reason="torchao is not installed here")
    with relied_on("torchao.AdamBase", "embeddings in 32 bits") as base:

        class Asks(base, optim.AdamW8bit):  # type: ignore[misc, valid-type]
            def quantizes(self, parameter: torch.Tensor) -> bool:
                return parameter is weights[0]

            def _step(self) -> None:
                raise AssertionError("compiles: not here")

        weights = [nn.Parameter(torch.ones(64, 64)) for _ in range(2)]
        optimizer = Asks(weights)
        moments = [optimizer._new_buffer(weight, signed=True) for weight in weights]
        assert [type(moment) is torch.Tensor for moment in moments] == [False, True]
        (upstream,) = base.__bases__
        assert "self._new_buffer(p, True)" in inspect.getsource(upstream.step)


def test_the_step_of_npus_consists_of_parts() -> None:
    """Runs on the stand-in, as part of ``npu_suite.py``; ``test_npu.py`` compares that with the real package."""
    pytest.importorskip("torch_npu.optim", reason="torch_npu is not installed here")
    with relied_on("torch_npu.AdamWInParts", "adamw_torch_npu_fused") as in_parts:
        taken: list[str] = []

        class Watched(in_parts):  # type: ignore[misc, valid-type]
            def combine_parameters(self) -> None:
                taken.append("parameters")
                super().combine_parameters()

            def combine_states(self) -> None:
                taken.append("states")
                super().combine_states()

        weight = nn.Parameter(torch.ones(2, device="npu"))
        optimizer = Watched([weight], lr=0.5, weight_decay=0.0)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert taken == ["parameters", "states"]
        optimizer.step_group(0)
        torch.testing.assert_close(weight.detach().cpu(), torch.zeros(2), rtol=0, atol=1e-6)
        optimizer.zero_grad()
        assert taken[2:] == ["parameters"]


def test_bitsandbytes_worries_in_these_words() -> None:
    found = importlib.util.find_spec("bitsandbytes")
    if found is None or found.origin is None:
        pytest.skip("bitsandbytes is not installed here")
    with relied_on("bitsandbytes.quietly", "importing bitsandbytes without a warning on a CPU") as quietly:
        source = Path(found.origin).parent.joinpath("backends", "cpu", "ops.py").read_text()
        beginning = "Failed to load CPU gemm_4bit_forward"
        assert f'"{beginning}' in source
        assert "getLogger(__name__)" in source
        log, written = logging.getLogger("bitsandbytes.backends.cpu.ops"), io.StringIO()
        handler = logging.StreamHandler(written)
        log.addHandler(handler)
        with quietly():
            log.warning(f"{beginning} from %s", "a hub")
            log.warning("Failed in earnest")
        log.warning(f"{beginning} again")
        log.removeHandler(handler)
        assert written.getvalue() == f"Failed in earnest\n{beginning} again\n"


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
