"""Our own algorithms, pure torch, one per file; ``adapters/`` fixes classes of other packages.

Public: the classes below work with any training loop. A change here must keep old state dicts loadable, or increment
the class's ``version`` and document it in its docstring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_optim.errors import MissingDependency
from lightning_optim.optimizers._adafactor import Adafactor
from lightning_optim.optimizers._adalomo import AdaLomo
from lightning_optim.optimizers._adam_mini import AdamMini
from lightning_optim.optimizers._adan import Adan
from lightning_optim.optimizers._adopt import Adopt
from lightning_optim.optimizers._anyprecision import AnyPrecisionAdamW
from lightning_optim.optimizers._apollo import ApolloAdamW
from lightning_optim.optimizers._base import OwnOptimizer
from lightning_optim.optimizers._came import CAME
from lightning_optim.optimizers._galore import GaLoreAdamW
from lightning_optim.optimizers._galore_adafactor import GaLoreAdafactor
from lightning_optim.optimizers._grokadamw import GrokAdamW
from lightning_optim.optimizers._lamb import Lamb
from lightning_optim.optimizers._lars import Lars
from lightning_optim.optimizers._lomo import LOMO
from lightning_optim.optimizers._low_rank import LowRankOptimizer
from lightning_optim.optimizers._muon import Muon, NorMuon
from lightning_optim.optimizers._prodigy import Prodigy
from lightning_optim.optimizers._scale import Scale
from lightning_optim.optimizers._soap import SOAP

if TYPE_CHECKING:
    from lightning_optim.optimizers.adapters._galore import GaLoreAdamW8bit

__all__ = [
    "CAME",
    "LOMO",
    "SOAP",
    "AdaLomo",
    "Adafactor",
    "AdamMini",
    "Adan",
    "Adopt",
    "AnyPrecisionAdamW",
    "ApolloAdamW",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GrokAdamW",
    "Lamb",
    "Lars",
    "LowRankOptimizer",
    "Muon",
    "NorMuon",
    "OwnOptimizer",
    "Prodigy",
    "Scale",
]


def __getattr__(name: str) -> Any:
    if name == "GaLoreAdamW8bit":
        try:
            from lightning_optim.optimizers.adapters._galore import GaLoreAdamW8bit
        except ModuleNotFoundError as error:
            if error.name != "bitsandbytes":
                raise
            raise MissingDependency(
                f"{name} needs bitsandbytes, which is not installed. pip install 'lightning-optim[bitsandbytes]'",
                code="LO107",
            ) from error
        return GaLoreAdamW8bit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
