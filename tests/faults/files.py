"""Files that are no checkpoint, or no longer one."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def truncated(file: Path, part: float = 0.5) -> None:
    os.truncate(file, int(file.stat().st_size * part))


def flipped(file: Path, inside: bytes) -> None:
    """Changes one bit of the first tensor that holds ``inside``."""
    content = bytearray(file.read_bytes())
    content[content.index(inside) + len(inside) // 2] ^= 1
    file.write_bytes(content)


def _archive(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("folder/letter.txt", "Dear all")


#: What a file is replaced by, and what is said of it.
FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda file: file.write_bytes(b""), "it is empty"),
    "truncated": (truncated, "it is truncated"),
    "almost whole": (lambda file: truncated(file, 0.999), "it is truncated"),
    "zeros": (lambda file: file.write_bytes(bytes(5000)), r"it is no checkpoint: it begins with b'\\x00"),
    "JSON": (lambda file: file.write_text(json.dumps({"lr": 1})), "it is no checkpoint: it begins with b'{\"lr\": 1}'"),
    "an image": (lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)), "it is no checkpoint"),
    "an archive": (_archive, "no checkpoint, but an archive of folder/letter.txt"),
    "a pickle": (
        lambda file: file.write_bytes(pickle.dumps(Runs(file.with_suffix(".ran")))),
        "damaged, or no checkpoint",
    ),
    "a pickle of old": (
        lambda file: torch.save(Runs(file.with_suffix(".ran")), file, _use_new_zipfile_serialization=False),
        "mkdir",
    ),
    "code": (lambda file: torch.save({"state_dict": Runs(file.with_suffix(".ran"))}, file), "mkdir.*nothing was run"),
    "weights": (lambda file: torch.save({"weight": torch.ones(2)}, file), "no checkpoint of a Trainer, .* 'weight'"),
    "a tensor": (lambda file: torch.save(torch.ones(2), file), "no checkpoint of a Trainer, but holds Tensor"),
    "an optimizer": (
        lambda file: torch.save({"state": {}, "param_groups": []}, file),
        "it holds the state of an optimizer alone. .*migrate_state_dict",
    ),
}
