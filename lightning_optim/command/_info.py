"""``lightning-optim info NAME``: all there is to know of one identifier."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_optim.command import _describe as describe
from lightning_optim.command import _machine as machine
from lightning_optim.command import _output as output
from lightning_optim.command._describe import Example, Grouping, State
from lightning_optim.command._machine import Package
from lightning_optim.command._output import CommandError
from lightning_optim.errors import IncompatibleTrainer, MissingDependency, UnknownOptimizer
from lightning_optim.table import REGISTRY, SUFFIX, OptionInfo
from lightning_optim.table import describe as describe_options

_SCOPES = {"group": "per group", "constructor": "optimizer", "policy": "grouping", "layerwise": "layerwise"}

# Types that list many words stand before the help.
_LONGEST_TYPE = 16

_SCOPES_HELP = (
    "scope: 'per group' may differ between param_groups, 'optimizer' is one value for all parameters, 'grouping' is "
    "read by lightning_optim when it divides the parameters, 'layerwise' when it steps them during backward."
)


@dataclass(frozen=True)
class OptionEntry:
    """One option.

    Attributes:
        name: Its name in ``optim_args``.
        type: Its type, in words.
        required: Whether it must be given.
        default: Its default, ``None`` if it is required.
        range: Allowed values, or ``None`` if the type says it all.
        help: One line.
        scope: ``"group"``, ``"constructor"``, ``"policy"`` or ``"layerwise"``.
        per_group: Whether it may differ between param groups.
    """

    name: str
    type: str
    required: bool
    default: Any
    range: str | None
    help: str
    scope: str
    per_group: bool

    @classmethod
    def of(cls, info: OptionInfo) -> OptionEntry:
        """Makes the entry of an option."""
        required = info.default is dataclasses.MISSING
        return cls(
            name=info.name,
            type=info.type,
            required=required,
            default=None if required else info.default,
            range=info.range or None,
            help=info.help,
            scope=info.scope,
            per_group=info.scope == "group",
        )


@dataclass(frozen=True)
class Info:
    """What ``info`` shows.

    Attributes:
        identifier: The name asked for.
        alias_of: The row's name if that is an alias, else ``None``.
        aliases: The row's other names.
        summary: One line.
        implementation: The class whose algorithm runs.
        target: The class that is built: ``implementation`` or our adapter of it.
        fixed: Constructor arguments that make the row what it is.
        source: Paper or library.
        packages: What it needs beyond torch.
        extra: The extra of our distribution that installs that, or ``None``.
        available: Whether it can run here.
        problems: Why not, each with its remedy.
        devices: Device types it runs on; ``None`` means every device.
        cannot_step: Kinds of parameters and gradients it is refused for; ``None`` if nothing is known.
        lr: Default learning rate; ``None`` if one must be given.
        weight_decay: Default weight decay; ``None`` if it takes none.
        options: What ``optim_args`` takes.
        grouping: How parameters are divided and stepped.
        state: What it stores; ``None`` if nothing is known.
        note: A limitation worth a line, or ``None``.
        example: Code to start from.
    """

    identifier: str
    alias_of: str | None
    aliases: tuple[str, ...]
    summary: str
    implementation: str
    target: str
    fixed: Mapping[str, Any]
    source: str
    packages: tuple[Package, ...]
    extra: str | None
    available: bool
    problems: tuple[str, ...]
    devices: tuple[str, ...] | None
    cannot_step: tuple[str, ...] | None
    lr: float | None
    weight_decay: float | None
    options: tuple[OptionEntry, ...]
    grouping: Grouping
    state: State | None
    note: str | None
    example: Example


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the subcommand ``info``."""
    parser = subparsers.add_parser(
        "info",
        help="one identifier: options, defaults, grouping, state bytes, an example",
        description="Describes one identifier: options, defaults, grouping, state bytes, an example.",
    )
    parser.add_argument("name", metavar="NAME", help="identifier, alias or dotted path such as torch.optim.NAdam")
    output.add_json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs ``info``."""
    output.show(collect(arguments.name), render, arguments.json)
    return 0


def collect(name: str) -> Info:
    """Describes the identifier or dotted path ``name``.

    Raises:
        CommandError: If there is no such optimizer, or a dotted path leads into a package that is not installed.
    """
    # Before the lookup below, which would load the plugins: a broken one is an error of its own.
    declared = name.removesuffix(SUFFIX) in machine.identifiers()
    try:
        spec = REGISTRY.find(name)
    except (UnknownOptimizer, MissingDependency, IncompatibleTrainer) as error:
        raise CommandError(str(error)) from error
    problems = machine.problems(spec)
    return Info(
        identifier=name,
        alias_of=None if name == spec.name else spec.name,
        aliases=spec.aliases,
        summary=spec.summary,
        implementation=spec.implementation,
        target=spec.target.replace(":", "."),
        fixed=spec.fixed,
        source=spec.source,
        packages=tuple(map(Package.of, spec.requirements)),
        extra=spec.extra or None,
        available=not problems,
        problems=problems,
        devices=None if spec.devices is None else tuple(sorted(spec.devices)),
        cannot_step=describe.cannot_step(spec) if declared else None,
        lr=spec.default_lr,
        weight_decay=spec.default_weight_decay if spec.decays else None,
        options=tuple(map(OptionEntry.of, describe_options(spec.options))),
        grouping=describe.grouping(spec),
        state=describe.state(spec),
        note=spec.note or None,
        example=describe.example(name, spec),
    )


def render(info: Info) -> str:
    """Returns the description, section by section."""
    alias = f" (alias of {info.alias_of})" if info.alias_of else ""
    sections = [
        [*output.wrap(f"{info.identifier}{alias}: {info.summary}"), "", *output.properties(_facts(info), "  ")],
        ["Options (optim_args)", *_options(info)],
        ["Param groups, schedule, modes", *_sentences(info.grouping.policy)],
        ["State", *_state(info.state)],
        *([["Note", *_sentences((info.note,))]] if info.note else []),
        ["Example in Python", *_indented(info.example.python)],
        ["The same on the command line, where train.py calls OptimCLI(LitModel)", *_command_line(info.example)],
    ]
    return "\n\n".join("\n".join(section) for section in sections)


def _facts(info: Info) -> list[tuple[str, str]]:
    facts = [("class", info.implementation)]
    if info.target != info.implementation:
        facts.append(("built as", info.target))
    if info.fixed:
        facts.append(("with", ", ".join(f"{key}={value}" for key, value in info.fixed.items())))
    if info.aliases:
        facts.append(("aliases", ", ".join(info.aliases)))
    facts.append(("source", info.source))
    for package in info.packages:
        facts.append(("needs", f"{package.distribution}{package.versions}, installed: {package.installed or 'no'}"))
        facts.append(("install", package.install))
    if info.extra:
        facts.append(("extra", f"{info.extra} (of lightning-optim)"))
    facts.append(("runs here", "yes" if info.available else "no:"))
    facts += [("", problem) for problem in info.problems]
    facts.append(("devices", "every device" if info.devices is None else ", ".join(info.devices)))
    facts.append(("refused for", _refused_for(info)))
    facts.append(("lr", "must be given" if info.lr is None else f"{info.lr!r} by default"))
    facts.append(("weight_decay", "takes none" if info.weight_decay is None else f"{info.weight_decay!r} by default"))
    return facts


def _refused_for(info: Info) -> str:
    if info.cannot_step is None:
        return "nothing: of a class by dotted path only its first step shows what it cannot do"
    return ", ".join(info.cannot_step) or "nothing"


def _options(info: Info) -> list[str]:
    if not info.options:
        return ["  none"]
    rows = [["name", "type", "default", "allowed", "scope"]]
    rows += [
        [
            option.name,
            option.type if len(option.type) <= _LONGEST_TYPE else "one of",
            "required" if option.required else repr(option.default),
            option.range or "-",
            _SCOPES[option.scope],
        ]
        for option in info.options
    ]
    header, *lines = output.columns(rows, "  ")
    helps = [output.wrap(_help(option), "      ") for option in info.options]
    entries = [text for line, help in zip(lines, helps, strict=True) for text in (line, *help)]
    return [header, *entries, *output.wrap(_SCOPES_HELP, "  ")]


def _help(option: OptionEntry) -> str:
    return option.help if len(option.type) <= _LONGEST_TYPE else f"{option.type}: {option.help}"


def _state(state: State | None) -> list[str]:
    if state is None:
        return ["  not known"]
    lines = []
    if state.bytes is not None:
        lines = output.wrap(
            f"{state.bytes:,} bytes for a parameter of {state.parameter} ({state.bytes_per_element:.3g} bytes per "
            "element), options at their defaults",
            "  ",
        )
    rows = [
        [buffer.name, buffer.storage, "" if buffer.by_default else "if the options ask for it"]
        for buffer in state.buffers
    ]
    return [*lines, *output.columns(rows, "    "), *_sentences(state.quantization)]


def _sentences(sentences: tuple[str, ...]) -> list[str]:
    return [line for sentence in sentences for line in output.wrap(f"- {sentence}", "  ", "  ")]


def _command_line(example: Example) -> list[str]:
    # An option and its value stay on one line.
    pieces = example.command_line.replace(" --", "\n--").split("\n")
    lines, current = [], ""
    for piece in pieces:
        if current and len(current) + len(piece) > output.WIDTH - 8:
            lines.append(f"{current} \\")
            current = f"  {piece}"
        else:
            current = f"{current} {piece}" if current else piece
    return _indented("\n".join([*lines, current]))


def _indented(text: str) -> list[str]:
    return [f"  {line}" if line else "" for line in text.split("\n")]
