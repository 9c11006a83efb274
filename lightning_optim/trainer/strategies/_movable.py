"""Lets an instance of our strategies train under the Trainer of either package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import Strategy

from lightning_optim.errors import IncompatibleTrainer
from lightning_optim.trainer import _packages as packages

if TYPE_CHECKING:
    _Base = Strategy
else:
    _Base = object


class Movable(_Base):
    """Mixin: an instance based on ``lightning.pytorch`` is rebuilt when the other package's Trainer takes it.

    ``pytorch_lightning`` accepts it as a strategy: see :func:`lightning_optim.trainer.strategies.register`.
    """

    _given: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        created = super().__new__(cls)
        created._given = (args, kwargs)
        return created

    @property
    def accelerator(self) -> Accelerator | None:
        """The accelerator; setting it is the first thing that a Trainer does to a strategy."""
        return super().accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        if packages.is_others(accelerator) and not packages.is_others(self):
            self._move()
        packages.set_inherited(Movable, self, "accelerator", accelerator)

    def _move(self) -> None:
        ours = type(self)
        if packages.top(ours) != packages.top(Movable):
            raise IncompatibleTrainer(
                f"strategy={ours.__name__}(...) derives from a strategy for lightning.pytorch, and the Trainer is "
                f"pytorch_lightning's. Derive it from the class of the same name in {packages.DERIVED_IN}, or write "
                "`import lightning as L` and use L.Trainer and L.LightningModule.",
                code="LO423",
            )
        args, kwargs = self._given
        vars(self).clear()
        self.__class__ = packages.derived(ours)
        self._given = args, kwargs
        self.__init__(*args, **kwargs)  # type: ignore[misc]
