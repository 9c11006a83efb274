"""Whether a file is a whole checkpoint. Torch reads changed bytes as if they were right, and may not say what it is."""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lightning_optim.errors import UnreadableCheckpoint
from lightning_optim.files._write import REPLACED, UNFINISHED

#: The file in the folder of a distributed checkpoint that Lightning writes last.
DISTRIBUTED = "meta.pt"
#: The one that torch writes last.
METADATA = ".metadata"
_OTHER = "Take another checkpoint"
_SHARDS = "*.distcp"
_PIECE = 2**20
#: What zipfile says of changed bytes, according to where they are.
BROKEN = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError),
    *(NotImplementedError, RuntimeError, UnicodeDecodeError, OverflowError),
)


def check_file(path: Any) -> None:
    """Raises :class:`UnreadableCheckpoint` unless a local file is a whole checkpoint, as far as that shows.

    Every byte is compared with the checksums that ``torch.save`` has written. Paths that lead elsewhere are not looked
    at.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.path.isfile(path):
        return
    path = Path(path)
    with path.open("rb") as file:
        begins = file.read(24)
    if not begins:
        raise unreadable(path, "it is empty: its writing was interrupted", code="LO802")
    if begins.startswith(b"PK"):
        _check_archive(path)
    elif not begins.startswith(b"\x80"):
        # What remains may be one of torch's files of old, or another pickle: torch runs neither.
        raise unreadable(path, f"it is no checkpoint: it begins with {begins!r}", code="LO804")


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            changed = wrong_checksum(archive)
    except BROKEN as error:
        size = path.stat().st_size
        raise unreadable(
            path,
            f"it is truncated, of its {size:,} bytes the last are missing or wrong: its writing was interrupted",
            code="LO802",
        ) from error
    if not any(name.endswith("data.pkl") for name in names):
        raise unreadable(
            path, f"it is no checkpoint, but an archive of {', '.join(names[:3]) or 'nothing'}", code="LO804"
        )
    if changed is not None:
        raise unreadable(path, f"its bytes have changed since it was written: the checksum of {changed!r} is wrong")


def wrong_checksum(archive: zipfile.ZipFile) -> str | None:
    """Returns the name of the first record whose bytes are not those that were written."""
    for record in archive.infolist():
        # torch.serialization.set_crc32_options(False) leaves all checksums at 0.
        if not record.CRC:
            continue
        try:
            with archive.open(record) as file:
                while file.read(_PIECE):
                    pass
        except BROKEN:
            return record.filename
    return None


def refuse_folder(path: Any) -> None:
    """Raises :class:`UnreadableCheckpoint` for a folder, where one file is to be read."""
    if not isinstance(path, (str, os.PathLike)) or not os.path.isdir(path):
        return
    path = Path(path)
    check_finished(path)
    if (path / DISTRIBUTED).is_file():
        raise unreadable(
            path,
            "it is a distributed checkpoint, and one file is needed here",
            f"Make one: lightning-optim consolidate {path} FILE",
            code="LO803",
        )
    raise unreadable(path, "it is a folder, and no checkpoint", code="LO803")


def check_finished(folder: Path) -> None:
    """Raises :class:`UnreadableCheckpoint` for a folder whose writing was interrupted."""
    shards = any(folder.glob(_SHARDS)) or (folder / METADATA).exists()
    if folder.name.endswith(UNFINISHED) or (shards and not (folder / DISTRIBUTED).is_file()):
        raise unreadable(folder, "it is not finished: its writing was interrupted", code="LO802")


def missing(path: Path) -> UnreadableCheckpoint | None:
    """Returns the error for a path at which there is nothing, if what was there stands beside."""
    # Not with_name: this folder, ".", has no name.
    replaced = path.parent / f"{path.name}{REPLACED}"
    if path.exists() or not replaced.exists():
        return None
    return unreadable(
        path,
        f"its replacement was interrupted; the checkpoint before it is {replaced}",
        f"Rename it to {path.name}",
        code="LO802",
    )


def raise_explained(path: Any, error: Exception) -> NoReturn:
    """Raises the error for a file that torch could not read; other errors as they are."""
    reader = isinstance(error, RuntimeError) and "PytorchStreamReader" in str(error)
    if not reader and not isinstance(error, (pickle.UnpicklingError, EOFError)):
        raise error
    raise _explained(path, error) from error


def _explained(path: Any, error: Exception) -> UnreadableCheckpoint:
    found = re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:global|class|function)\S* ([\w.]+)", str(error))
    if found is None:
        return unreadable(Path(path), "it is damaged, or no checkpoint")
    name = found[1] or found[2]
    return unreadable(
        Path(path),
        f"it holds Python's {name}, which is more than tensors and plain values. To load that is to run it; nothing "
        "was run",
        "If you have written it yourself, and need it: weights_only=False. Else take another checkpoint",
        code="LO805",
    )


def no_checkpoint(path: Any, held: Any) -> UnreadableCheckpoint | None:
    """Returns the error for what was read if no Trainer wrote it."""
    if isinstance(held, Mapping) and "state_dict" in held:
        return None
    if isinstance(held, Mapping) and "param_groups" in held:
        return unreadable(
            Path(path),
            "it holds the state of an optimizer alone",
            "A Trainer resumes from its own checkpoints; migrate_state_dict takes such a state over",
            code="LO804",
        )
    what = f"a mapping with {', '.join(map(repr, [*held][:3])) or 'nothing'}" if isinstance(held, Mapping) else ""
    return unreadable(
        Path(path),
        f"it is no checkpoint of a Trainer, but holds {what or type(held).__name__}",
        "Weights alone are read by module.load_state_dict(torch.load(path))",
        code="LO804",
    )


def unreadable(path: Path, why: str, remedy: str = _OTHER, *, code: str = "LO801") -> UnreadableCheckpoint:
    """Returns the error for a path."""
    return UnreadableCheckpoint(f"{path} cannot be read: {why}. {remedy}.", code=code)
