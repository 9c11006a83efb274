"""Leaves gradients that a part of an optimizer clips by itself out of the Trainer's clipping."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch.optim import Optimizer

from lightning_optim.errors import IncompatibleTrainer
from lightning_optim.stepping import own_clips
from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer.callbacks._attached import Attached


class OwnClips(Attached):
    """Has ``gradient_clip_val`` clip what no part clips by itself, by value and by norm, while fit runs."""

    @classmethod
    def attach(cls, trainer: Trainer) -> None:
        """Lets the fit that is being set up leave such parts out.

        Raises:
            IncompatibleTrainer: If the strategy keeps gradients to itself.
        """
        if isinstance(trainer.strategy, packages.kin(DeepSpeedStrategy, FSDPStrategy)):
            raise IncompatibleTrainer(
                f"clip in param_groups under {type(trainer.strategy).__name__}, which keeps the gradients to itself "
                "and clips them all together. Use another strategy, such as 'ddp', or leave clip out and set "
                "Trainer(gradient_clip_val=...).",
                code="LO531",
            )
        cls._of(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        precision = trainer.precision_plugin
        clipped = precision.main_params

        # Lightning's precision plugins and FSDP2's strategy ask for what to clip by this method, and for nothing else.
        def main_params(optimizer: Optimizer) -> Iterator[Any]:
            own = {id(parameter) for _, parameters in own_clips(optimizer) for parameter in parameters}
            return (parameter for parameter in clipped(optimizer) if id(parameter) not in own)

        precision.main_params = main_params  # type: ignore[method-assign]

    def _detach(self, trainer: Trainer) -> None:
        vars(trainer.precision_plugin).pop("main_params", None)
        super()._detach(trainer)
