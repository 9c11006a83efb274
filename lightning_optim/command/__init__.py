"""The ``lightning-optim`` command: what there is, what it does, whether it can run here.

One file per subcommand. Each collects a frozen dataclass and renders that: as text for humans, field by field as JSON
for scripts. No optional package is imported; whether one can be used is read from its metadata.
"""

from __future__ import annotations

from lightning_optim.command._entry import main

__all__ = ["main"]
