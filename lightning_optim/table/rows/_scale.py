"""SCALE: matrices by normalized gradients with momentum in the output layer, vectors by another optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_optim.optimizers._scale import Outputs
from lightning_optim.table._options import POSITIVE, UNIT, Role, option
from lightning_optim.table._others import LeavesOthers
from lightning_optim.table._spec import Buffer, OptimizerSpec, StateLayout


@dataclass(frozen=True)
class ScaleOptions(LeavesOthers):
    """Options of :class:`~lightning_optim.optimizers.Scale`."""

    others: str = option("adamw", "identifier of the optimizer for vectors", scope="policy")
    others_lr: float | str | None = option(
        None, "its learning rate: a number, or a factor on lr such as '0.1x'; None: lr", scope="policy"
    )
    momentum: float = option(0.0, "decay rate of the gradients' average; 0 keeps none", UNIT)
    output_momentum: float = option(0.9, "the output layer's momentum", UNIT, scope="policy")
    eps: float = option(1e-8, "smallest root mean square to divide by", POSITIVE)
    outputs: Outputs = option("rows", "where a weight has its outputs; embeddings have them in columns")

    @property
    def scaled_like_adamw(self) -> bool:
        return True

    def for_role(self, role: Role) -> dict[str, Any]:
        return {"outputs": "columns"} if role == "embedding" else {"momentum": self.output_momentum}


ROWS = (
    OptimizerSpec(
        name="scale",
        target="lightning_optim.optimizers:Scale",
        summary="gradients normalized per output, with momentum in the output layer only, for matrices",
        source="A Minimalist Optimizer Design for LLM Pretraining, https://arxiv.org/abs/2506.16659; "
        "lightning_optim.optimizers.Scale",
        options=ScaleOptions,
        state_format="Scale/1",
        sharded=True,
        default_lr=1e-3,
        default_weight_decay=0.0,
        takes="matrices",
        half_weights=True,
        state=StateLayout(buffers=(Buffer("momentum_buffer", float32=True, when=lambda o: o.momentum > 0),)),
        note="vectors are stepped by optim_args others (adamw); the report says what was taken for the output layer, "
        "and param_groups={pattern: {'momentum': 0.9}} settles it",
    ),
)
