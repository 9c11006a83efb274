"""``OptimCLI``: Lightning's command line, with ``--optim NAME`` for any LightningModule."""

from __future__ import annotations

import dataclasses
import pkgutil
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import register_type
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, LRSchedulerTypeTuple
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_optim._compat.jsonargparse import actions
from lightning_optim._compat.lightning import chosen_strategy, is_start_method_popen, subcommand_parser
from lightning_optim.build import ARGUMENTS, Argument, OptimConfig, trust
from lightning_optim.errors import (
    IncompatibleTrainer,
    InvalidOption,
    MissingDependency,
    UnknownOptimizer,
    UnknownSchedule,
    UnreadableCheckpoint,
    UntrustedOptimizer,
)
from lightning_optim.files import check_file
from lightning_optim.table import REGISTRY, as_mapping
from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer._mixin import OptimMixin
from lightning_optim.trainer._optim_callback import OptimCallback
from lightning_optim.trainer.accelerators import NPUAccelerator, PJRTAccelerator

# The torch scheduler of `--optimizer CLASS`; Lightning calls it `lr_scheduler`, which here takes a schedule's name.
_TORCH_SCHEDULER = "torch_lr_scheduler"


_TYPED_WRONG = (
    UnknownOptimizer,
    UnknownSchedule,
    InvalidOption,
    IncompatibleTrainer,
    MissingDependency,
    UnreadableCheckpoint,
)


class OptionText:
    """The type of options written as ``"name=value,..."``: read as a mapping, which ``--optim_args.eps`` may join."""


def _mapping(text: Any) -> dict[str, Any]:
    if not isinstance(text, str):
        raise InvalidOption(f"{text!r} is not a string of options", code="LO203")
    return as_mapping(text, "the command line")


register_type(OptionText, serializer=dict, deserializer=_mapping, fail_already_registered=False)


def _type(argument: Argument) -> Any:
    """Returns an argument's type on the command line, where it may be left out."""
    return (dict[str, Any] | OptionText if argument.name.endswith("_args") else argument.type) | None


# Help texts that differ on a command line.
_HELP = {
    "optim": "Optimizer by name; `lightning-optim list` shows all. Without it the model decides.",
    "optim_args": "Options of the optimizer: --optim_args.eps 1e-6, a mapping in YAML, or 'name=value,...'.",
    "lr_scheduler_args": "Options of the schedule, in the same ways.",
}


# The strategies for one and for several devices, for the accelerators that Lightning does not know.
_STRATEGIES = {NPUAccelerator: ("npu", "npu_ddp"), PJRTAccelerator: ("single_xla_syncfree", "xla_syncfree")}


def _for_accelerator(config: dict[str, Any]) -> str | None:
    """Returns the strategy for one of our accelerators; ``None`` for others, or if there is no such device."""
    # Another accelerator may be registered under the name.
    name = config.get("accelerator")
    accelerator = AcceleratorRegistry[name]["accelerator"] if name in AcceleratorRegistry else None
    if accelerator not in _STRATEGIES or not accelerator.is_available():
        return None
    devices = config.get("devices", "auto")
    given = accelerator.auto_device_count() if devices == "auto" else devices
    alone, together = _STRATEGIES[accelerator]
    return alone if len(accelerator.get_parallel_devices(accelerator.parse_devices(given))) == 1 else together


def _for_layerwise(config: dict[str, Any]) -> str | None:
    """Returns a strategy that steps during backward if the Trainer would choose one that does not, else ``None``."""
    choosing = ("accelerator", "devices", "num_nodes")
    chosen = chosen_strategy({name: config[name] for name in choosing if name in config})
    if not isinstance(chosen, DDPStrategy):
        return None
    return "layerwise_ddp" if is_start_method_popen(chosen) else "layerwise_ddp_notebook"


