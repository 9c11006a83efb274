"""Writing beside, to the disk, and then in place: a file or folder is the one before or the new one, never a part."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

#: What is being written has this at the end of its name.
UNFINISHED = ".unfinished"
#: A folder that is being replaced, for a moment.
REPLACED = ".replaced"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def written_whole(path: Path, new: bool = False) -> Iterator[Path]:
    """Yields a path to write to; what is there at the end, and on the disk, becomes ``path``.

    If writing fails, nothing is left, and what ``path`` was before stays.

    Args:
        path: The file. A device or a pipe is written directly.
        new: Whether to refuse to replace a file.

    Raises:
        FileExistsError: If there is a file, and it should be ``new``.
        OSError: If it cannot be written.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    if new and (path.exists() or path.is_symlink()):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # What a link leads to is replaced, not the link.
    path = Path(os.path.realpath(path))
    beside = path.with_name(path.name + UNFINISHED)
    try:
        yield beside
        sync(beside)
        if new:
            _place_new(beside, path)
        else:
            os.replace(beside, path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    sync(path.parent)


def _place_new(beside: Path, path: Path) -> None:
    try:
        # Unlike a rename it fails if somebody else was faster.
        os.link(beside, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(beside, path)


def written_whole_folder(beside: Path, path: Path) -> None:
    """Puts a folder that has been written ``beside`` in the place of ``path``, whatever that was.

    There is no moment without a whole one: the one before is ``path`` or, between two renames, ``path`` with
    :data:`REPLACED` at its end.
    """
    for file in beside.iterdir():
        sync(file)
    sync(beside)
    replaced = path.with_name(path.name + REPLACED)
    _remove(replaced)
    if path.exists():
        os.rename(path, replaced)
    os.rename(beside, path)
    sync(path.parent)
    _remove(replaced)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk; renames may get there before what they rename."""
    # Folders cannot be opened everywhere, and some file systems cannot wait.
    with suppress(PermissionError, IsADirectoryError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                raise
        finally:
            os.close(descriptor)


def save(value: Any, path: Path) -> None:
    """Saves as torch does, but says why it could not."""
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        # Torch's writer complains of a wrong position while Python's error passes through it.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def cannot_write(path: Path, error: OSError) -> str:
    """Returns what to tell who asked for a file that could not be written."""
    why = (error.strerror or str(error)) + "; nothing is left there that was not before"
    if isinstance(error, FileExistsError):
        why = "it exists; name another file"
    elif isinstance(error, FileNotFoundError):
        why = f"there is no folder {path.parent}; make it, or name another file"
    elif error.errno in _FULL:
        why += ". Make room, or name a file on another disk"
    elif error.errno in _FORBIDDEN:
        why += ". Name a file in a folder that you may write to"
    return f"cannot write {path}: {why}"
