"""``lightning-optim consolidate FOLDER FILE``: one file from a distributed checkpoint that Lightning wrote."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_optim.command._machine import CommandError, Facts, write_file
from lightning_optim.errors import UnreadableCheckpoint
from lightning_optim.files import DISTRIBUTED, METADATA, consolidated, missing, save


def collect(arguments: argparse.Namespace) -> Facts:
    """Writes the file.

    Raises:
        CommandError: If the folder is no distributed checkpoint or not whole, or the file exists or cannot be written.
    """
    folder, output = Path(arguments.folder), Path(arguments.output)
    gone = missing(folder)
    if gone is not None:
        raise CommandError(str(gone))
    if not any((folder / name).exists() for name in (DISTRIBUTED, METADATA)):
        raise CommandError(
            f"{folder} is no distributed checkpoint: there is no {DISTRIBUTED} in it. Name the folder that "
            "Trainer.save_checkpoint or ModelCheckpoint wrote under ModelParallelStrategy or layerwise_fsdp2."
        )
    try:
        checkpoint = consolidated(folder)
    except UnreadableCheckpoint as error:
        raise CommandError(str(error)) from error
    # A file that is there may be somebody's work.
    write_file(output, lambda beside: save(checkpoint, beside), new=True)
    return {
        "folder": str(folder),
        "output": str(output),
        "weights": len(checkpoint["state_dict"]),
        "optimizers": len(checkpoint["optimizer_states"]),
    }


def as_text(report: Facts) -> str:
    """Returns what was written."""
    return f"Wrote {report['output']}: {report['weights']} weights, the states of {report['optimizers']} optimizer(s)."
