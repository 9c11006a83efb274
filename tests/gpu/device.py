"""Where the tests of this folder run.

``make test-gpu`` sets the variable to ``cuda``, and then a machine without a GPU is an error. With ``cpu`` the tests
are rehearsed: all but the few that call CUDA itself. Where it is not set each file is skipped.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

VARIABLE = "LIGHTNING_OPTIM_GPU_TESTS_DEVICE"

if VARIABLE not in os.environ:
    pytest.skip("needs a CUDA GPU: make test-gpu", allow_module_level=True)
# Asked for before CUDA starts: without it cuBLAS does not add in the same order every time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE = torch.device(os.environ[VARIABLE])
if DEVICE.type == "cuda" and not torch.cuda.is_available():
    raise RuntimeError(f"{VARIABLE}={DEVICE} and torch {torch.__version__} sees no CUDA GPU")

#: For the Trainer. An operation that knows no fixed order warns; the tests tell whether it matters.
FLAGS: dict[str, Any] = {"accelerator": DEVICE.type, "devices": 1, "deterministic": "warn"}

cuda_only = pytest.mark.skipif(DEVICE.type != "cuda", reason="calls CUDA itself, and this is the rehearsal on a CPU")


def fp16() -> dict[str, Any]:
    """Flags for float16 autocast with a GradScaler; a Trainer on a CPU would make ``"16-mixed"`` ``"bf16-mixed"``."""
    if DEVICE.type == "cpu":
        return {"plugins": [MixedPrecision("16-mixed", "cpu")]}
    return {"precision": "16-mixed"}
