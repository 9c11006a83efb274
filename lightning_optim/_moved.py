"""Where modules of version 0.1 are now, for pickles and imports that name them.

A pickle of a whole module or optimizer names classes by their defining modules. Those paths were never public: an
import of one gives a ``DeprecationWarning``; ``lightning_optim`` itself has every public name.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType

_ROOT = __name__.partition(".")[0] + "."
_FOLDERS = {
    "accelerators": "trainer.accelerators",
    "adapters": "optimizers.adapters",
    "callbacks": "trainer.callbacks",
    "catalog": "table.rows",
    "rules": "build.rules",
    "strategies": "trainer.strategies",
}
_ROOMS = {
    "build": "arguments config curves factory memory plain resume schedule_state schedules trust",
    "groups": "layer_decay param_groups parameters target_modules",
    "table": "availability misnomers options registry spec",
    "trainer": "cli expected integration length mixin packages report",
}
_MOVED = {name: f"{room}._{name}" for room, names in _ROOMS.items() for name in names.split()} | {
    **_FOLDERS,
    "callbacks.optim": "trainer._optim_callback",
    "callbacks.used": "trainer.callbacks._must_build",
    "catalog.layerwise": "table._layerwise",
    "catalog.lean": "table.rows._adafactor_lomo",
    "command.here": "command._machine",
    "following": "build._module_schedule",
    "optimizers.averaging": "stepping._averaging",
    "optimizers.finite": "stepping._finite",
    "optimizers.foreign": "stepping._state_marks",
    "optimizers.fused": "stepping._fused",
    "optimizers.groups": "stepping._valid_groups",
    "optimizers.kernels": "stepping._kernels",
    "optimizers.preparing": "stepping._preparing",
    "optimizers.uncompiled": "stepping._uncompiled",
    "quiet": "_compat.bitsandbytes",
    "rules.stepping": "build.rules._layerwise",
    "strategies.pytorch_lightning": "pytorch_lightning",
}


def new_path(old: str) -> str | None:
    """Returns the path of the module that ``old`` named in version 0.1, both without the package's name."""
    if old in _MOVED:
        return _MOVED[old]
    folder, _, name = old.rpartition(".")
    if not folder or name.startswith("_"):
        return None
    return f"{_FOLDERS.get(folder, folder)}._{name}"


class _Moved(MetaPathFinder, Loader):
    """Finds modules that no other finder finds."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        new = new_path(fullname.removeprefix(_ROOT)) if fullname.startswith(_ROOT) else None
        if new is None or importlib.util.find_spec(_ROOT + new) is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, loader_state=new)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Lets Python create an empty module, which the real one replaces."""

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        warnings.warn(
            f"{module.__name__} is not public and has moved; import public names from lightning_optim",
            DeprecationWarning,
            stacklevel=2,
        )
        sys.modules[module.__name__] = importlib.import_module(_ROOT + module.__spec__.loader_state)


def keep_old_paths() -> None:
    """Makes the paths of version 0.1 importable."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
