"""Optimizers compared on the user's module and data: what ``lightning-optim bench`` does.

``_run.py`` says in what order what is measured: every optimizer tries as many learning rates, is judged at the end of
its schedule, and trains at its best rate with several seeds. Each fit is the Trainer's own. What is finished is in a
file (``_records.py``), from which ``_report.py`` computes everything that is shown.
"""

from __future__ import annotations

from pathlib import Path

from lightning_optim.bench._candidates import Candidate, chosen
from lightning_optim.bench._gpt import GPT, PythonTopics
from lightning_optim.bench._picture import draw, new_figure
from lightning_optim.bench._report import summarize
from lightning_optim.bench._run import TRIALS, Comparison, Measurements
from lightning_optim.bench._trial import Judgement, quiet, train
from lightning_optim.bench._workload import Parts, Workload, demo
from lightning_optim.choose import CLAIMS, RANKED, Claim

__all__ = [
    "CLAIMS",
    "GPT",
    "RANKED",
    "TRIALS",
    "Candidate",
    "Claim",
    "Comparison",
    "Judgement",
    "Measurements",
    "Parts",
    "PythonTopics",
    "Workload",
    "chosen",
    "configured",
    "demo",
    "draw",
    "new_figure",
    "quiet",
    "summarize",
    "train",
]


def configured(config: Path | None, model: str | None, data: str | None) -> Workload:
    """Returns what a configuration file or the classes named describe; it needs jsonargparse, an optional package.

    Args:
        config: A file of LightningCLI's or OptimCLI's.
        model: The LightningModule's class, if the file does not name it.
        data: The LightningDataModule's class, if the file does not name it and the module has no data of its own.

    Raises:
        InvalidOption: If the file does not fit the classes, or asks for what a trial cannot do.
        MissingDependency: If jsonargparse is not installed.
    """
    from lightning_optim.bench._configured import configured as from_config

    return from_config(config, model, data)
