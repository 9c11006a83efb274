"""The command's entry point: parses the arguments, runs a subcommand and turns errors into exit statuses."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lightning_optim import __version__
from lightning_optim.command import _bench as bench
from lightning_optim.command import _check as check
from lightning_optim.command import _consolidate as consolidate
from lightning_optim.command import _convert as convert
from lightning_optim.command import _doctor as doctor
from lightning_optim.command import _explain as explain
from lightning_optim.command import _info as info
from lightning_optim.command import _listing as listing
from lightning_optim.command import _memory as memory
from lightning_optim.command import _parts as parts
from lightning_optim.command import _recommend as recommend
from lightning_optim.command import _render as render
from lightning_optim.command._machine import CommandError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``lightning-optim``.

    Args:
        argv: The arguments after the command's name; ``None`` means ``sys.argv[1:]``.

    Returns:
        The exit status: 0 on success, 1 if ``doctor`` found a problem, ``check`` a broken promise, or a plugin is
        broken, 2 for a usage error.
    """
    arguments = _parser().parse_args(argv)
    try:
        report = arguments.subcommand_module.collect(arguments)
    except CommandError as error:
        print(f"lightning-optim {arguments.subcommand}: error: {error}", file=sys.stderr)
        return error.status
    try:
        print(render.as_json(report) if arguments.json else arguments.subcommand_module.as_text(report), flush=True)
    except BrokenPipeError:
        # Whoever reads has had enough, as `| head`. Python would flush again at its exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if report.get("ok", True) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-optim", description="Any optimizer for any LightningModule, by name."
    )
    parser.add_argument("--version", action="version", version=f"lightning_optim {__version__}")
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    shown = "the identifiers, and whether they can run here"
    patterns = "identifiers, or wildcards such as '*8bit*' (quote them); 'timm:*' for the classes of a collection"
    subparser = subparsers.add_parser("list", help=shown, description=f"Lists {shown}.")
    subparser.add_argument("patterns", nargs="*", metavar="PATTERN", help=patterns)

    shown = "one identifier: options, defaults, grouping, state bytes, an example"
    of_request = "With options, patterns, a configuration or a model it shows the parts of that request as well."
    subparser = subparsers.add_parser("info", help=shown, description=f"Describes {shown}. {of_request}")
    subparser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="identifier, alias, dotted path such as torch.optim.NAdam, or short name such as timm:lamb",
    )
    parts.add_arguments(subparser)

    shown = "versions, devices and packages here"
    exits = "Exits with 1 if an identifier for these devices cannot run."
    subparsers.add_parser("doctor", help=f"{shown}, and what to install", description=f"Shows {shown}. {exits}")

    subparser = subparsers.add_parser(
        "convert",
        help="Hugging Face's TrainingArguments to a configuration file",
        description="Converts Hugging Face's TrainingArguments to a configuration file for OptimCLI. Its comments say "
        "what is not simply written.",
    )
    subparser.add_argument("file", metavar="FILE", help="JSON or YAML, of LLaMA-Factory or axolotl, too; only read")
    subparser.add_argument("--output", metavar="FILE", help="write the configuration there, and print the remarks")

    shown = "the memory of training a model with one identifier, or with each"
    subparser = subparsers.add_parser("memory", help=shown, description=f"Estimates {shown}. Nothing is allocated.")
    memory.add_arguments(subparser)

    shown = "identifiers that fit: the estimate, the published claims, the lines to paste"
    subparser = subparsers.add_parser("recommend", help=f"ranks {shown}", description=f"Ranks {shown}.")
    recommend.add_arguments(subparser)

    shown = "optimizers on your module and data, or on a small GPT"
    how = "Each tries as many learning rates and is judged at the end of its schedule, over several seeds."
    again = "Ctrl-C interrupts it; the same command goes on where it stopped."
    subparser = subparsers.add_parser("bench", help=f"compares {shown}", description=f"Compares {shown}. {how} {again}")
    bench.add_arguments(subparser)

    shown = "identifiers and classes to the contract: training, states, stepping during backward, conventions"
    exits = "Exits with 1 if a promise is broken."
    subparser = subparsers.add_parser("check", help=f"holds {shown}", description=f"Holds {shown}. {exits}")
    check.add_arguments(subparser)

    shown = "a distributed checkpoint to one file for one device, optimizer states included"
    subparser = subparsers.add_parser("consolidate", help=shown, description=f"Brings {shown}. It must fit in memory.")
    subparser.add_argument("folder", metavar="FOLDER", help="the checkpoint, written by Lightning; only read")
    subparser.add_argument("output", metavar="FILE", help="the file to write")

    shown = "why something is refused, and what to do, by the code at the end of an error"
    subparser = subparsers.add_parser("explain", help=shown, description=f"Shows {shown}. Without a code it lists all.")
    subparser.add_argument("codes", nargs="*", metavar="CODE", help="such as LO101, or the name of one")

    modules = (listing, info, doctor, convert, memory, recommend, bench, check, consolidate, explain)
    for module, subparser in zip(modules, subparsers.choices.values(), strict=True):
        subparser.set_defaults(subcommand_module=module)
        subparser.add_argument("--json", action="store_true", help="print JSON for scripts instead of text")
    return parser
