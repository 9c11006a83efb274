"""Why something is refused, and what to do: an entry for the code of every error.

Errors carry codes only; ``lightning-optim explain`` and ``docs/refusals.md`` show the entries. To add one, take the
next free number, name it where the error is raised, and add it to ``GIVEN`` in ``tests/refusals``. A code keeps its
meaning: one that nothing raises any more gets ``retired``, and stays.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_optim.refusals import (
    _checkpoints,
    _groups,
    _layerwise,
    _names,
    _options,
    _request,
    _run,
    _strategies,
    _tools,
)
from lightning_optim.refusals._entry import Entry

__all__ = ["ENTRIES", "SECTIONS", "Entry"]

#: By what it is about.
SECTIONS: Mapping[str, tuple[Entry, ...]] = {
    "names": _names.ENTRIES,
    "options": _options.ENTRIES,
    "groups": _groups.ENTRIES,
    "request": _request.ENTRIES,
    "run": _run.ENTRIES,
    "layerwise": _layerwise.ENTRIES,
    "strategies": _strategies.ENTRIES,
    "checkpoints": _checkpoints.ENTRIES,
    "tools": _tools.ENTRIES,
}
#: By code.
ENTRIES: Mapping[str, Entry] = {entry.code: entry for entries in SECTIONS.values() for entry in entries}
