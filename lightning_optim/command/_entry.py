"""The command's entry point: parses the arguments, runs a subcommand, turns errors into exit statuses."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_optim import __version__
from lightning_optim.command import _doctor as doctor
from lightning_optim.command import _info as info
from lightning_optim.command import _listing as listing
from lightning_optim.command._output import CommandError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``lightning-optim``.

    Args:
        argv: The arguments after the command's name; ``None`` takes those of the process.

    Returns:
        The exit status: 0 if all is well, 1 if ``doctor`` found a problem or a plugin is broken, 2 for a wrong request.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-optim", description="Any optimizer for any LightningModule, by name."
    )
    parser.add_argument("--version", action="version", version=f"lightning_optim {__version__}")
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for subcommand in (listing, info, doctor):
        subcommand.add_parser(subparsers)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except CommandError as error:
        print(f"lightning-optim {arguments.subcommand}: error: {error}", file=sys.stderr)
        return error.status
    return status
