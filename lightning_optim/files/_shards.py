"""Distributed checkpoints: whether the folder is whole, and what it holds, without running any of it."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from lightning_optim.errors import UnreadableCheckpoint
from lightning_optim.files._check import (
    BROKEN,
    DISTRIBUTED,
    METADATA,
    check_file,
    check_finished,
    missing,
    raise_explained,
    unreadable,
    wrong_checksum,
)


def check_shards(folder: Path, number: int = 0, of: int = 1) -> None:
    """Raises :class:`UnreadableCheckpoint` unless the folder of a distributed checkpoint is whole.

    Args:
        folder: The folder.
        number: Which part of the tensors to look at; all of several processes together look at each once.
        of: How many parts there are.
    """
    # Importing it is slow.
    from lightning_optim._compat.dcp import entries

    gone = missing(folder)
    if gone is not None:
        raise gone
    check_finished(folder)
    check_file(folder / DISTRIBUTED)
    try:
        found = entries(folder)
    except Exception as error:  # there is no telling what a cut pickle raises
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise_explained(folder / METADATA, error)
        raise unreadable(folder, f"its {METADATA} is missing, truncated or damaged") from error
    for entry in found[number::of]:
        file = folder / entry.file
        size = file.stat().st_size if file.is_file() else 0
        if size < entry.end:
            raise unreadable(
                folder, f"its {entry.file} is truncated: {entry.end:,} bytes are needed, {size:,} there", code="LO802"
            )
        with file.open("rb") as shards:
            part = io.BufferedReader(_Slice(shards, entry.begin, entry.end - entry.begin))
            if not entry.transformed:
                _check_bytes(folder, entry.name, part)
            if not entry.is_tensor:
                _check_value(folder, entry.name, part)


def _check_bytes(folder: Path, name: str, stored: IO[bytes]) -> None:
    changed = f"the bytes of {name!r} have changed since they were written"
    try:
        with zipfile.ZipFile(stored) as archive:
            wrong = wrong_checksum(archive)
    except BROKEN as error:
        raise unreadable(folder, changed) from error
    if wrong is not None:
        raise unreadable(folder, changed)


def _check_value(folder: Path, name: str, stored: IO[bytes]) -> None:
    """Torch itself would run what a value that is no tensor says."""
    stored.seek(0)
    try:
        torch.load(stored, weights_only=True)
    except Exception as error:
        raise_explained(folder / name, error)


class _Slice(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: IO[bytes], begin: int, length: int) -> None:
        super().__init__()
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._begin + self._at)
        content = self._file.read(min(len(buffer), max(0, self._length - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def consolidated(folder: Path) -> dict[str, Any]:
    """Returns a distributed checkpoint as a Trainer on one device would have written it.

    Its states are numbered by the names of their parameters. Torch goes by their order in the groups, and Lightning by
    the names where it shards again.

    Raises:
        UnreadableCheckpoint: If it is not whole, or holds more than tensors and plain values.
    """
    from lightning_optim._compat.dcp import read_whole

    check_shards(folder)
    tensors = read_whole(folder)
    try:
        rest: dict[str, Any] = torch.load(folder / DISTRIBUTED, map_location="cpu", weights_only=True)
    except Exception as error:
        raise_explained(folder / DISTRIBUTED, error)
    if "state_dict" not in tensors or not isinstance(rest, dict):
        raise UnreadableCheckpoint(
            f"{folder} is no checkpoint of a Trainer: it holds {', '.join(tensors)}.", code="LO804"
        )
    names = itertools.takewhile(tensors.__contains__, (f"optimizer_{number}" for number in itertools.count()))
    states = [tensors[name] for name in names]
    return {**rest, "state_dict": tensors["state_dict"], "optimizer_states": [_with_every_key(each) for each in states]}


def _with_every_key(state: dict[str, Any]) -> dict[str, Any]:
    """Returns an optimizer's state dict; without any state, torch has stored no ``"state"``."""
    return {**state, "state": state.get("state", {})}
