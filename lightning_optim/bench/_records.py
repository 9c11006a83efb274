"""The file of finished measurements: what an interrupted run goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_optim.errors import InvalidOption

_FORMAT = 1


class Records:
    """Measurements in a file of JSON lines, the first of which says of what request they are.

    Each line is written by one call that appends, and is on the disk when that returns. A line that a crash has cut off
    is not one.

    Args:
        path: The file; it may not exist yet.
        request: What decides what is measured, as plain values.

    Raises:
        InvalidOption: If the file holds measurements of another request.
    """

    def __init__(self, path: Path, request: Mapping[str, Any]) -> None:
        self._path = path
        self._lines: list[dict[str, Any]] = []
        # As they read when they come back.
        asked = json.loads(json.dumps(request))
        lines = list(self._whole_lines())
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
            self._write({"format": _FORMAT, "request": asked})
            return
        head, *self._lines = lines
        if head.get("format") != _FORMAT:
            raise InvalidOption(f"{path} is no file of this version of `lightning-optim bench`: take another --output")
        _refuse_another(path, head["request"], asked)

    def _whole_lines(self) -> Iterator[dict[str, Any]]:
        """Yields what was written, and takes away what was cut off."""
        content = self._path.read_bytes() if self._path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(self._path, len(whole))
        for line in whole.splitlines():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise InvalidOption(f"{self._path} holds what is no JSON: take another --output") from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a measurement, and returns when it is on the disk."""
        self._lines.append(self._write(record))

    def _write(self, record: Mapping[str, Any]) -> dict[str, Any]:
        line = json.dumps(record, allow_nan=False)
        content = line.encode() + b"\n"
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            if os.write(file, content) != len(content):
                raise OSError(f"{self._path} could not take another line: the disk is full")
            os.fsync(file)
        finally:
            os.close(file)
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
            "--output, or delete the file"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
