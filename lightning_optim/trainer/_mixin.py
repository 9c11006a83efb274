"""``OptimMixin``: a LightningModule whose optimizer is named, not written."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.optim import Optimizer
from typing_extensions import Self, Unpack

from lightning_optim._compat.lightning import note_hyperparameters, restricted_classmethod
from lightning_optim.build import ARGUMENTS, OptimConfig, OptimizerArguments, storable, takes_arguments, trust
from lightning_optim.errors import IncompatibleTrainer
from lightning_optim.files import raise_explained
from lightning_optim.groups import Target, TargetModules
from lightning_optim.table import refuse_unknown
from lightning_optim.trainer import _integration as integration
from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer import _report as report
from lightning_optim.trainer._expected import own_hook
from lightning_optim.trainer.callbacks._checkpoint_files import (
    CheckpointFiles,
    check_one_file,
    import_torchao,
    is_old_style,
)
from lightning_optim.trainer.callbacks._must_build import MustBuildOptim

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    _Base = LightningModule
else:
    _Base = object


_NOT_SCRIPTED = "__jit_unused_properties__"
# Holds the value of the module's own attribute ``lr``.
_OWN_LR = "_own_lr"


@takes_arguments()
class OptimMixin(_Base):
    """Adds ``optim`` and its companions to the arguments of a LightningModule and provides ``configure_optimizers``.

    Put it before ``LightningModule`` among the bases, and pass the arguments on::

        class LitModel(OptimMixin, L.LightningModule):
            def __init__(self, width: int = 256, **optim):
                super().__init__(**optim)
                ...

    ``self.lr`` reads and sets ``lr``, for ``Tuner.lr_find``.

    Args:
        *args: Passed on to the next class.
        **kwargs: Passed on to the next class.

    Raises:
        UnknownOptimizer, UnknownSchedule, InvalidOption, IncompatibleTrainer: At once, when the request is wrong.
        MissingDependency: When fit starts, if the optimizer's package is not installed.
    """

    # A class attribute, for modules that were pickled before it existed.
    _must_build: MustBuildOptim | None = None

    def __init__(
        self,
        *args: Any,
        optim: str = "adamw_torch",
        lr: float | None = None,
        weight_decay: float | None = None,
        optim_args: Mapping[str, Any] | str | None = None,
        optim_target_modules: TargetModules = None,
        param_groups: Mapping[str, Mapping[str, Any]] | None = None,
        layer_decay: float | None = None,
        layer_pattern: str | None = None,
        lr_scheduler: str | None = None,
        lr_scheduler_args: Mapping[str, Any] | str | None = None,
        warmup_steps: int | float = 0,
        optim_fallback: bool = False,
        override_on_resume: Sequence[str] | str | None = None,
        **kwargs: Any,
    ) -> None:
        ours = {name: value for name, value in locals().items() if name in ARGUMENTS}
        if trust.is_reading():
            # The outermost __init__ got them from the file; what it passes on may come from its own code.
            *_, outermost = _init_frames(self)
            trust.note(_arguments(outermost))
            # A logger's hparams.yaml also holds reports.
            kwargs = {name: value for name, value in kwargs.items() if not report.is_report(name, value)}
        following = _following_arguments(type(self))
        taken = {name for parameters in following for name in parameters}
        if not any(map(_collects, following)):
            unknown = {name: value for name, value in kwargs.items() if name not in taken}
            refuse_unknown(type(self).__name__, unknown, ARGUMENTS, optim)
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if value is not None and name in taken:
                # The module has its own argument of that name: both mean the same.
                kwargs[name] = value
        super().__init__(*args, **kwargs)
        self.optim_config = OptimConfig(**ours)
        if vars(self).get(_OWN_LR) == self.optim_config.lr:
            vars(self).pop(_OWN_LR, None)
        if self.hparams:
            # The next class has saved its own arguments: with these, load_from_checkpoint restores this optimizer.
            asked = {name: getattr(self.optim_config, name) for name in ARGUMENTS}
            given = {name: value for name, value in asked.items() if value != ARGUMENTS[name].default}
            self._update_hyperparameters({name: value for name, value in given.items() if name not in self.hparams})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        mro = list(cls.__mro__)
        if any(base in mro and mro.index(base) < mro.index(OptimMixin) for base in packages.kin(LightningModule)):
            raise IncompatibleTrainer(
                f"OptimMixin stands after LightningModule among the bases of {cls.__name__} and would never be asked. "
                f"Write `class {cls.__name__}(OptimMixin, L.LightningModule)`.",
                code="LO417",
            )
        # TorchScript compiles all properties except these.
        unused = {name for base in mro for name in vars(base).get(_NOT_SCRIPTED, ())}
        setattr(cls, _NOT_SCRIPTED, sorted({*unused, "lr"}))

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Saves the arguments of ``__init__`` as Lightning does, and one collected by a ``**`` of the same name.

        Lightning skips the name of the collecting parameter: with ``__init__(self, **optim)`` it would lose ``optim``,
        and ``load_from_checkpoint`` would restore another optimizer.
        """
        frame = frame or next(_init_frames(self), None) or inspect.currentframe().f_back  # type: ignore[union-attr]
        collector = inspect.getargvalues(frame).keywords if frame else None
        collected = frame.f_locals[collector] if frame and collector else {}
        lost = {name: value for name, value in collected.items() if name == collector and (not args or name in args)}
        others = tuple(arg for arg in args if not (isinstance(arg, str) and arg in lost))
        if others or not args:
            super().save_hyperparameters(*others, ignore=ignore, frame=frame, logger=logger)
        ignored = (ignore,) if isinstance(ignore, str) else ignore or ()
        self._update_hyperparameters({name: value for name, value in lost.items() if name not in ignored})

    def _update_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Changes the saved hyperparameters, also for loggers; ours become plain values."""
        saved: Any = self.hparams
        saved.update(values)
        for name in [name for name, value in saved.items() if report.is_report(name, value)]:
            del saved[name]
        saved.update({name: storable(saved[name]) for name in ARGUMENTS if name in saved})
        note_hyperparameters(self)

    # Lightning's kind of class method, which refuses to be called on an instance.
    @restricted_classmethod
    def load_from_checkpoint(
        cls,  # noqa: N805
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Loads as Lightning does, and also old-style checkpoints that hold torchao's tensors (onto the CPU).

        A class by dotted path that only the checkpoint names is not imported: see :mod:`lightning_optim.build._trust`.

        Raises:
            UnreadableCheckpoint: If the file is truncated or changed, is no checkpoint, or holds what would be run.
        """
        # The defaults are also from code.
        defaults = [parameter.default for parameter in inspect.signature(cls.__init__).parameters.values()]
        given = {"hparams_file": hparams_file, "strict": strict, "weights_only": weights_only, **kwargs}
        check_one_file(checkpoint_path)
        with trust.reading(said=[kwargs, defaults]):
            try:
                return super().load_from_checkpoint(checkpoint_path, map_location, **given)
            except Exception as error:
                if not is_old_style(error):
                    raise_explained(checkpoint_path, error)
            import_torchao()
            return super().load_from_checkpoint(checkpoint_path, "cpu", **given)

    def configure_callbacks(self) -> list[Callback]:
        """Adds care for checkpoint files and a check that ``optim`` is used; call ``super()`` in yours."""
        inherited = super().configure_callbacks()
        self._must_build = MustBuildOptim(self.optim_config)
        return [*(inherited if isinstance(inherited, Sequence) else [inherited]), CheckpointFiles(), self._must_build]

    def _use_config(self) -> None:
        if self._must_build is not None:
            self._must_build.built = True

    # An lr that the module's own code assigns in __init__, or defines in its class, is the module's: it may not mean
    # the optimizer's rate, and the optimizer does not follow it.
    @property
    def lr(self) -> Any:
        """The learning rate asked for; setting it takes effect when the optimizer is built.

        A module that has its own ``lr`` keeps it; the optimizer's is then ``optim_config.lr``.
        """
        if _OWN_LR in vars(self):
            return vars(self)[_OWN_LR]
        return getattr(super(), "lr", None) if hasattr(super(), "lr") else self.optim_config.lr

    @lr.setter
    def lr(self, value: Any) -> None:
        making = next(_init_frames(self), None) is not None
        config = vars(self).get("optim_config")
        if config is None or (making and value != config.lr) or _OWN_LR in vars(self) or hasattr(super(), "lr"):
            vars(self)[_OWN_LR] = value
        else:
            self.optim_config = config.replace(lr=value)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds the optimizer and the schedule that were named."""
        self._use_config()
        return integration.configure(self, self.optim_config, own_hook(super().configure_optimizers))

    @takes_arguments(OptimizerArguments)
    def build_optimizer(
        self, target: Target | None = None, optim: str | None = None, **arguments: Unpack[OptimizerArguments]
    ) -> Optimizer:
        """Builds an optimizer by name inside your own ``configure_optimizers``, for GANs and manual optimization.

        It makes no schedule; :func:`lightning_optim.build_schedule` does. ``warmup_steps`` is for optimizers that warm
        up themselves. Raises: see :func:`lightning_optim.build_optimizer`.

        Args:
            target: A module, parameters or (name, parameter) pairs; ``None`` means this module.
            optim: Identifier; ``None`` takes this module's, and its arguments as the defaults of those below.
            **arguments: Those of :class:`OptimArguments`, without the schedule's.

        Returns:
            The optimizer; what it needs from the Trainer (mode switches, the report) is taken care of.
        """
        taken = OptimizerArguments.__annotations__
        refuse_unknown("self.build_optimizer", arguments, taken, optim or self.optim_config.optim)
        given: dict[str, Any] = {name: value for name, value in arguments.items() if value is not None}
        if optim in (None, self.optim_config.optim):
            self._use_config()
        if optim is not None:
            config = OptimConfig(optim=optim, **given)
        else:
            # The schedule and its warm-up are left to the caller.
            without = {"lr_scheduler": None, "lr_scheduler_args": None, "warmup_steps": 0}
            config = self.optim_config.replace(**{**without, **given})
        return integration.build(self, self if target is None else target, config)


def _following_arguments(cls: type) -> list[Mapping[str, inspect.Parameter]]:
    """Returns the parameters of the constructors after the mixin's, up to the last that is reached or Lightning's."""
    found: list[Mapping[str, inspect.Parameter]] = []
    for base in cls.__mro__[cls.__mro__.index(OptimMixin) + 1 :]:
        if issubclass(base, nn.Module) and packages.top(base) in {*packages.LIGHTNING, "torch"}:
            break
        if "__init__" in vars(base):
            found.append(inspect.signature(vars(base)["__init__"]).parameters)
            if not _collects(found[-1]):
                break
    return found


def _collects(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _init_frames(module: nn.Module) -> Iterator[FrameType]:
    """Yields the frames of the running ``__init__`` methods of ``module``, innermost first."""
    frame = inspect.currentframe()
    while frame:
        if frame.f_code.co_name == "__init__" and any(value is module for value in frame.f_locals.values()):
            yield frame
        frame = frame.f_back


def _arguments(frame: FrameType) -> list[Any]:
    """Returns the argument values that a frame's function was called with."""
    found = inspect.getargvalues(frame)
    names = [*found.args, *filter(None, (found.varargs, found.keywords))]
    return [found.locals[name] for name in names if name in found.locals]
