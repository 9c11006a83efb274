"""How a request is divided: its optimizers, what each steps and, of a module, in which param groups."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightning_optim.build import OptimConfig, Part, divide, grouped, settle
from lightning_optim.choose import Shape, as_module
from lightning_optim.command import _render as render
from lightning_optim.command._machine import Facts
from lightning_optim.groups import NamedParameter, every_parameter, trainable
from lightning_optim.table import SUFFIX

_REST = "all other parameters"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says what is requested besides the name, and of which module."""
    parser.add_argument("--optim-args", metavar="ARGS", help="its options, 'name=value,...'")
    parser.add_argument("--param-groups", metavar="YAML", help="patterns, \"{'head.*': {optim: sgd, lr: 0.1}}\"")
    parser.add_argument("--config", metavar="FILE", help="a YAML file of LightningCLI or OptimCLI")
    parser.add_argument("--model", metavar="MODEL", help="shows what each optimizer steps of package.module:Class")
    parser.add_argument("--init-args", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the class")


def parts(asked: Mapping[str, Any], model: nn.Module | Shape | None) -> tuple[Facts, ...]:
    """Returns the optimizers of a request, the main one first, with their param groups if there is a model.

    Raises:
        ValueError, ImportError: If it cannot be built so.
    """
    config = OptimConfig(**asked)
    if model is None:
        return tuple(_part(part, takes, None) for part, takes in _without_model(config))
    everything = every_parameter(as_module(model, False))
    trained = trainable(everything)
    divided = divide(trained, config, everything)
    return tuple(_part(part, _takes(part, config, len(divided)), _groups(part, trained)) for part in divided)


def _without_model(config: OptimConfig) -> Iterator[tuple[Part, str]]:
    count = 1 + (config.others is not None) + len(config.parts)
    main = Part(config.optim.removesuffix(SUFFIX), config, [])
    yield main, _takes(main, config, count)
    if config.others is not None:
        yield Part(config.others.optim, config.others, []), _REST
    for pattern, own in config.parts.items():
        part = Part(pattern, own, [])
        yield part, _takes(part, config, count)


def _takes(part: Part, config: OptimConfig, count: int) -> str:
    if part.name in config.parts:
        return f"what {part.name!r} matches"
    if part.config.optim == config.optim and config.spec.takes != "all":
        return config.spec.takes
    return _REST if count > 1 else "all parameters"


def _part(part: Part, takes: str, groups: Facts | None) -> Facts:
    options, policy = settle(part.config)
    spec = part.config.spec
    return {
        "name": part.name,
        "identifier": part.config.optim,
        "implementation": spec.implementation,
        "takes": takes,
        "remark": part.remark or None,
        "lr": policy.lr,
        "weight_decay": policy.weight_decay if spec.decays else None,
        "options": options.settled().select("group", "constructor", "policy"),
        "lr_scheduler": part.config.lr_scheduler,
        "groups": groups,
    }


def _groups(part: Part, trained: list[NamedParameter]) -> Facts:
    return {
        group["name"]: {
            "tensors": len(group["params"]),
            "elements": sum(parameter.numel() for parameter in group["params"]),
            "lr": group["lr"],
        }
        for group in grouped(part, part.config, trained)[2]
    }


def as_lines(found: tuple[Facts, ...], model: str | None) -> list[str]:
    """Returns the section of the text."""
    lines = [f"Parts of {model}" if model else "Parts"]
    for part in found:
        numbers = {"lr": part["lr"], "weight_decay": part["weight_decay"], "lr_scheduler": part["lr_scheduler"]}
        shown = ", ".join(f"{name}={value}" for name, value in numbers.items() if value is not None)
        what = f"{part['identifier']} for {part['takes']}"
        lines += render.wrap(f"{what}: {part['implementation']} ({shown})", "  ", "  ")
        if part["remark"]:
            lines += render.wrap(part["remark"], "    ")
        rows = [
            [name, f"{group['tensors']} tensors", f"{group['elements']:,} elements", f"lr={group['lr']}"]
            for name, group in (part["groups"] or {}).items()
        ]
        lines += render.table(rows, "    ") if rows else []
    return lines
