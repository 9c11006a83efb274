"""Rows whose class is torchao's (https://github.com/pytorch/ao/tree/main/torchao/optim)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lightning_optim.errors import InvalidOption
from lightning_optim.table._availability import Requirement
from lightning_optim.table._options import AT_LEAST_ONE, Options, option
from lightning_optim.table._spec import Buffer, OptimizerSpec, Quantization, StateLayout
from lightning_optim.table.rows._torch_optim import AdamOptions

REQUIREMENTS = (
    # 0.18 imports torch.nn.functional.ScalingType, which torch 2.9 does not have. The extra brings both in tested
    # versions.
    Requirement("torchao", "torchao", ">=0.18", torch=">=2.10", torch_command="pip install 'lightning-optim[torchao]'"),
)


@dataclass(frozen=True)
class AdamW8bitOptions(AdamOptions):
    """Options of ``torchao.optim.AdamW8bit``."""

    amsgrad: bool = option(False, "not implemented by torchao for quantized states: False only")
    block_size: int = option(256, "elements that share a scale", AT_LEAST_ONE, scope="constructor")
    bf16_stochastic_round: bool = option(False, "round bfloat16 weights stochastically", scope="constructor")
    quantize_embeddings: bool = option(False, "store embeddings' states in few bits, too", scope="policy")

    def check(self) -> None:
        if self.amsgrad:
            raise InvalidOption(
                "amsgrad=True is not implemented by torchao for quantized states; use 'adamw_torch'", code="LO208"
            )
        if self.block_size % 2:
            raise InvalidOption(
                f"block_size={self.block_size} is odd; the kernels take even sizes, 64 to 2048 are usual", code="LO204"
            )


@dataclass(frozen=True)
class AdamW4bitOptions(AdamW8bitOptions):
    """Options of ``torchao.optim.AdamW4bit``."""

    block_size: int = option(128, "elements that share a scale", AT_LEAST_ONE, scope="constructor")


@dataclass(frozen=True)
class AdamWFp8Options(AdamW8bitOptions):
    """Options of ``torchao.optim.AdamWFp8``."""


_NOTE = (
    "the first step compiles (about half a minute on CPU); parameters with fewer than 4096 elements, or whose size is "
    "not a multiple of block_size, keep unquantized states"
)

_UNSHARDED = (
    "torchao quantizes the states of large parts only: their number would change the results, and no checkpoint could "
    "move to another number of processes"
)


def _row(bits: int, options: type[Options], table_bytes: int, paper: str, fallbacks: tuple[str, ...]) -> OptimizerSpec:
    return OptimizerSpec(
        name=f"adamw_torch_{bits}bit",
        target=f"lightning_optim.optimizers.adapters._torchao:AdamW{bits}bit",
        wraps=f"torchao.optim.AdamW{bits}bit",
        summary=f"AdamW, {bits}-bit states, compiled",
        source=f"{paper}; torchao.optim.AdamW{bits}bit",
        options=options,
        default_lr=1e-3,
        default_weight_decay=1e-2,
        requirements=REQUIREMENTS,
        extra="torchao",
        state=StateLayout(
            buffers=(Buffer("exp_avg"), Buffer("exp_avg_sq")),
            scalar_bytes=4,
            quantization=Quantization(bits, "block_size", 4096, whole_blocks=True, table_bytes=table_bytes),
        ),
        state_format=f"torchao.AdamW-{bits}bit/1",
        devices=frozenset({"cpu", "cuda", "xpu"}),
        # Compiled into kernels that do.
        in_place=frozenset({"cpu", "cuda", "xpu"}),
        unsharded=_UNSHARDED,
        half_weights=True,
        compiles=True,
        fallbacks=fallbacks,
        note=_NOTE,
    )


_ADAMW_8BIT = _row(
    8,
    AdamW8bitOptions,
    256 * 4,
    "8-bit Optimizers via Block-wise Quantization, https://arxiv.org/abs/2110.02861",
    fallbacks=("adamw_bnb_8bit", "adamw"),
)

ROWS = (
    _row(
        4,
        AdamW4bitOptions,
        16 * 4,
        "Memory Efficient Optimizers with 4-bit States, https://arxiv.org/abs/2309.01507",
        fallbacks=("adamw_torch_8bit", "adamw_bnb_8bit", "adamw"),
    ),
    _ADAMW_8BIT,
    dataclasses.replace(
        _ADAMW_8BIT,
        name="adamw_torch_fp8",
        target="lightning_optim.optimizers.adapters._torchao:AdamWFp8",
        wraps="torchao.optim.AdamWFp8",
        summary="AdamW, states in 8-bit floats, compiled",
        source="torchao.optim.AdamWFp8",
        options=AdamWFp8Options,
        state=StateLayout(
            buffers=(Buffer("exp_avg"), Buffer("exp_avg_sq")),
            scalar_bytes=4,
            quantization=Quantization(8, "block_size", 4096, whole_blocks=True),
        ),
        state_format="torchao.AdamW-fp8/1",
        devices=frozenset({"cpu", "cuda"}),
        in_place=frozenset({"cpu", "cuda"}),
        fallbacks=("adamw_torch_8bit", "adamw_bnb_8bit", "adamw"),
        note=f"on CUDA it needs compute capability 8.9 (Ada, Hopper), which is not tested; {_NOTE}",
    ),
)
