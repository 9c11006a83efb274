"""The tests of this folder train on XLA devices: PJRT on the host's CPU. ``make test-xla`` runs them."""

from __future__ import annotations

import os

# Before lightning_optim and torch_xla are imported: the one looks whether it was chosen, the other chooses by itself.
os.environ["PJRT_DEVICE"] = "CPU"

import lightning_optim  # noqa: F401

if os.environ.get("LIGHTNING_OPTIM_XLA_TESTS"):
    # They must not pass by being skipped.
    import torch_xla  # noqa: F401