class OptimArgumentParser(LightningArgumentParser):
    """Lightning's parser, with other keys and texts where one of our names means something else in torch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Arguments of torch's classes without a default: required only if no optimizer is named.
        self.needed_without_optim: set[str] = set()

    def add_optimizer_args(self, *args: Any, **kwargs: Any) -> None:
        with self._not_required():
            super().add_optimizer_args(*args, **kwargs)

    def add_lr_scheduler_args(
        self,
        lr_scheduler_class: Any = LRSchedulerTypeTuple,
        nested_key: str = "lr_scheduler",
        link_to: str = "AUTOMATIC",
    ) -> None:
        """Adds a torch scheduler, under ``torch_lr_scheduler`` by default."""
        key = _TORCH_SCHEDULER if nested_key == "lr_scheduler" else nested_key
        with self._not_required():
            super().add_lr_scheduler_args(lr_scheduler_class, key, link_to)

    @contextmanager
    def _not_required(self) -> Iterator[None]:
        before = set(actions(self))
        yield
        for action in actions(self):
            if action.required and action not in before:
                action.required = False
                self.needed_without_optim.add(action.dest)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exits with the message, extended by what to write if one of our names was meant."""
        named = next((word for word in re.findall(r"Given value: ([\w.]+)", message) if word in REGISTRY), None)
        if named and re.search(r"\boptimizer\b", message):
            message += f"\n--optimizer takes a class of torch. Write --optim {named} (in a file: `optim: {named}`)."
        elif "lr_scheduler" in message and "class_path" in message:
            message += (
                "\nlr_scheduler takes the name of a schedule, such as cosine. A class of torch goes to "
                f"--{_TORCH_SCHEDULER}, together with --optimizer CLASS."
            )
        super().error(message, ex)


