"""Everything that knows Lightning: the mixin, the callbacks, the strategies and the command line.

Only this room connects ``build/`` and ``layerwise/`` to a Trainer. The public names are in :mod:`lightning_optim`;
``_integration.py`` shows the order in which a fit calls the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_optim.errors import MissingDependency
from lightning_optim.trainer._mixin import OptimMixin
from lightning_optim.trainer._optim_callback import OptimCallback
from lightning_optim.trainer.strategies import shard_blocks, shards_itself

if TYPE_CHECKING:
    from lightning_optim.trainer._cli import OptimCLI as OptimCLI

__all__ = ["OptimCLI", "OptimCallback", "OptimMixin", "shard_blocks", "shards_itself"]


def __getattr__(name: str) -> Any:
    # OptimCLI needs jsonargparse, an optional package.
    if name == "OptimCLI":
        try:
            from lightning_optim.trainer._cli import OptimCLI as optim_cli  # noqa: N813
        except ModuleNotFoundError as error:
            raise MissingDependency(
                f"OptimCLI needs the package {error.name!r}: pip install 'jsonargparse[signatures]>=4.48'", code="LO107"
            ) from error
        return optim_cli
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
