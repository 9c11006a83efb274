"""What is used of ``torch.distributed.checkpoint`` that torch does not promise."""

from __future__ import annotations

import io
import pathlib
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.metadata as described
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.serialization import _get_layout

__all__ = ["entries", "read_whole"]

# The file that says where in the others everything is: a pickle.
_METADATA = ".metadata"

_CLASSES: dict[tuple[str, str], Any] = {
    **{
        (kind.__module__, kind.__qualname__): kind
        for kind in (
            described.BytesStorageMetadata,
            described.ChunkStorageMetadata,
            described.Metadata,
            described.MetadataIndex,
            described.StorageMeta,
            described.TensorProperties,
            described.TensorStorageMetadata,
            described._MEM_FORMAT_ENCODING,
            _StorageInfo,
        )
    },
    ("torch.serialization", "_get_layout"): _get_layout,
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): OrderedDict,
}
_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}


class _Unpickler(pickle.Unpickler):
    """Makes nothing but what torch describes a checkpoint with."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module.partition(".")[0] == "pathlib" and name in _PATHS:
            return pathlib.PurePosixPath
        kind = getattr(torch, name, None) if module == "torch" else None
        if isinstance(kind, torch.dtype):
            return kind
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not expected in {_METADATA}")


def _metadata(folder: Path) -> described.Metadata:
    with (folder / _METADATA).open("rb") as file:
        found = _Unpickler(file).load()
    if not isinstance(found, described.Metadata) or not isinstance(found.storage_data, dict):
        raise pickle.UnpicklingError(f"{_METADATA} describes no checkpoint")
    return found


@dataclass(frozen=True)
class Entry:
    """A tensor, a part of one, or a plain value: a file of ``torch.save`` between two positions of another file."""

    name: str
    file: str
    begin: int
    end: int
    is_tensor: bool
    #: Whether it was stored in another form, compressed for instance.
    transformed: bool


def entries(folder: Path) -> list[Entry]:
    """Returns what a distributed checkpoint holds, and where. Nothing that its files say is run.

    Raises:
        Exception: If it cannot be told; a pickle that is cut off raises many.
    """
    found = _metadata(folder)
    kinds = found.state_dict_metadata
    return [
        Entry(
            index.fqn,
            stored.relative_path,
            stored.offset,
            stored.offset + stored.length,
            not isinstance(kinds[index.fqn], described.BytesStorageMetadata),
            bool(getattr(stored, "transform_descriptors", None)),
        )
        for index, stored in found.storage_data.items()
    ]


class _Reader(FileSystemReader):
    """Torch's own unpickles whatever the file says."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> described.Metadata:
        found = _metadata(Path(self.path))
        found.storage_meta = found.storage_meta or described.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Planner(_EmptyStateDictLoadPlanner):
    """Torch's own loads plain values with ``weights_only=False``."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def read_whole(folder: Path) -> dict[str, Any]:
    """Returns all that a distributed checkpoint holds, in whole tensors, without other processes.

    Torch's ``dcp_to_torch_save`` does so by way of a file, and runs what the checkpoint says.
    """
    found: dict[str, Any] = {}
    _load_state_dict(found, storage_reader=_Reader(folder), planner=_Planner(), no_dist=True)  # type: ignore[no-untyped-call]
    return found
