"""As ``timm.optim``: names in a registry, which change defaults of classes, and some classes without a name there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import SGD, Optimizer


class Lamb(Optimizer):
    """Couples its parameters, as timm's does: gradients are clipped by the norm over all, unless that is left out."""

    def __init__(self, params, lr=1e-3, weight_decay=0.01, max_grad_norm: float | None = 1.0, trust_clip=False):
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm, "trust_clip": trust_clip}
        )

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        limit = self.param_groups[0]["max_grad_norm"]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm() if gradients else torch.ones(())
        factor = 1.0 if limit is None else (limit / norm).clamp(max=1.0)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    velocity = state.setdefault("exp_avg", torch.zeros_like(p))
                    velocity.lerp_(p.grad * factor, 0.1)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(velocity, alpha=group["lr"])
        return loss


class Kron(Lamb):
    """A class that the registry does not name."""


@dataclass(frozen=True)
class OptimInfo:
    name: str
    opt_class: type | str
    description: str = ""
    has_momentum: bool = False
    defaults: dict[str, Any] | None = None


_REGISTRY = {
    info.name: info
    for info in (
        OptimInfo("fusedlamb", "apex.optimizers.FusedLAMB"),
        OptimInfo("lamb", Lamb),
        OptimInfo("lambc", Lamb, defaults={"trust_clip": True}),
        OptimInfo("sgd", SGD, has_momentum=True, defaults={"nesterov": True}),
    )
}


def list_optimizers() -> list[str]:
    return sorted(_REGISTRY)


def get_optimizer_info(name: str) -> OptimInfo:
    return _REGISTRY[name]
