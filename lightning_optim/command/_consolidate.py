"""``lightning-optim consolidate FOLDER FILE``: one file from a distributed checkpoint that Lightning wrote."""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch

from lightning_optim.command._machine import CommandError, Facts

# What ModelParallelStrategy keeps besides weights and optimizers.
_REST = "meta.pt"


def collect(arguments: argparse.Namespace) -> Facts:
    """Writes the file.

    Raises:
        CommandError: If the folder is no distributed checkpoint, or the file exists.
    """
    folder, output = Path(arguments.folder), Path(arguments.output)
    if not (folder / _REST).is_file():
        raise CommandError(
            f"{folder} is no distributed checkpoint: there is no {_REST} in it. Name the folder that "
            "Trainer.save_checkpoint or ModelCheckpoint wrote under ModelParallelStrategy or layerwise_fsdp2."
        )
    checkpoint = consolidated(folder)
    try:
        # A file that is there may be somebody's work.
        with output.open("xb") as file:
            torch.save(checkpoint, file)
    except OSError as error:
        why = "it exists; name another file" if isinstance(error, FileExistsError) else error.strerror
        raise CommandError(f"cannot write {output}: {why}") from error
    return {
        "folder": str(folder),
        "output": str(output),
        "weights": len(checkpoint["state_dict"]),
        "optimizers": len(checkpoint["optimizer_states"]),
    }


def as_text(report: Facts) -> str:
    """Returns what was written."""
    return f"Wrote {report['output']}: {report['weights']} weights, the states of {report['optimizers']} optimizer(s)."


def consolidated(folder: Path) -> dict[str, Any]:
    """Returns a distributed checkpoint as a Trainer on one device would have written it.

    Its states are numbered by the names of their parameters. Torch goes by their order in the groups, and Lightning by
    the names where it shards again.
    """
    # Importing it is slow.
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        file = Path(scratch) / "tensors.pt"
        dcp_to_torch_save(folder, file)
        tensors = torch.load(file, weights_only=True)
    names = itertools.takewhile(tensors.__contains__, (f"optimizer_{number}" for number in itertools.count()))
    states = [tensors[name] for name in names]
    rest: dict[str, Any] = torch.load(folder / _REST, map_location="cpu", weights_only=True)
    return {**rest, "state_dict": tensors["state_dict"], "optimizer_states": [_with_every_key(each) for each in states]}


def _with_every_key(state: dict[str, Any]) -> dict[str, Any]:
    """Returns an optimizer's state dict; without any state, torch has stored no ``"state"``."""
    return {**state, "state": state.get("state", {})}
