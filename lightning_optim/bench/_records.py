"""The file of finished measurements: what an interrupted run goes on from."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_optim.errors import InvalidOption
from lightning_optim.files import cannot_write

_FORMAT = 1
# A crash may have left a part of it.
_BEGINS = b'{"format": '


class Records:
    """Measurements in a file of JSON lines, the first of which says of what request they are.

    Each line is written by one call that appends, and is on the disk when that returns. A line that a crash has cut off
    is not one.

    Args:
        path: The file; it may not exist yet.
        request: What decides what is measured, as plain values.

    Raises:
        InvalidOption: If the file holds measurements of another request, or cannot be written.
    """

    def __init__(self, path: Path, request: Mapping[str, Any]) -> None:
        self._path = path
        self._lines: list[dict[str, Any]] = []
        # As they read when they come back.
        asked = json.loads(json.dumps(request))
        lines = self._whole_lines()
        if not lines:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            except OSError as error:
                raise InvalidOption(cannot_write(path, error), code="LO908") from error
            self._write({"format": _FORMAT, "request": asked})
            return
        head, *self._lines = lines
        if head.get("format") != _FORMAT or "request" not in head:
            raise InvalidOption(
                f"{path} is no file of this version of `lightning-optim bench`: take another --output", code="LO908"
            )
        _refuse_another(path, head["request"], asked)

    def _whole_lines(self) -> list[dict[str, Any]]:
        """Returns what was written, and takes away what was cut off."""
        content = self._path.read_bytes() if self._path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise InvalidOption(f"{self._path} holds what is no JSON: take another --output", code="LO908") from error
        # Nothing is taken away from somebody else's file.
        ours = all(isinstance(line, dict) for line in lines) if lines else _BEGINS.startswith(content[: len(_BEGINS)])
        if not ours:
            raise InvalidOption(f"{self._path} holds no measurements: take another --output", code="LO908")
        if whole != content:
            os.truncate(self._path, len(whole))
        return lines

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a measurement, and returns when it is on the disk."""
        self._lines.append(self._write(record))

    def _write(self, record: Mapping[str, Any]) -> dict[str, Any]:
        line = json.dumps(record, allow_nan=False)
        content = line.encode() + b"\n"
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
            try:
                before = os.fstat(file).st_size
                try:
                    if os.write(file, content) != len(content):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file)
                except OSError:
                    os.ftruncate(file, before)
                    raise
            finally:
                os.close(file)
        except OSError as error:
            raise InvalidOption(cannot_write(self._path, error), code="LO908") from error
        written: dict[str, Any] = json.loads(line)
        return written

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """Returns the first measurement whose values are those given, or ``None``."""
        return next((line for line in self._lines if all(line.get(key) == wanted[key] for key in wanted)), None)


def _refuse_another(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    flat, other = dict(_flat(before)), dict(_flat(now))
    changed = [key for key in {**flat, **other} if flat.get(key) != other.get(key)]
    if changed:
        shown = "; ".join(f"{key} was {flat.get(key)!r} and is {other.get(key)!r}" for key in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise InvalidOption(
            f"{path} holds measurements of another request: {shown}{more}. They cannot be compared: take another "
            "--output, or delete the file",
            code="LO908",
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
