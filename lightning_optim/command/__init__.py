"""The ``lightning-optim`` command: what there is, what it does, whether it can run here.

Each subcommand collects a report, plain facts, which is its JSON, and renders that as text. What is shown of a row is
``view``, whoever asks: ``list``, ``info``, or ``docs/generate.py``, which makes a page of it. No optional package is
imported; whether one can be used is read from its metadata.
"""

from __future__ import annotations

from lightning_optim.command._entry import main
from lightning_optim.command._machine import Facts
from lightning_optim.command._render import markdown_table
from lightning_optim.command._view import options as describe_options
from lightning_optim.command._view import view

__all__ = ["Facts", "describe_options", "main", "markdown_table", "view"]
