"""The user's module and data, by class or by a configuration file of Lightning's command line."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import pkgutil
import sys
import warnings
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import (
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
)

from lightning_optim.bench._workload import SCHEDULE, Parts, Workload, sources
from lightning_optim.build import ARGUMENTS, OptimConfig
from lightning_optim.errors import InvalidOption, listing
from lightning_optim.trainer import OptimCallback, OptimCLI, OptimMixin

#: Callbacks that end a trial early, or have nothing to write to in one.
_IDLE = (
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelSummary,
    OptimCallback,
    ProgressBar,
)
#: What a trial decides itself, or does without.
_OURS = {
    *("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "default_root_dir"),
    *("max_steps", "max_epochs", "max_time", "min_steps", "min_epochs", "fast_dev_run", "callbacks"),
    *("val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps"),
    *("devices", "num_nodes", "limit_test_batches", "limit_predict_batches"),
}
#: What each optimizer of a comparison brings itself.
_EACH = {"optim", "lr", "optim_args", "optim_fallback", "override_on_resume"}
_ONE_DEVICE = ("auto", "1", 1, -1, None)


class _Parser(OptimCLI):
    """Parses, and makes nothing."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        # In the files that a run of the command line saves.
        for name in ("ckpt_path", "weights_only"):
            parser.add_argument(f"--{name}", type=Any, default=None)

    def instantiate_classes(self) -> None:
        return


def configured(config: Path | None, model: str | None, data: str | None) -> Workload:
    """Returns what a configuration file or the classes named describe.

    Args:
        config: A file of LightningCLI's or OptimCLI's: its ``model``, ``data``, ``trainer``, and the optimizer with its
            schedule.
        model: The LightningModule's class, which the file names itself where its ``model`` has a ``class_path``.
        data: The same of the LightningDataModule; a module may have its own data.

    Raises:
        InvalidOption: If the file does not fit the classes, or asks for what a trial cannot do.
    """
    # As `python -m` does: the command's own folder is on the path else.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if config is not None and not config.is_file():
        raise InvalidOption(f"--config {config}: there is no such file", code="LO907")
    try:
        held = yaml.safe_load(config.read_text(encoding="utf-8")) if config is not None else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InvalidOption(f"--config {config} is no plain YAML: {error}", code="LO907") from error
    if not isinstance(held or {}, dict):
        raise InvalidOption(f"--config {config} is no mapping with model: and trainer:", code="LO907")
    cli = _parse(
        _class(model, "--model", LightningModule),
        _class(data, "--data", LightningDataModule),
        ["--config", str(config)] if config else [],
    )

    def make() -> Parts:
        made = cli.parser.instantiate_classes(cli.config)
        given = {**(made.get("trainer") or {})}
        trainer = {name: value for name, value in given.items() if name not in _OURS and value is not None}
        trainer["callbacks"] = [one for one in _as_list(given.get("callbacks")) if not isinstance(one, _IDLE)]
        return Parts(made.model, made.get("data"), trainer)

    trainer = cli.config["trainer"]
    # Not even made: some begin a run when they are.
    trainer["logger"] = False
    _refuse(cli.config, trainer)
    module, datamodule, _ = make()
    own = cli.optim_config
    if own is None and isinstance(module, OptimMixin) and module.optim_config != OptimConfig():
        own = module.optim_config
    shared = dict(SCHEDULE)
    if own is not None:
        asked = {name: getattr(own, name) for name in ARGUMENTS if name not in _EACH}
        shared = {name: value for name, value in asked.items() if value != ARGUMENTS[name].default}
    kinds = [type(module), *([type(datamodule)] if datamodule is not None else [])]
    facts = yaml.safe_load(cli.parser.dump(cli.config, format="yaml"))
    max_steps = trainer.get("max_steps")
    return Workload(
        name=" and ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds),
        make=make,
        facts={**{key: facts.get(key) for key in ("model", "data", "trainer")}, "sources": sources(*kinds)},
        shared=shared,
        own=own,
        steps=max_steps if max_steps and max_steps > 0 else None,
        left_out=tuple(_idle(trainer.get("callbacks"))),
    )


def _parse(model: type | None, data: type | None, args: list[str]) -> _Parser:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
            return _Parser(
                model,
                data,
                args=args,
                run=False,
                save_config_callback=None,
                seed_everything_default=False,
                parser_kwargs={"exit_on_error": False},
            )
    except argparse.ArgumentError as error:
        raise InvalidOption(str(error), code="LO907") from error


def _class(path: str | None, option: str, base: type) -> type | None:
    if path is None:
        return None
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidOption(
            f"{option} {path}: {error}. Name a class by its path, as in 'package.module.Class'; modules are looked for "
            "in this folder, too",
            code="LO907",
        ) from error
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise InvalidOption(f"{option} {path} is no {base.__name__} of lightning.pytorch", code="LO907")
    return found


def _refuse(config: Any, trainer: Any) -> None:
    """Refuses what a trial cannot do."""
    if config.get("ckpt_path"):
        raise InvalidOption(
            f"the config continues from ckpt_path={config['ckpt_path']!r}, and every trial starts from scratch: take "
            "it out, and have the module load pretrained weights itself",
            code="LO907",
        )
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes")
    one = devices in _ONE_DEVICE or (isinstance(devices, list) and len(devices) == 1)
    if not one or nodes not in (None, 1):
        raise InvalidOption(
            f"the config asks for devices={devices!r} and num_nodes={nodes!r}, and a trial runs on one device: write "
            "devices: 1",
            code="LO907",
        )


def _as_list(callbacks: Any) -> list[Any]:
    return callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []


def _idle(callbacks: Any) -> list[str]:
    """Says which callbacks of the config take no part."""
    classes = [pkgutil.resolve_name(one["class_path"]) for one in _as_list(callbacks)]
    names = [kind.__name__ for kind in classes if isinstance(kind, type) and issubclass(kind, _IDLE)]
    return [f"callbacks that end a trial early or have nothing to write to: {listing(names)}"] if names else []
