"""``lightning-optim info NAME``: everything about one identifier."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_optim.choose import name_of
from lightning_optim.command import _machine as machine
from lightning_optim.command import _render as render
from lightning_optim.command._machine import CommandError, Facts
from lightning_optim.command._model import BadRequest, model_of, optim_of, read_config
from lightning_optim.command._parts import as_lines, parts
from lightning_optim.command._view import strategy_lines, view
from lightning_optim.errors import IncompatibleTrainer, MissingDependency, UnknownOptimizer
from lightning_optim.table import REGISTRY, SUFFIX

_SCOPES = {"group": "per group", "constructor": "optimizer", "policy": "grouping", "layerwise": "layerwise"}

# Longer types, which list many words, are shown before the help instead.
_LONGEST_TYPE = 16

_SCOPES_HELP = (
    "scope: 'per group' may differ between param_groups, 'optimizer' is one value for all parameters, 'grouping' is "
    "read by lightning_optim when it divides the parameters, 'layerwise' when it steps them during backward."
)


def collect(arguments: argparse.Namespace) -> Facts:
    """Describes an identifier or dotted path, and how a request is divided.

    Raises:
        CommandError: If there is none, its package is missing, or the request makes no sense.
    """
    try:
        request = read_config(arguments.config) if arguments.config else {}
        asked = optim_of(argparse.Namespace(**{**vars(arguments), "optim": arguments.name}), request)
        model = model_of(arguments, request)[0] if arguments.model or _names_model(request) else None
        if not asked:
            raise BadRequest("no optimizer given: name one, as in `lightning-optim info sgd`, or a --config that does")
    except (BadRequest, ValueError) as error:
        raise CommandError(str(error)) from error
    name = asked["optim"]
    # Before the lookup below, which would load the plugins too: a broken one has its own error.
    declared = name.removesuffix(SUFFIX) in machine.identifiers()
    try:
        spec = REGISTRY.find(name)
    except (UnknownOptimizer, MissingDependency, IncompatibleTrainer) as error:
        raise CommandError(str(error)) from error
    shows = [*asked] != ["optim"] or model is not None or spec.takes != "all"
    try:
        divided = parts(asked, model) if shows else None
    except (ValueError, ImportError) as error:
        raise CommandError(str(error)) from error
    return {**view(name, spec, declared), "parts": divided, "model": None if model is None else name_of(model)}


def _names_model(request: Mapping[str, Any]) -> bool:
    return isinstance(request.get("model"), Mapping) and "class_path" in request["model"]


def as_text(report: Facts) -> str:
    """Returns the description in sections."""
    alias = f" (alias of {report['alias_of']})" if report["alias_of"] else ""
    return render.sections(
        render.wrap(f"{report['identifier']}{alias}: {report['summary']}"),
        render.properties(list(_facts(report))),
        *([as_lines(report["parts"], report["model"])] if report["parts"] else []),
        ["Options (optim_args)", *_options(report["options"])],
        ["Param groups, schedule, modes", *render.sentences(report["grouping"]["policy"])],
        ["State", *_state(report["state"])],
        *([["Note", *render.sentences([report["note"]])]] if report["note"] else []),
        ["Example in Python", textwrap.indent(report["example"]["python"], "  ")],
        [
            "The same on the command line, where train.py calls OptimCLI(LitModel)",
            *_command_line(report["example"]["command_line"]),
        ],
    )


def _facts(report: Facts) -> Iterator[tuple[str, str]]:
    yield "class", report["implementation"]
    if report["target"] != report["implementation"]:
        yield "built as", report["target"]
    if report["fixed"]:
        yield "with", ", ".join(f"{key}={value}" for key, value in report["fixed"].items())
    if report["aliases"]:
        yield "aliases", ", ".join(report["aliases"])
    yield "source", report["source"]
    for package in report["packages"]:
        yield "needs", f"{package['distribution']}{package['versions']}, installed: {package['installed'] or 'no'}"
        yield "install", package["install"]
    if report["extra"]:
        yield "extra", f"{report['extra']} (of lightning-optim)"
    yield "runs here", "yes" if report["available"] else "no:"
    for problem in report["problems"]:
        yield "", problem
    yield "devices", "every device" if report["devices"] is None else ", ".join(report["devices"])
    if report["cannot_step"] is None:
        yield "refused for", "nothing: of a class by dotted path only its first step shows what it cannot do"
    else:
        yield "refused for", ", ".join(report["cannot_step"]) or "nothing"
    yield from strategy_lines(report)
    yield "lr", "must be given" if report["lr"] is None else f"{report['lr']!r} by default"
    yield "weight_decay", "takes none" if report["weight_decay"] is None else f"{report['weight_decay']!r} by default"


def _options(options: tuple[Facts, ...]) -> list[str]:
    if not options:
        return ["  none"]
    rows = [["name", "type", "default", "allowed", "scope"]]
    helps = []
    for option in options:
        short = len(option["type"]) <= _LONGEST_TYPE
        default = "required" if option["required"] else repr(option["default"])
        scope = _SCOPES[option["scope"]]
        rows.append([option["name"], option["type"] if short else "one of", default, option["range"] or "-", scope])
        helps.append(option["help"] if short else f"{option['type']}: {option['help']}")
    lines = render.table(rows, "  ")
    entries = [
        text for line, help in zip(lines[1:], helps, strict=True) for text in (line, *render.wrap(help, "      "))
    ]
    return [lines[0], *entries, *render.wrap(_SCOPES_HELP, "  ")]


def _state(state: Facts | None) -> list[str]:
    if state is None:
        return ["  not known"]
    lines = []
    if state["bytes"] is not None:
        each = f"{state['bytes_per_element']:.3g} bytes per element"
        size = f"{state['bytes']:,} bytes for a parameter of {state['parameter']} ({each}), options at their defaults"
        lines = render.wrap(size, "  ")
    rows = [
        [buffer["name"], buffer["storage"], "" if buffer["by_default"] else "if the options ask for it"]
        for buffer in state["buffers"]
    ]
    return [*lines, *render.table(rows, "    "), *render.sentences(state["quantization"])]


def _command_line(line: str) -> list[str]:
    # Keeps an option and its value on one line.
    pieces = " ".join(map(render.together, re.split(r" (?=--)", line)))
    *lines, last = render.wrap(pieces, "  ", "  ", width=render.WIDTH - 5)
    return [*(f"{line} \\" for line in lines), last]
