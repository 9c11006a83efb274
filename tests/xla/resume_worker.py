"""Resumes checkpoints in a process of its own: ``python -m tests.xla.resume_worker DIR``; see test_training.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.models import LitTokens, loader


def main(directory: Path) -> None:
    """Trains on from every ``STRATEGY@PRECISION@...ckpt`` to step 20; the outcomes are checkpoints ``.out``."""
    from tests.xla.runs import xla_trainer

    torch.set_num_threads(1)
    for path in sorted(directory.glob("*.ckpt")):
        strategy, precision, *_ = path.stem.split("@")
        module = LitTokens(**torch.load(path, weights_only=True)["hyper_parameters"])
        run = xla_trainer(strategy, max_steps=20, precision=precision)
        run.fit(module, loader(), ckpt_path=path, weights_only=True)
        assert run.global_step == 20
        run.save_checkpoint(path.with_suffix(".out"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
