"""``OptimCallback``: an optimizer by name for a LightningModule that cannot be changed."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import Unpack

from lightning_optim._compat.lightning import finder_sets_rate
from lightning_optim.build import ARGUMENTS, Companions, OptimConfig, takes_arguments
from lightning_optim.errors import IncompatibleTrainer, InvalidOption
from lightning_optim.table import refuse_unknown
from lightning_optim.trainer import _integration as integration
from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer._expected import own_hook
from lightning_optim.trainer._mixin import OptimMixin
from lightning_optim.trainer.callbacks._checkpoint_files import CheckpointFiles


@takes_arguments(Companions)
class OptimCallback(Callback):
    """Gives any LightningModule the named optimizer, instead of its own ``configure_optimizers``, while fit runs.

    The arguments are those of :class:`~lightning_optim.OptimMixin`. The module's own ``configure_optimizers`` is called
    first, to find out what the module's loop expects: several optimizers are refused, parameters that its optimizer
    does not train stay untrained, and a replaced learning rate or schedule is a warning. A module without any
    ``configure_optimizers`` is refused by Lightning before callbacks run: call ``callback.install(module)`` before
    ``trainer.fit``.

    ``OptimCallback()``, without a name, replaces nothing. It takes care of what the module builds itself with
    :func:`~lightning_optim.build_optimizer`: the modes of schedule-free optimizers, stepping during backward, the
    report.

    Args:
        optim: Identifier, alias or dotted path; ``None`` keeps what the module builds.
        **arguments: Those of :class:`OptimArguments`.

    Raises:
        UnknownOptimizer, UnknownSchedule, InvalidOption, IncompatibleTrainer: At once, when the request is wrong.
    """

    def __init__(self, optim: str | None = None, **arguments: Unpack[Companions]) -> None:
        refuse_unknown("OptimCallback", arguments, ARGUMENTS, optim)
        given = [f"{name}={value!r}" for name, value in arguments.items() if value not in (None, 0)]
        if optim is None and given:
            raise InvalidOption(
                f"OptimCallback({', '.join(given)}) without optim, which keeps the optimizers that the module builds: "
                "it would be ignored. Name one, for instance optim='adamw_torch', or write OptimCallback().",
                code="LO419",
            )
        #: The request; ``None`` if the module's own optimizers are kept.
        self.config = None if optim is None else OptimConfig(optim=optim, **arguments)
        self._checkpoint_files = CheckpointFiles()
        self._active = False
        self._installed_before: Any = None

    def install(self, module: LightningModule) -> None:
        """Replaces the module's ``configure_optimizers`` permanently, not only while fit runs.

        Raises:
            InvalidOption: If no optimizer is named.
        """
        if self.config is None:
            raise InvalidOption(
                "OptimCallback() names no optimizer to install; give optim='adamw_torch' or another", code="LO419"
            )
        hook: Any = module.configure_optimizers
        installed = isinstance(hook, partial) and hook.func is integration.configure
        own = hook.keywords["own"] if installed else own_hook(hook)
        replacement = partial(integration.configure, module, self.config, own=own)
        module.configure_optimizers = replacement  # type: ignore[method-assign]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._checkpoint_files.setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, OptimCallback) for callback in callbacks) > 1:
            raise IncompatibleTrainer("two OptimCallbacks in one Trainer; keep one.", code="LO418")
        installed_before = pl_module.__dict__.get("configure_optimizers")
        if self.config is None:
            attending = partial(integration.attend, pl_module, pl_module.configure_optimizers)
            pl_module.configure_optimizers = attending  # type: ignore[method-assign]
        else:
            self._check(self.config, callbacks, pl_module)
            self.install(pl_module)
            rank_zero_info(f"OptimCallback replaces {type(pl_module).__name__}.configure_optimizers while fit runs.")
        self._installed_before = installed_before
        self._active = True

    @staticmethod
    def _check(config: OptimConfig, callbacks: list[Callback], module: LightningModule) -> None:
        if isinstance(module, OptimMixin):
            raise IncompatibleTrainer(
                f"OptimCallback(optim={config.optim!r}) together with {type(module).__name__}, which has OptimMixin "
                f"and names optim={module.optim_config.optim!r} itself. Use one of them: drop the callback, or pass "
                "optim to the module.",
                code="LO418",
            )
        finders = (callback for callback in callbacks if isinstance(callback, packages.kin(LearningRateFinder)))
        if any(map(finder_sets_rate, finders)):
            raise IncompatibleTrainer(
                "the learning-rate finder sets an attribute of the module, which OptimCallback does not read. Use "
                "Tuner.lr_find(..., update_attr=False) and pass its suggestion as OptimCallback(lr=...).",
                code="LO420",
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._checkpoint_files.on_exception(trainer, pl_module, exception)
        self._give_back(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._checkpoint_files.teardown(trainer, pl_module, stage)
        self._give_back(pl_module)

    def _give_back(self, module: LightningModule) -> None:
        if not self._active:
            return
        self._active = False
        if self._installed_before is None:
            del module.__dict__["configure_optimizers"]
        else:
            module.__dict__["configure_optimizers"] = self._installed_before
