"""Has backward make a graph of the gradients, for optimizers that differentiate them once more."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_optim.trainer.callbacks._attached import Attached


class GraphCallback(Attached):
    """Calls the module's ``backward`` with ``create_graph=True`` while fit runs.

    The gradients of all batches of a step keep their graphs until Lightning sets them to ``None`` before the next one.
    """

    def __init__(self) -> None:
        self._module: LightningModule | None = None

    @classmethod
    def attach(cls, trainer: Trainer) -> None:
        """Lets the fit that is being set up make graphs."""
        cls._of(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._module = pl_module
        with warnings.catch_warnings():
            # torch advises once in a process against what is taken care of here.
            warnings.simplefilter("ignore")
            torch.ones(1, requires_grad=True).square().backward(create_graph=True)  # type: ignore[no-untyped-call]
        pl_module.backward = partial(type(pl_module).backward, pl_module, create_graph=True)  # type: ignore[method-assign]

    def _detach(self, trainer: Trainer) -> None:
        if self._module is not None:
            vars(self._module).pop("backward", None)
            for parameter in self._module.parameters():
                if parameter.grad is not None:
                    # Parameter, gradient and graph hold each other.
                    parameter.grad = parameter.grad.detach()
            self._module = None
        super()._detach(trainer)
