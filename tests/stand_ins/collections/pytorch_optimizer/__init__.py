"""As ``pytorch_optimizer``: lower-case names to classes by functions, among them one to be switched, and a wrapper."""

from __future__ import annotations

import torch
from torch.optim import NAdam, Optimizer


class SOAP(Optimizer):
    def __init__(self, params, lr=3e-3, betas=(0.95, 0.95), weight_decay=1e-2, precondition_frequency=10):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.precondition_frequency = precondition_frequency

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - group["betas"][0])
                    p.sub_(average.sign(), alpha=group["lr"])
        return loss


class Switched(SOAP):
    def train(self):
        """Switches to the weights to train."""

    def eval(self):
        """Switches to the weights to evaluate."""


class Lookahead(Optimizer):
    def __init__(self, optimizer, k=5):
        super().__init__(optimizer.param_groups, {"k": k})


_OPTIMIZERS = {kind.__name__.lower(): kind for kind in (SOAP, Switched, NAdam)}


def get_supported_optimizers() -> list[str]:
    return sorted(_OPTIMIZERS)


def load_optimizer(optimizer: str) -> type[Optimizer]:
    return _OPTIMIZERS[optimizer.lower()]
