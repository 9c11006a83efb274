"""Files that are whole: written beside and put in their place, read only if nothing is missing or changed.

Reading runs nothing of what a file holds.
"""

from __future__ import annotations

from lightning_optim.files._check import (
    DISTRIBUTED,
    METADATA,
    check_file,
    missing,
    no_checkpoint,
    raise_explained,
    refuse_folder,
)
from lightning_optim.files._shards import check_shards, consolidated
from lightning_optim.files._write import UNFINISHED, cannot_write, save, sync, written_whole, written_whole_folder

__all__ = [
    "DISTRIBUTED",
    "METADATA",
    "UNFINISHED",
    "cannot_write",
    "check_file",
    "check_shards",
    "consolidated",
    "missing",
    "no_checkpoint",
    "raise_explained",
    "refuse_folder",
    "save",
    "sync",
    "written_whole",
    "written_whole_folder",
]
