"""As ``heavyball``: only classes, whose defaults may be a mark."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

_USE_DEFAULT = object()


class SOAPBase(Optimizer):
    """Not handed out."""


class SOAP(SOAPBase):
    def __init__(self, params, lr=3e-3, weight_decay=0.01, compile_step=_USE_DEFAULT):
        assert compile_step is _USE_DEFAULT or isinstance(compile_step, bool)
        # Its defaults are the constructor's locals, the class among them, which its state dicts leave out.
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "__class__": type(self)})

    def state_dict(self):
        whole = super().state_dict()
        groups = [{key: value for key, value in each.items() if key != "__class__"} for each in whole["param_groups"]]
        return {**whole, "param_groups": groups}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])


__all__ = ["SOAP"]
