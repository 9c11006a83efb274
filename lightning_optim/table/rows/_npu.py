"""The row whose class is torch_npu's, for Huawei's Ascend (https://gitcode.com/Ascend/pytorch)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from lightning_optim.table._availability import Requirement
from lightning_optim.table._options import option
from lightning_optim.table._spec import OptimizerSpec
from lightning_optim.table.rows._torch_optim import ADAMW_FORMAT, ADAMW_SOURCE, ADAMW_STATE, AdamOptions

_TORCH = ".".join(torch.__version__.split(".")[:2])

# Never a dependency or an extra: torch autoloads torch_npu, which fails without CANN.
REQUIREMENTS = (
    Requirement(
        "torch-npu",
        "torch_npu",
        ">=2.9",
        same_minor_as="torch",
        command="install Ascend's CANN toolkit first (without it torch-npu breaks `import torch`: set "
        f"TORCH_DEVICE_BACKEND_AUTOLOAD=0, or pip uninstall torch-npu), then pip install 'torch-npu=={_TORCH}.*'",
        device="npu",
    ),
)

_FLAT = "torch_npu moves parameters, gradients and states into flat buffers and steps those as a whole"


@dataclass(frozen=True)
class NpuFusedAdamWOptions(AdamOptions):
    """Options of ``torch_npu.optim.NpuFusedAdamW``."""

    amsgrad: bool = option(False, "divide by the largest second moment seen")


ROWS = (
    OptimizerSpec(
        name="adamw_torch_npu_fused",
        target="lightning_optim.optimizers.adapters._npu:NpuFusedAdamW",
        wraps="torch_npu.optim.NpuFusedAdamW",
        summary="AdamW, one fused step over flat buffers on Ascend",
        source=f"{ADAMW_SOURCE}; torch_npu.optim.NpuFusedAdamW",
        options=NpuFusedAdamWOptions,
        default_lr=1e-3,
        default_weight_decay=1e-2,
        requirements=REQUIREMENTS,
        # Step counts are plain numbers.
        state=dataclasses.replace(ADAMW_STATE, scalar_bytes=0),
        state_format=ADAMW_FORMAT,
        devices=frozenset({"npu"}),
        in_place=frozenset({"npu"}),
        coupled=_FLAT,
        unsharded=_FLAT,
        fallbacks=("adamw",),
        note="float32 parameters only; precision='16-mixed' and 'bf16-mixed' keep them so",
    ),
)
