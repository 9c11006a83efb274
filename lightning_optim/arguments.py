"""The arguments of :class:`~lightning_optim.OptimMixin` as a type, for modules that hand them on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from lightning_optim.target_modules import TargetModules


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
