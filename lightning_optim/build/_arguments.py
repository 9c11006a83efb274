"""The arguments of a request: what a user may ask for, wherever it is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from lightning_optim.groups import TargetModules


class OptimArguments(TypedDict, total=False):
    """What ``**optim`` collects. Type checkers then find a misspelt name or a wrong type where a module is made.

    Example::

        class LitModel(OptimMixin, L.LightningModule):
            def __init__(self, width: int = 256, **optim: Unpack[OptimArguments]) -> None:
                super().__init__(**optim)

    :class:`~lightning_optim.OptimMixin` explains the arguments.
    """

    optim: str
    lr: float | None
    weight_decay: float | None
    optim_args: Mapping[str, Any] | str | None
    optim_target_modules: TargetModules
    param_groups: Mapping[str, Mapping[str, Any]] | None
    layer_decay: float | None
    layer_pattern: str | None
    lr_scheduler: str | None
    lr_scheduler_args: Mapping[str, Any] | str | None
    warmup_steps: int | float
    optim_fallback: bool
    override_on_resume: Sequence[str] | str | None


@dataclass(frozen=True)
class Arguments:
    """The same arguments with their defaults, not yet checked.

    Attributes:
        optim: Identifier, alias or dotted path.
        lr: Learning rate; ``None`` takes the row's default.
        weight_decay: Weight decay of the parameters that decay; ``None`` takes the row's default.
        optim_args: Options of the optimizer, a mapping or ``"name=value,..."``. ``weight_decay`` is understood here,
            too.
        optim_target_modules: Modules whose weights are projected, for optimizers that project: ``"all-linear"``, a
            regular expression over names, or a list of parts of names; ``None`` means ``"all-linear"``.
        param_groups: Hyperparameters by regular expression over parameter names; the first match wins.
        layer_decay: The learning rate is multiplied by this once per layer below the top.
        layer_pattern: Regular expression whose one group is a layer's number.
        lr_scheduler: Name of the learning-rate schedule; ``None`` for none, ``"module"`` for the one of the module's
            own ``configure_optimizers``.
        lr_scheduler_args: Options of the schedule.
        warmup_steps: Optimizer steps of warm-up, or a fraction of the training.
        optim_fallback: Whether the nearest identifier that can run here takes the place of one that cannot.
        override_on_resume: Names of what is asked for here and wins over a checkpoint: ``"lr"``, ``"weight_decay"``,
            options such as ``"betas"``, ``"lr_scheduler"``.
    """

    optim: str = "adamw_torch"
    lr: float | None = None
    weight_decay: float | None = None
    optim_args: Mapping[str, Any] | str | None = None
    optim_target_modules: TargetModules = None
    param_groups: Mapping[str, Mapping[str, Any]] | None = None
    layer_decay: float | None = None
    layer_pattern: str | None = None
    lr_scheduler: str | None = None
    lr_scheduler_args: Mapping[str, Any] | str | None = None
    warmup_steps: int | float = 0
    optim_fallback: bool = False
    override_on_resume: Sequence[str] | str | None = None