class OptimCLI(LightningCLI):
    """A ``LightningCLI`` with ``--optim``, ``--lr``, ``--weight_decay``, ``--optim_args.NAME``, ``--lr_scheduler`` ...

    They work for any LightningModule: one with :class:`~lightning_optim.OptimMixin` receives them, any other gets an
    :class:`~lightning_optim.OptimCallback`. They are checked before anything is built; a mistake prints what is allowed
    and exits with status 2. Without ``--optim`` everything is as in ``LightningCLI``, except that ``--optimizer CLASS``
    takes its scheduler from ``--torch_lr_scheduler``. An identifier that ends in ``_layerwise`` gets the strategy it
    needs on several devices, and the accelerators ``npu`` and ``pjrt`` get theirs, unless a strategy was given.

    Example::

        # train.py
        from lightning_optim import OptimCLI
        OptimCLI(LitModel, DataModule)

        $ python train.py fit --optim lion_8bit --lr 1e-4 --optim_args.betas "[0.9, 0.99]" --config run.yaml
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"parser_class": OptimArgumentParser, **kwargs})

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        if self.model_class is not None and packages.is_others(self.model_class):
            raise IncompatibleTrainer(
                f"OptimCLI builds the Trainer of lightning.pytorch, and {self.model_class.__name__} is a module of "
                f"{packages.OTHER}. Use that package's LightningCLI: with OptimMixin before its LightningModule the "
                "model takes --model.optim NAME, --model.lr and so on. Or write `import lightning as L`.",
                code="LO423",
            )
        # Not in add_arguments_to_parser: users override that without calling super().
        super().add_core_arguments_to_parser(parser)
        for name, argument in ARGUMENTS.items():
            help = _HELP.get(name, argument.help.replace("``", ""))
            parser.add_argument(f"--{name}", type=_type(argument), default=None, help=help)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        try:
            self.optim_config = self._checked_config()
            if self.optim_config and self.config.get("subcommand") in (None, "fit"):
                self.optim_config.ensure_available()
            if self.config.get("subcommand"):
                # Lightning reads hyperparameters from it before the Trainer looks at it.
                check_file(self.config[self.config.subcommand].get("ckpt_path"))
        except _TYPED_WRONG as error:
            self.parser.error(str(error))
        self._said = set(trust.words(self.config.as_dict()))

    def instantiate_classes(self) -> None:
        automatic = self.auto_configure_optimizers
        # A class that add_optimizer_args has put into the parser with its defaults does not train if --optim is given.
        self.auto_configure_optimizers = automatic and self.optim_config is None
        # By now Lightning has added the hyperparameters from --ckpt_path.
        with trust.reading(said=self._said, held=self.config.as_dict()):
            super().instantiate_classes()
        self.auto_configure_optimizers = automatic
        if self.optim_config is None:
            return
        if isinstance(self.model, OptimMixin):
            self.model.optim_config = self.optim_config
            if self.model.hparams:
                # So that load_from_checkpoint restores the optimizer that trained.
                told = {name for name in ARGUMENTS if name in self.model.hparams} | self._given().keys()
                self.model._update_hyperparameters({name: getattr(self.optim_config, name) for name in told})
            return
        callback = OptimCallback(**dataclasses.asdict(self.optim_config))
        if not is_overridden("configure_optimizers", self.model):
            # Otherwise Lightning refuses the module before it runs callbacks.
            callback.install(self.model)
        self.trainer.callbacks.insert(0, callback)  # type: ignore[attr-defined]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = {**self._section(self.config_init).get("trainer", {}), **kwargs}
        chosen = self._chosen_config()
        try:
            if config.get("strategy", "auto") == "auto":
                strategy, why = _for_accelerator(config), f"accelerator={config.get('accelerator')!r}"
                if strategy is None and chosen is not None and chosen.spec.layerwise:
                    strategy, why = _for_layerwise(config), f"optim={chosen.optim!r}"
                if strategy is not None:
                    kwargs["strategy"] = strategy
                    rank_zero_info(f"OptimCLI chose --trainer.strategy {strategy} for {why}.")
            return super().instantiate_trainer(**kwargs)
        except (IncompatibleTrainer, MissingDependency, UntrustedOptimizer) as error:
            self.parser.error(str(error))

    def _chosen_config(self) -> OptimConfig | None:
        """Returns the optimizer that will train; ``None`` if the model decides or nothing trains."""
        if self.config.get("subcommand") not in (None, "fit"):
            return None
        if self.optim_config is not None:
            return self.optim_config
        return self.model.optim_config if isinstance(self.model, OptimMixin) else None

    def _section(self, config: Namespace) -> Namespace:
        """Returns the configuration of the subcommand, or all of it if there are no subcommands."""
        section: Namespace = config.get(str(self.config.get("subcommand")), config)
        return section

    def _given(self) -> dict[str, Any]:
        """Returns the optimizer arguments that were given, as plain values."""
        values = {name: self._section(self.config).get(name) for name in ARGUMENTS}
        return {
            name: value.as_dict() if isinstance(value, Namespace) else value
            for name, value in values.items()
            if value is not None
        }

    def _checked_config(self) -> OptimConfig | None:
        given, config = self._given(), self._section(self.config)
        parser = subcommand_parser(self, self.config.get("subcommand"))
        if "optim" not in given:
            if given:
                first = next(iter(given))
                takes_optim = "optim" in self._model_arguments(config)
                hint = f" (the model's own argument is --model.{first})" if takes_optim else ""
                raise InvalidOption(f"--{first} needs --optim, for instance --optim adamw_torch{hint}", code="LO422")
            lacking = [key for key in getattr(parser, "needed_without_optim", ()) if config.get(key) is None]
            if lacking:
                raise InvalidOption(f"--optim NAME is required, or --{' and --'.join(sorted(lacking))}", code="LO422")
            return None
        unchanged = parser.get_defaults()
        for rival in ("optimizer", _TORCH_SCHEDULER):
            if config.get(rival) not in (None, unchanged.get(rival)):
                raise IncompatibleTrainer(
                    f"--optim {given['optim']} together with --{rival} {config[rival].get('class_path', '')}: "
                    "one of them would be ignored. Keep --optim NAME (with --lr_scheduler NAME), or --optimizer CLASS.",
                    code="LO421",
                )
        own, defaults = self._model_arguments(config), self._mixin_defaults(config)
        for name in defaults:
            if own.get(name) not in (defaults[name], given.get(name)):
                raise IncompatibleTrainer(
                    f"--optim {given['optim']} together with --model.{name} {own[name]}: the latter would be ignored. "
                    f"Write --{name}, or leave --optim out and use --model.optim.",
                    code="LO421",
                )
        return OptimConfig(**given)

    @staticmethod
    def _model_arguments(config: Namespace) -> dict[str, Any]:
        model = config.get("model") or {}
        return dict(model.get("init_args") or model)

    def _mixin_defaults(self, config: Namespace) -> dict[str, Any]:
        """Returns the defaults of the model's own optimizer arguments; empty if it is not an OptimMixin."""
        path = (config.get("model") or {}).get("class_path")
        model_class: Any = pkgutil.resolve_name(path) if path else self.model_class
        if not (isinstance(model_class, type) and issubclass(model_class, OptimMixin)):
            return {}
        parser = ArgumentParser()
        parser.add_class_arguments(model_class, fail_untyped=False)
        return {name: value for name, value in parser.get_defaults().items() if name in ARGUMENTS}
