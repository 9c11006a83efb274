"""``lightning-optim check``: identifiers and classes held to the contract."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from lightning_optim.command import _machine as machine
from lightning_optim.command import _render as render
from lightning_optim.command._listing import matching, short_names
from lightning_optim.command._machine import CommandError, Facts
from lightning_optim.errors import (
    IncompatibleTrainer,
    InvalidOption,
    InvalidParamGroups,
    MissingDependency,
    UnknownOptimizer,
)
from lightning_optim.table import REGISTRY, as_mapping, collection_of
from lightning_optim.testing import PROMISES, Result, held

_WRONG = (IncompatibleTrainer, InvalidOption, InvalidParamGroups, MissingDependency, UnknownOptimizer)
_SIGNS = {"kept": "+", "broken": "X", "refused": "r", "unsaid": "."}
_LEGEND = "+ kept, X broken, r refused with a reason, . not said by the row"


@dataclass(frozen=True)
class _Request:
    """What is to be checked.

    Attributes:
        label: As it was typed, or the identifier that a wildcard matches.
        name: Identifier or dotted path.
        arguments: Those of ``build_optimizer``.
        typed: Whether it was named, not matched.
    """

    label: str
    name: str
    arguments: dict[str, Any]
    typed: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="identifiers, wildcards such as '*8bit' (quote them), dotted paths of classes or short names such as "
        "timm:lamb, each with options if it needs some: NAME,lr=1e-3,option=value,...",
    )


def collect(arguments: argparse.Namespace) -> Facts:
    """Holds every requested optimizer to every promise; ``ok`` is False if one is broken or cannot be tried.

    Raises:
        CommandError: If a name or a wildcard names nothing.
    """
    with machine.folder_is_searched():
        try:
            requests = [request for text in arguments.names for request in _requests(text)]
        except _WRONG as error:
            raise CommandError(str(error)) from error
        found: dict[str, dict[str, Result]] = {}
        left_out: dict[str, str] = {}
        with tqdm(total=len(requests) * len(PROMISES), unit="promise", disable=None) as bar:
            for request in requests:
                bar.set_description(request.label)
                try:
                    found[request.label] = {result.promise: result for result in _held(request, bar)}
                except _WRONG as error:
                    left_out[request.label] = error.text
    broken = any(result.status == "broken" for results in found.values() for result in results.values())
    return {
        "ok": not broken and not any(request.typed and request.label in left_out for request in requests),
        "promises": {name: _text(name) for name in PROMISES},
        "optimizers": [
            {
                "optimizer": label,
                "results": {name: {"status": each.status, "text": each.text} for name, each in results.items()},
            }
            for label, results in found.items()
        ],
        "left_out": left_out,
    }


def _requests(text: str) -> Iterator[_Request]:
    name, _, options = text.partition(",")
    given = dict(as_mapping(options or None, name))
    arguments: dict[str, Any] = {key: given.pop(key) for key in ("lr", "weight_decay") if key in given}
    if given:
        arguments["optim_args"] = given
    if set(name) & set("*?["):
        for matched in short_names(name) if collection_of(name) else matching([name]):
            label = f"{matched},{options}" if options else matched
            yield _Request(label, matched, arguments, typed=False)
        return
    machine.identifiers()
    REGISTRY.find(name)
    yield _Request(text, name, arguments, typed=True)


def _held(request: _Request, bar: Any) -> Iterator[Result]:
    problems = machine.problems(REGISTRY.find(request.name))
    if problems:
        raise MissingDependency("; ".join(problems), code="LO107")
    with warnings.catch_warnings():
        # What a class says once about its arguments or the machine.
        warnings.simplefilter("ignore")
        for result in held(request.name, request.arguments):  # type: ignore[arg-type]
            bar.update()
            yield result


def _text(promise: str) -> str:
    return str(PROMISES[promise].__doc__).partition("\n")[0].rstrip(".").replace("``", "")


def as_text(report: Facts) -> str:
    """Returns the table, with a number for each promise, and below it what is broken, refused or remarked."""
    rows = report["optimizers"]
    numbers = {name: str(number) for number, name in enumerate(report["promises"], start=1)}
    table = [["optimizer", *numbers.values()]]
    table += [[row["optimizer"], *(_SIGNS[row["results"][name]["status"]] for name in numbers)] for row in rows]
    parts = [render.table(table)] if rows else []
    if rows:
        parts.append([*render.wrap(_LEGEND), *_promises(report["promises"], numbers)])
    for status, title in (("broken", "Broken"), ("refused", "Refused"), ("kept", "Kept, with a remark")):
        lines = [line for row in rows for line in _notes(row, status)]
        if lines:
            parts.append([title, *lines])
    if report["left_out"]:
        parts.append(["Not tried", *render.sentences(f"{label}: {why}" for label, why in report["left_out"].items())])
    broken = sum(any(each["status"] == "broken" for each in row["results"].values()) for row in rows)
    parts.append(render.wrap(f"{len(rows) - broken} of {len(rows)} break no promise."))
    return render.sections(*parts)


def _promises(texts: dict[str, str], numbers: dict[str, str]) -> list[str]:
    return render.properties([(f"{numbers[name]} {name}", text) for name, text in texts.items()])


def _notes(row: Facts, status: str) -> Iterator[str]:
    notes: dict[str, list[str]] = {}
    for name, each in row["results"].items():
        if each["status"] == status and each["text"]:
            notes.setdefault(each["text"], []).append(name)
    for text, names in notes.items():
        yield from render.sentences([f"{row['optimizer']}, {', '.join(names)}: {text}"])
