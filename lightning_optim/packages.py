"""What this package leaves behind in Lightning's registries, without taking a name from somebody else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn


def is_free(registry: Mapping[str, Mapping[str, Any]], argument: str, flag: str, ours: type) -> bool:
    """Whether ``flag`` may be registered for ``ours``; where somebody else has that name it stays, with a warning.

    Args:
        registry: Lightning's registry of strategies or of accelerators.
        argument: The Trainer's argument, ``"strategy"`` or ``"accelerator"``.
        flag: What the user types.
        ours: The class to register.
    """
    if flag not in registry:
        return True
    theirs, own = _path(registry[flag][argument]), _path(ours)
    # By its path: a module that is imported a second time makes its classes anew.
    if theirs == own:
        return True
    rank_zero_warn(
        f"{argument}={flag!r} stays {theirs}, which had that name before lightning_optim was imported; {own} is "
        f"not registered. To have ours, use Trainer({argument}=lightning_optim.{ours.__qualname__}())."
    )
    return False


def _path(registered: Any) -> str:
    return f"{registered.__module__}.{registered.__qualname__}" if isinstance(registered, type) else repr(registered)
