"""The row whose class is NVIDIA apex's (https://github.com/NVIDIA/apex)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from lightning_optim.table._availability import Requirement
from lightning_optim.table._options import option
from lightning_optim.table._spec import Buffer, OptimizerSpec, StateLayout
from lightning_optim.table.rows._torch_optim import ADAMW_FORMAT, ADAMW_SOURCE, AdamOptions

# The kernels' module, because PyPI's "apex" is another project that also imports as apex.
REQUIREMENTS = (
    Requirement(
        "apex",
        "amp_C",
        namesake="not NVIDIA's, or was built without its CUDA kernels (module amp_C)",
        command="git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
        "pip install -v --no-build-isolation ./",
    ),
)


@dataclass(frozen=True)
class FusedAdamOptions(AdamOptions):
    """Options of ``apex.optimizers.FusedAdam``."""

    bias_correction: bool = option(True, "correct the moments' bias toward zero in the first steps")


ROWS = (
    OptimizerSpec(
        name="adamw_apex_fused",
        target="lightning_optim.optimizers.adapters._apex:FusedAdam",
        wraps="apex.optimizers.FusedAdam",
        summary="AdamW, apex's fused kernel",
        source=f"{ADAMW_SOURCE}; apex.optimizers.FusedAdam",
        options=FusedAdamOptions,
        default_lr=1e-3,
        default_weight_decay=1e-2,
        requirements=REQUIREMENTS,
        fixed=MappingProxyType({"adam_w_mode": True}),
        state=StateLayout(
            buffers=(Buffer("exp_avg", float32=True), Buffer("exp_avg_sq", float32=True)), scalar_bytes=4
        ),
        state_format=ADAMW_FORMAT,
        devices=frozenset({"cuda"}),
        in_place=frozenset({"cuda"}),
        unsharded="apex's kernel takes whole tensors",
        half_weights=True,
        fallbacks=("adamw",),
    ),
)
