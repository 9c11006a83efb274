"""``lightning-optim recommend``: which identifier to take, why, and the lines to paste."""

from __future__ import annotations

import argparse
from typing import cast, get_args

from lightning_optim.choose import Estimator, Preference, Setting, Task, rank
from lightning_optim.command import _memory as memory
from lightning_optim.command import _render as render
from lightning_optim.command._machine import CommandError, Facts
from lightning_optim.command._model import BadRequest, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    memory.add_model_arguments(parser)
    parser.add_argument("--memory", metavar="SIZE", help="of one device, such as 24GiB; no limit by default")
    parser.add_argument("--task", choices=get_args(Task), help="what is trained")
    parser.add_argument("--prefer", choices=get_args(Preference), default="quality", help="quality by default")
    parser.add_argument("--limit", type=int, default=3, metavar="N", help="show the first N; 3 by default")


def collect(arguments: argparse.Namespace) -> Facts:
    """Ranks.

    Raises:
        CommandError: If the request makes no sense, or nothing fits.
    """
    try:
        request = read_config(arguments.config) if arguments.config else {}
        limit = memory.size_of("--memory", arguments.memory) if arguments.memory else None
        if arguments.limit < 1:
            raise BadRequest(f"--limit {arguments.limit} shows nothing: give 1 or more")
        model, given = memory.setting_of(arguments, request)
        setting = cast(Setting, given)
        found = rank(Estimator(model, **setting), setting, memory=limit, task=arguments.task, prefer=arguments.prefer)
    except (BadRequest, ValueError, ImportError) as error:
        raise CommandError(str(error)) from error
    return {
        "memory": limit,
        "task": arguments.task,
        "prefer": arguments.prefer,
        "recommendations": [one.as_dict() for one in found[: arguments.limit]],
    }


def as_text(report: Facts) -> str:
    """Returns each identifier with its memory, the claims for it, and the lines to paste."""
    estimate = report["recommendations"][0]["estimate"]
    limit = f", {memory.shown(report['memory'])} of memory" if report["memory"] else ""
    task = f", {report['task']}" if report["task"] else ""
    head = f"{estimate['model']}, {estimate['precision']}, {estimate['accelerator']}{limit}{task}"
    sections = [[f"{head}: by {report['prefer']}"]]
    for place, one in enumerate(report["recommendations"], start=1):
        estimate = one["estimate"]
        peak = estimate["peak"] - estimate["pageable"]
        paged = f", and {memory.shown(estimate['pageable'])} that can leave it" if estimate["pageable"] else ""
        met = ", ".join(f"{name} {count}" for name, count in one["conditions"].items()) or "none"
        lines = [f"{place}. {one['optim']}: {memory.shown(peak)} on the device{paged}; conditions met: {met}"]
        for claim in one["evidence"]:
            lines += render.wrap(f"- {claim['says']} ({claim['source']})", "   ", hanging="  ")
        if one["inherited"]:
            lines.append("   - said of the form without _layerwise, whose steps it takes during backward")
        lines += [f"   Not on this machine: {reason}" for reason in one["missing"]]
        lines += [f"   {one['python']}", f"   {one['command_line']}"]
        sections.append(lines)
    return render.sections(*sections)
