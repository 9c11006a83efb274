"""``python -m lightning_optim``: the ``lightning-optim`` command."""

from __future__ import annotations

import sys

from lightning_optim.command import main

if __name__ == "__main__":
    sys.exit(main())
