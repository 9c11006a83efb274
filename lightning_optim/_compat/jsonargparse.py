"""What is used of jsonargparse, or of argparse below it, that it does not promise."""

from __future__ import annotations

from argparse import Action, ArgumentParser

__all__ = ["actions"]


def actions(parser: ArgumentParser) -> list[Action]:
    """Returns a parser's arguments: OptimCLI makes those optional that ``--optimizer CLASS`` alone needs."""
    return parser._actions
