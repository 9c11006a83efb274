"""``lightning-optim convert FILE``: a file for OptimCLI from Hugging Face's ``TrainingArguments``.

What it prints is that file: the remarks are its comments.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from lightning_optim.build import Conversion, OptimConfig, convert_training_arguments
from lightning_optim.command import _render as render
from lightning_optim.command._machine import CommandError, Facts, write_file
from lightning_optim.errors import IncompatibleTrainer, InvalidOption, UnknownOptimizer

_HEADINGS = {
    "differs": "Written, with a difference",
    "unused": "Without an effect there, so not written",
    "yours": "Yours to write elsewhere",
    "none": "No counterpart",
    "unknown": "Not arguments of the Trainer",
}


def collect(arguments: argparse.Namespace) -> Facts:
    """Converts the file, and writes the one that was asked for.

    Raises:
        CommandError: If it cannot be read, converted or written.
    """
    try:
        conversion = convert_training_arguments(arguments.file)
        OptimConfig(**conversion.optim)
    except (InvalidOption, UnknownOptimizer, IncompatibleTrainer) as error:
        raise CommandError(str(error)) from error
    report = _facts(arguments.file, conversion)
    if arguments.output:
        text = _as_file(report) + "\n"
        # A file that is there may be somebody's work.
        write_file(Path(arguments.output), lambda beside: beside.write_text(text, encoding="utf-8"), new=True)
    return report | {"output": arguments.output}


def _facts(file: str, conversion: Conversion) -> Facts:
    return {
        "file": file,
        "dialect": conversion.dialect,
        "config": conversion.config,
        "written": conversion.written,
        "remarks": [
            {"kind": remark.kind, "values": remark.values, "given": remark.given, "text": remark.text}
            for remark in conversion.remarks
        ],
        "silent": conversion.silent,
        "yaml": conversion.as_yaml(),
    }


def as_text(report: Facts) -> str:
    """Returns the file; where one was written, what to know of it."""
    if not report["output"]:
        return _as_file(report)
    return render.sections([f"Wrote {report['output']}"], *_remarks(report))


def _as_file(report: Facts) -> str:
    """Returns YAML with the remarks as comments."""
    title = f"{Path(report['file']).name}, converted from {report['dialect']}: python train.py fit --config THIS_FILE"
    comments = (["# " + line for line in lines] for lines in _remarks(report))
    return render.sections([*render.wrap(title, "# "), *report["yaml"].splitlines()], *comments)


def _remarks(report: Facts) -> Iterator[list[str]]:
    width = render.WIDTH - len("# ")
    for kind, heading in _HEADINGS.items():
        remarks = [remark for remark in report["remarks"] if remark["kind"] == kind]
        texts = [f"- {remark['given']}: {remark['text']}".removesuffix(": ") for remark in remarks]
        if texts:
            yield [heading, *(line for text in texts for line in render.wrap(text, "  ", "  ", width))]
    if report["silent"]:
        yield [
            "At Hugging Face's default, nothing to write",
            *render.wrap(", ".join(report["silent"]), "  ", "", width),
        ]
