"""The engine that steps buckets of parameters during backward and frees their gradients. Pure torch.

README.md in this folder explains it. Public: :class:`Layerwise`, :class:`Clipping` and :class:`Replicas`, for loops
without Lightning; its drivers under Lightning live in ``trainer/``.
"""

from __future__ import annotations

from lightning_optim.layerwise._engine import Layerwise
from lightning_optim.layerwise._passes import Observer
from lightning_optim.layerwise._probe import Probe, probe
from lightning_optim.layerwise._replicas import Replicas
from lightning_optim.layerwise._scaling import OuterScaler
from lightning_optim.layerwise._split_parts import Watches
from lightning_optim.stepping import Clipping

__all__ = ["Clipping", "Layerwise", "Observer", "OuterScaler", "Probe", "Replicas", "Watches", "probe"]
