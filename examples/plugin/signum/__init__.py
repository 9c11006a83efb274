"""The row of Signum: what ``lightning-optim list``, ``info`` and ``memory`` tell, and what its options may be."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_optim import Buffer, OptimizerSpec, Options, Range, StateLayout, option


@dataclass(frozen=True)
class SignumOptions(Options):
    """Options of Signum."""

    momentum: float = option(0.9, "decay rate of the averaged gradient", Range(low=0.0, high=1.0, high_open=True))


SIGNUM = OptimizerSpec(
    name="signum",
    target="signum.optimizer:Signum",
    summary="the sign of the averaged gradient",
    source="signSGD: Compressed Optimisation for Non-Convex Problems, https://arxiv.org/abs/1802.04434",
    options=SignumOptions,
    default_lr=1e-4,
    default_weight_decay=0.0,
    state=StateLayout(buffers=(Buffer("momentum_buffer"),)),
)
