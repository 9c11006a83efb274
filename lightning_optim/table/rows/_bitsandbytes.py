"""Rows whose class is bitsandbytes' (https://huggingface.co/docs/bitsandbytes/main/en/optimizers)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

from lightning_optim.errors import InvalidOption
from lightning_optim.table._availability import Requirement
from lightning_optim.table._options import AT_LEAST_ONE, NON_NEGATIVE, OPEN_UNIT, UNIT, Options, option
from lightning_optim.table._spec import Buffer, OptimizerSpec, Quantization, StateLayout
from lightning_optim.table.rows._torch_optim import AdamOptions

REQUIREMENTS = (
    Requirement(
        "bitsandbytes",
        "bitsandbytes",
        ">=0.50",
        broken="<0.41.1",
        broken_reason="has a known bug in its 8-bit optimizers (they diverge)",
    ),
)
DEVICES = frozenset({"cpu", "cuda", "xpu"})
_PAGED_ON = frozenset({"cuda"})
QUANTIZATION = Quantization(bits=8, block_size=256, min_size="min_8bit_size", tables=("qmap1", "qmap2"))


@dataclass(frozen=True)
class AdamWOptions(AdamOptions):
    """Options of ``bitsandbytes.optim.AdamW`` with 32-bit states."""


@dataclass(frozen=True)
class LionOptions(Options):
    """Options of ``bitsandbytes.optim.Lion`` with 32-bit states."""

    betas: tuple[float, float] = option((0.9, 0.99), "interpolation and decay rate of the momentum", UNIT)


@dataclass(frozen=True)
class AdEMAMixOptions(Options):
    """Options of ``bitsandbytes.optim.AdEMAMix`` with 32-bit states."""

    betas: tuple[float, float, float] = option(
        (0.9, 0.999, 0.9999), "decay rates of the fast first, the second and the slow first moment", UNIT
    )
    alpha: float = option(5.0, "weight of the slow moment", NON_NEGATIVE)
    t_alpha: int | None = option(None, "steps over which alpha rises from 0; None: at once", AT_LEAST_ONE)
    t_beta3: int | None = option(None, "steps over which beta3 rises from beta1; None: at once", AT_LEAST_ONE)
    eps: float = option(1e-8, "added to the denominator", NON_NEGATIVE)

    def check(self) -> None:
        if self.t_beta3 is not None and 0.0 in (self.betas[0], self.betas[2]):
            raise InvalidOption(
                "t_beta3 interpolates the logarithms of beta1 and beta3: neither can be 0", code="LO208"
            )


@dataclass(frozen=True)
class RMSpropOptions(Options):
    """Options of ``bitsandbytes.optim.RMSprop`` with 32-bit states."""

    alpha: float = option(0.99, "decay rate of the mean of squares", OPEN_UNIT, scope="constructor")
    eps: float = option(1e-8, "added to the denominator", NON_NEGATIVE)
    momentum: float = option(0.0, "not implemented by bitsandbytes' kernels: 0 only", scope="constructor")
    centered: bool = option(False, "not implemented by bitsandbytes: False only", scope="constructor")

    def check(self) -> None:
        if self.momentum != 0.0:
            raise InvalidOption(
                f"momentum={self.momentum:g} would be ignored by bitsandbytes' RMSprop; use optim='rmsprop' for it",
                code="LO208",
            )
        if self.centered:
            raise InvalidOption(
                "centered=True is not implemented by bitsandbytes' RMSprop; use optim='rmsprop'", code="LO208"
            )


@dataclass(frozen=True)
class _Quantized(Options):
    """Options added by the 8-bit form of every bitsandbytes optimizer."""

    min_8bit_size: int = option(
        4096, "parameters with fewer elements keep 32-bit states", NON_NEGATIVE, scope="constructor"
    )
    quantize_embeddings: bool = option(False, "store embeddings' states in 8 bits, too", scope="policy")


@dataclass(frozen=True)
class AdamW8bitOptions(_Quantized, AdamWOptions):
    """Options of ``bitsandbytes.optim.AdamW`` with 8-bit states."""


@dataclass(frozen=True)
class Lion8bitOptions(_Quantized, LionOptions):
    """Options of ``bitsandbytes.optim.Lion`` with 8-bit states."""


@dataclass(frozen=True)
class AdEMAMix8bitOptions(_Quantized, AdEMAMixOptions):
    """Options of ``bitsandbytes.optim.AdEMAMix`` with 8-bit states."""


@dataclass(frozen=True)
class RMSprop8bitOptions(_Quantized, RMSpropOptions):
    """Options of ``bitsandbytes.optim.RMSprop`` with 8-bit states."""


@dataclass(frozen=True)
class _Algorithm:
    """What the rows of a bitsandbytes class share."""

    class_name: str
    paper: str
    options: type[Options]
    options_8bit: type[Options]
    default_lr: float
    default_weight_decay: float
    buffers: tuple[Buffer, ...]
    pageable: bool = True


_TWO_MOMENTS = (Buffer("state1", float32=True), Buffer("state2", float32=True))

_ADAMW = _Algorithm(
    "AdamW",
    "8-bit Optimizers via Block-wise Quantization, https://arxiv.org/abs/2110.02861",
    AdamWOptions,
    AdamW8bitOptions,
    default_lr=1e-3,
    default_weight_decay=1e-2,
    buffers=_TWO_MOMENTS,
)
_LION = _Algorithm(
    "Lion",
    "Symbolic Discovery of Optimization Algorithms, https://arxiv.org/abs/2302.06675",
    LionOptions,
    Lion8bitOptions,
    default_lr=1e-4,
    default_weight_decay=0.0,
    buffers=_TWO_MOMENTS[:1],
)
_ADEMAMIX = _Algorithm(
    "AdEMAMix",
    "The AdEMAMix Optimizer: Better, Faster, Older, https://arxiv.org/abs/2409.03137",
    AdEMAMixOptions,
    AdEMAMix8bitOptions,
    default_lr=1e-3,
    default_weight_decay=1e-2,
    buffers=(Buffer("state1", float32=True, copies=2), Buffer("state2", float32=True)),
)
_RMSPROP = _Algorithm(
    "RMSprop",
    "Hinton, https://www.cs.toronto.edu/~hinton/coursera/lecture6/lec6.pdf",
    RMSpropOptions,
    RMSprop8bitOptions,
    default_lr=1e-2,
    default_weight_decay=0.0,
    buffers=_TWO_MOMENTS[:1],
    pageable=False,
)


def _row(
    name: str,
    algorithm: _Algorithm,
    bits: int,
    paged: bool = False,
    aliases: tuple[str, ...] = (),
    fallbacks: tuple[str, ...] = (),
) -> OptimizerSpec:
    fixed: dict[str, object] = {"optim_bits": bits}
    if algorithm.pageable:
        fixed["is_paged"] = paged
    states = f"{bits}-bit {'block-wise quantized ' if bits == 8 else ''}states"
    return OptimizerSpec(
        name=name,
        target=f"lightning_optim.optimizers.adapters._bitsandbytes:{algorithm.class_name}",
        wraps=f"bitsandbytes.optim.{algorithm.class_name}",
        summary=f"{algorithm.class_name}, {states}{', paged to host memory under pressure' if paged else ''}",
        source=f"{algorithm.paper}; bitsandbytes.optim.{algorithm.class_name}",
        options=algorithm.options_8bit if bits == 8 else algorithm.options,
        default_lr=algorithm.default_lr,
        default_weight_decay=algorithm.default_weight_decay,
        requirements=REQUIREMENTS,
        extra="bitsandbytes",
        fixed=MappingProxyType(fixed),
        aliases=aliases,
        state=StateLayout(algorithm.buffers, quantization=QUANTIZATION if bits == 8 else None),
        # Paging changes where a state lies, not what it holds.
        state_format=f"bitsandbytes.{algorithm.class_name}-{bits}bit/1",
        devices=DEVICES,
        in_place=DEVICES,
        unsharded="bitsandbytes' kernels take whole tensors",
        half_weights=True,
        fallbacks=fallbacks,
        paged_on=_PAGED_ON if paged else None,
        note="without CUDA the states are ordinary, unpaged tensors" if paged else "",
    )


def _family(prefix: str, algorithm: _Algorithm, name_32bit: str) -> Iterator[OptimizerSpec]:
    yield _row(name_32bit, algorithm, 32)
    yield _row(f"{prefix}_8bit", algorithm, 8, fallbacks=(name_32bit,))
    yield _row(f"paged_{prefix}_32bit", algorithm, 32, paged=True, fallbacks=(name_32bit,))
    yield _row(f"paged_{prefix}_8bit", algorithm, 8, paged=True, fallbacks=(f"{prefix}_8bit", name_32bit))


ROWS = (
    _row("adamw_bnb_8bit", _ADAMW, 8, aliases=("adamw_8bit",), fallbacks=("adamw_torch_8bit", "adamw")),
    _row("paged_adamw_32bit", _ADAMW, 32, paged=True, fallbacks=("adamw",)),
    _row("paged_adamw_8bit", _ADAMW, 8, paged=True, fallbacks=("adamw_bnb_8bit", "adamw_torch_8bit", "adamw")),
    *_family("lion", _LION, "lion_32bit"),
    *_family("ademamix", _ADEMAMIX, "ademamix"),
    _row("rmsprop_bnb", _RMSPROP, 32, aliases=("rmsprop_bnb_32bit",), fallbacks=("rmsprop",)),
    _row("rmsprop_bnb_8bit", _RMSPROP, 8, fallbacks=("rmsprop_bnb", "rmsprop")),
)
