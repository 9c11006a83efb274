"""The strategies and the precision plugin for a Trainer of the package ``pytorch_lightning``, under the same names.

That package's ``Trainer(strategy="layerwise")`` and ``Trainer(strategy=lightning_optim.LayerwiseStrategy(...))`` do not
need them. They are for subclasses, and for plugins, which that Trainer only accepts from its own package.
"""

from __future__ import annotations

import importlib

from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer import strategies

_NAMES = frozenset(ours.__name__ for ours in (*strategies.MOVABLE, strategies.FusedMixedPrecision))


def __getattr__(name: str) -> type:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(packages.OTHER)
    derived: type = packages.derived(getattr(strategies, name))
    return derived
