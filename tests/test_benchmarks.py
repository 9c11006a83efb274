"""The benchmarks run; their numbers mean something only on a quiet machine and are not looked at here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_layerwise_benchmark_runs() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "layerwise.py"
    done = subprocess.run(
        [sys.executable, str(script), "--quick"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for part in ("layerwise default foreach", "per parameter in hooks", "live gradients are within", "torch 2."):
        assert part in done.stdout
