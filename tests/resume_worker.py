"""Resumes checkpoints in a process of its own: ``python -m tests.resume_worker DIR ACCELERATOR [CASE ...]``.

See ``test_resume.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.cases import case_of
from tests.models import LitTokens, loader, trainer


def main(directory: Path, accelerator: str, *moving: str) -> None:
    """Trains on from every ``NAME@PRECISION.ckpt`` to step 20; those of cases that are ``moving`` in both forms.

    The outcomes are stored as ``NAME@PRECISION@RESUMED.out``, where RESUMED is the name that it was resumed with.
    """
    # As in the tests: several threads round sums differently.
    torch.set_num_threads(1)
    deterministic = None if accelerator == "cpu" else "warn"
    for path in sorted(directory.glob("*.ckpt")):
        precision = path.stem.rpartition("@")[2]
        hyperparameters = torch.load(path, weights_only=True, map_location="cpu")["hyper_parameters"]
        case = case_of(hyperparameters["optim"])
        for name in case.forms if case.name in moving else (hyperparameters["optim"],):
            model = LitTokens(**{**hyperparameters, "optim": name})
            run = trainer(
                max_steps=20, precision=precision, accelerator=accelerator, devices=1, deterministic=deterministic
            )
            run.fit(model, loader(), loader(batches=2, seed=1), ckpt_path=path, weights_only=True)
            assert run.global_step == 20
            outcome = {"weights": model.state_dict(), "optimizer": run.optimizers[0].state_dict()}
            torch.save(outcome, path.with_name(f"{path.stem}@{name}.out"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
