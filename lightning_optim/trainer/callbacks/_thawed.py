"""Groups that a finetuning callback adds during training get the grouping policy of the existing ones."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.build import ResolvedOptimizer
from lightning_optim.groups import named_parameters
from lightning_optim.stepping import MEMBERS
from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer.callbacks._attached import Attached

# Key of a group for the number of the call that added it; groups of one call have one learning rate.
_CALL = "added_in_call"


class KeepsPolicy(Attached):
    """Divides the parameters that a finetuning callback adds in the same way as the optimizer's others.

    ``BaseFinetuning`` adds all parameters that it unfreezes as one group, with the optimizer's defaults: biases and
    norms would decay, embeddings would be quantized, matrices not projected. And such callbacks set the learning rate
    of the last group only: here the others from the same call follow it.
    """

    def __init__(self, module: LightningModule, resolved: ResolvedOptimizer) -> None:
        self._module = module
        self._resolved = resolved

    @classmethod
    def attach(cls, trainer: Trainer, module: LightningModule, resolved: ResolvedOptimizer) -> None:
        """Attaches the callback after the finetuning callbacks; does nothing if there are none."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, packages.kin(BaseFinetuning)) for callback in callbacks):
            callback = cls(module, resolved)
            vars(resolved.optimizer)["add_param_group"] = callback._add
            callbacks.append(callback)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        calls: dict[int, list[dict[str, Any]]] = {}
        for group in self._optimizer.param_groups:
            if _CALL in group:
                calls.setdefault(group[_CALL], []).append(group)
        for groups in calls.values():
            for group in groups:
                group["lr"] = groups[-1]["lr"]

    @property
    def _optimizer(self) -> Optimizer:
        return self._resolved.optimizer

    def _detach(self, trainer: Trainer) -> None:
        vars(self._optimizer).pop("add_param_group", None)
        super()._detach(trainer)

    def _add(self, param_group: dict[str, Any]) -> None:
        """Replaces the optimizer's ``add_param_group``."""
        add = type(self._optimizer).add_param_group
        if set(param_group) != {"params", "lr"}:
            # A caller that sets more has its own policy.
            add(self._optimizer, param_group)
            return
        given = param_group["params"]
        added = {id(parameter) for parameter in ([given] if isinstance(given, Tensor) else list(given))}
        names = {id(p.parameter): p.name for p in named_parameters(self._module)}
        before = self._optimizer.param_groups
        call = 1 + max((group.get(_CALL, 0) for group in before), default=0)
        # The decaying group comes last: that is the one the callbacks go on to change.
        for group in reversed(self._resolved.regroup(self._module, float(param_group["lr"]))):
            members = [parameter for parameter in group["params"] if id(parameter) in added]
            if members:
                follows = {_CALL: call} if group["lr"] == param_group["lr"] else {}
                named = {"name": f"added_{call}/{group['name']}", MEMBERS: [names[id(p)] for p in members]}
                add(self._optimizer, {**group, **follows, **named, "params": members})
