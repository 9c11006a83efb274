"""The ``lightning-optim`` command: the identifiers, what each one does, and whether it can run here.

Each subcommand collects a report of plain facts, which is its JSON, and renders it as text. ``list``, ``info`` and
``docs/generate.py`` all show a row by ``view``. No optional package is imported; whether one can be used is read from
its metadata.
"""

from __future__ import annotations

from lightning_optim.command._entry import main
from lightning_optim.command._machine import Facts
from lightning_optim.command._render import markdown_table
from lightning_optim.command._view import options as describe_options
from lightning_optim.command._view import view

__all__ = ["Facts", "describe_options", "main", "markdown_table", "view"]
