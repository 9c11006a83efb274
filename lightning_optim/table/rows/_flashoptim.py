"""Rows whose class is flashoptim's (https://github.com/databricks/flashoptim)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from lightning_optim.table._availability import Requirement
from lightning_optim.table._options import NON_NEGATIVE, UNIT, Options, option
from lightning_optim.table._spec import Buffer, OptimizerSpec, StateLayout

REQUIREMENTS = (Requirement("flashoptim", "flashoptim", ">=0.1.4"),)
_PAPER = "FlashOptim: Optimizers for Memory-Efficient Training, https://arxiv.org/abs/2602.23349"
_NOTE = (
    "not run on a GPU yet: tested over a stand-in; float32 weights need no correction, so there "
    "master_weight_bits does nothing; not for channels_last or transposed weights"
)
#: Elements that share a scale.
_BLOCK = 32


@dataclass(frozen=True)
class _FlashOptions(Options):
    """Options of both classes."""

    bound_to_state: ClassVar[frozenset[str]] = frozenset({"master_weight_bits"})

    master_weight_bits: Literal[24, 32] | None = option(
        24,
        "bits of bfloat16 and float16 weights with the correction kept beside them; None: no correction",
        scope="constructor",
    )


@dataclass(frozen=True)
class FlashAdamWOptions(_FlashOptions):
    """Options of ``flashoptim.FlashAdamW``."""

    betas: tuple[float, float] = option((0.9, 0.999), "decay rates of the first and second moment", UNIT)
    eps: float = option(1e-8, "added to the denominator", NON_NEGATIVE)


@dataclass(frozen=True)
class FlashLionOptions(_FlashOptions):
    """Options of ``flashoptim.FlashLion``."""

    betas: tuple[float, float] = option((0.9, 0.99), "interpolation and decay rate of the momentum", UNIT)


def _scales(shape: tuple[int, ...], options: Options) -> int:
    return -(-math.prod(shape) // _BLOCK)


def _moment(name: str) -> tuple[Buffer, Buffer]:
    return (
        Buffer(f"{name}::quantized", element_size=lambda options: 1),
        # In float16, two bytes for each block.
        Buffer(f"{name}::scales", elements=_scales, element_size=lambda options: 2),
    )


_CORRECTION = Buffer(
    "error_bits",
    when=lambda options: options.master_weight_bits is not None,
    low_precision_only=True,
    element_size=lambda options: options.master_weight_bits // 8 - 2,
)


def _row(
    name: str,
    class_name: str,
    options: type[Options],
    decay: float,
    state: StateLayout,
    fallbacks: tuple[str, ...] = (),
) -> OptimizerSpec:
    return OptimizerSpec(
        name=name,
        target=f"lightning_optim.optimizers.adapters._flashoptim:{class_name}",
        wraps=f"flashoptim.{class_name}",
        summary=f"{class_name.removeprefix('Flash')}, 8-bit states, 24-bit weights in bfloat16 models",
        source=f"{_PAPER}; flashoptim.{class_name}",
        options=options,
        default_lr=1e-3,
        default_weight_decay=decay,
        requirements=REQUIREMENTS,
        extra="flashoptim",
        state=state,
        state_format=f"flashoptim.{class_name}/1",
        devices=frozenset({"cuda"}),
        in_place=frozenset({"cuda"}),
        half_weights=True,
        fallbacks=fallbacks,
        note=_NOTE,
    )


ROWS = (
    _row(
        "flash_adamw",
        "FlashAdamW",
        FlashAdamWOptions,
        1e-2,
        # The count of steps has eight bytes.
        StateLayout((*_moment("exp_avg"), *_moment("exp_avg_sq"), _CORRECTION), scalar_bytes=8),
        fallbacks=("adamw_bnb_8bit", "adamw_torch_8bit", "adamw"),
    ),
    _row(
        "flash_lion",
        "FlashLion",
        FlashLionOptions,
        0.0,
        StateLayout((*_moment("exp_avg"), _CORRECTION)),
    ),
)
