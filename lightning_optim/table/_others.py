"""Options of optimizers for matrices, which leave all other parameters to another optimizer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightning_optim.errors import InvalidOption
from lightning_optim.table._options import Options, option

_FACTOR = re.compile(r"(\d+(?:[.]\d*)?(?:e[+-]?\d+)?|[.]\d+)x", re.IGNORECASE)


@dataclass(frozen=True)
class LeavesOthers(Options):
    """Who steps the parameters that are left, and at which learning rate."""

    others: str = option(
        "adamw",
        "identifier of the optimizer for all other parameters: embeddings, output layer, vectors",
        scope="policy",
    )
    others_lr: float | str | None = option(
        None,
        "its learning rate: a number, or a factor on lr such as '0.1x'; None: its own default, or lr where the updates "
        "are scaled like AdamW's",
        scope="policy",
    )

    @property
    def scaled_like_adamw(self) -> bool:
        """Whether a good learning rate for AdamW is one for this optimizer, too."""
        return False

    @property
    def others_factor(self) -> float | None:
        """The others' learning rate as a factor of the main one; ``None`` if it is a number, or their own default."""
        if isinstance(self.others_lr, str):
            return float(self.others_lr.strip()[:-1])
        return 1.0 if self.others_lr is None and self.scaled_like_adamw else None

    def check(self) -> None:
        super().check()
        rate = self.others_lr
        if isinstance(rate, str) and not _FACTOR.fullmatch(rate.strip()):
            raise InvalidOption(
                f"others_lr={rate!r} is neither a number, such as 3e-4, nor a factor, such as '0.1x'", code="LO203"
            )
        if isinstance(rate, float) and not 0 <= rate < float("inf"):
            raise InvalidOption(f"others_lr={rate!r} is out of range: 0 <= value (finite) is allowed", code="LO204")
