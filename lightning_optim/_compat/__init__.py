"""What torch, Lightning and other packages do not promise: private names, and what depends on their version.

One door per package, each importable where that package is; only ``trainer/`` takes from ``lightning``. When a new
version moves something, ``tests/compat`` fails and names the function to mend here. Public names are used in place, and
nothing else of ours is imported.
"""

from __future__ import annotations

from lightning_optim._compat import kernels

__all__ = ["kernels"]
