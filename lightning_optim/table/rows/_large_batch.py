"""Rows of optimizers for large batches, whose steps follow the norm of each layer: LAMB and LARS, our own."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_optim.errors import InvalidOption
from lightning_optim.optimizers._trust_ratio import Adapt
from lightning_optim.table._options import NON_NEGATIVE, POSITIVE, UNIT, Options, option
from lightning_optim.table._spec import Buffer, OptimizerSpec, StateLayout

_ADAPT_HELP = "which parameters get a trust ratio: 'matrices' are those with two dimensions or more"


@dataclass(frozen=True)
class LambOptions(Options):
    """Options of :class:`~lightning_optim.optimizers.Lamb`."""

    betas: tuple[float, float] = option((0.9, 0.999), "decay rates of the first and second moment", UNIT)
    eps: float = option(1e-6, "added to the denominator", NON_NEGATIVE)
    adapt: Adapt = option("matrices", _ADAPT_HELP)
    trust_clip: bool = option(False, "let the trust ratio be at most 1 (LAMBC)")


@dataclass(frozen=True)
class LarsOptions(Options):
    """Options of :class:`~lightning_optim.optimizers.Lars`."""

    momentum: float = option(0.9, "decay rate of the velocity", UNIT)
    trust_coeff: float = option(1e-3, "a layer moves by lr times this fraction of its norm", POSITIVE)
    nesterov: bool = option(False, "Nesterov momentum")
    adapt: Adapt = option("matrices", _ADAPT_HELP)

    def check(self) -> None:
        if self.nesterov and not self.momentum:
            raise InvalidOption("nesterov=True needs momentum > 0", code="LO208")


ROWS = (
    OptimizerSpec(
        name="lamb",
        target="lightning_optim.optimizers:Lamb",
        summary="AdamW whose every layer moves by a fraction of its own norm, for large batches",
        source="Large Batch Optimization for Deep Learning, https://arxiv.org/abs/1904.00962; "
        "lightning_optim.optimizers.Lamb",
        options=LambOptions,
        state_format="Lamb/1",
        sharded=True,
        default_lr=1e-3,
        default_weight_decay=1e-2,
        state=StateLayout(buffers=(Buffer("exp_avg", float32=True), Buffer("exp_avg_sq", float32=True))),
        half_weights=True,
        note="recipes clip by the norm over all gradients first: Trainer(gradient_clip_val=1.0)",
    ),
    OptimizerSpec(
        name="lars",
        target="lightning_optim.optimizers:Lars",
        summary="momentum whose every layer moves by a fraction of its own norm, for large batches",
        source="Large Batch Training of Convolutional Networks, https://arxiv.org/abs/1708.03888; "
        "lightning_optim.optimizers.Lars",
        options=LarsOptions,
        state_format="Lars/1",
        sharded=True,
        default_lr=1.0,
        default_weight_decay=0.0,
        state=StateLayout(buffers=(Buffer("momentum_buffer", float32=True, when=lambda o: o.momentum > 0),)),
        half_weights=True,
    ),
)
