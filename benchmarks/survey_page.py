"""The page of ``survey.py``: what is broken in how many classes, and a table for each collection."""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

SIGNS = {"kept": "+", "remark": "~", "broken": "X", "refused": "r", "unsaid": ".", "late": "t", "untried": " "}
_STATUSES = {sign: status for status, sign in SIGNS.items()}
_LEGEND = (
    "`+` kept, `~` kept with a remark, `X` broken, `r` refused with a reason, `t` took too long or ended the process, "
    "empty: not tried"
)
# How a text begins where something is raised that the promise is not about.
_ERROR = "expected no error; "
# A promise about rows; a class by its path has none.
_LEFT_OUT = ("state_bytes",)
# What some texts are colored with.
_COLORS = re.compile(r"\x1b\[[\d;]*m")
# How many classes a reason names.
_NAMED = 8
_WIDTH = 120


def compact(record: dict[str, Any], promises: Iterable[str]) -> dict[str, Any]:
    """Returns what is kept of a class: one sign for each promise, and the texts of what is not simply kept."""
    results = record["results"]
    kept = {"name": record["name"], "class": record["class"], "problem": record["problem"]}
    if record["problem"] is not None:
        return kept
    texts = {
        name: _COLORS.sub("", result["text"])
        for name, result in results.items()
        if result["text"] and name not in _LEFT_OUT
    }
    return kept | {"signs": "".join(_sign(results[name]) for name in promises), "texts": texts}


def _sign(result: dict[str, str]) -> str:
    return SIGNS["remark" if result["status"] == "kept" and result["text"] else result["status"]]


def page(report: dict[str, Any]) -> str:
    """Returns the page for what :func:`compact` made of the records."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: dict[str, Any]) -> Iterator[str]:
    collections = {name: records for name, records in report["collections"].items() if records}
    everything = [record for records in collections.values() for record in records]
    tried = [record for record in everything if record["problem"] is None]
    promises = [name for name in report["promises"] if name not in _LEFT_OUT]
    status = {name: {each["name"]: _status(each, name, report) for each in tried} for name in promises}
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    yield from _paragraphs(
        "# Optimizers of other packages",
        "`make survey` holds every optimizer class of these packages to the promises of "
        "[Check an optimizer](checking.md), by the functions that hold our own identifiers to them: "
        f"{len(everything)} classes, of which {len(tried)} can be "
        "built here from parameters and options alone. This page is what it wrote.",
        f"{report['date']}: {versions}; Python {report['python']}, {report['hardware']}. Defaults of each class, "
        f"lr={report['lr']:g} where it has none; at most {report['limit']:.0f} s for each. timm imports torchvision "
        f"{report['torchvision']}; no optimizer calls these.",
    )
    rows = [_summary(name, records, report) for name, records in collections.items()]
    yield from _table(
        ("collection", "classes", "built", "break no promise", "resume exactly", "layerwise as plain"), rows
    )
    yield ""
    yield from _layerwise(tried, report)
    yield from _paragraphs("## The promises", _LEGEND)
    rows = [_promise(number, name, report, status[name]) for number, name in enumerate(promises, start=1)]
    yield from _table(("", "promise", "kept", "broken", "refused", "too long or ended"), rows)
    yield ""
    yield from _paragraphs(
        "## What is broken, and how",
        "By promise, with what was expected, and how many classes it is broken in. What cannot take a step is listed "
        "under `trains` only. All texts are in `docs/bench/survey.json`.",
    )
    steps = [each for each in tried if not each["texts"].get(promises[0], "").startswith(_ERROR)]
    for name in promises:
        yield from _reasons(f"**{name}**", _by_reason(tried if name == promises[0] else steps, name, report))
    unbuilt = [record for record in everything if record["problem"] is not None]
    if unbuilt:
        yield from _paragraphs("## What cannot be built")
        grouped: dict[str, list[str]] = defaultdict(list)
        for record in unbuilt:
            grouped[_without_name(record)].append(record["name"])
        yield from _reasons("", grouped)
    for name, records in collections.items():
        yield from _paragraphs(f"## {name}")
        numbers = [str(number) for number in range(1, len(promises) + 1)]
        rows = [[f"`{record['name']}`", *_signs(record, promises, report)] for record in records]
        yield from _table(("class", *numbers), rows)
        yield ""


def _layerwise(tried: Sequence[dict[str, Any]], report: dict[str, Any]) -> Iterator[str]:
    by_status: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in tried:
        by_status[_status(record, "layerwise", report)].append(record)
    differ = [each["name"] for each in by_status["broken"] if not each["texts"]["layerwise"].startswith(_ERROR)]
    text = f"{len(differ)} differ: {_names(differ, len(differ))}." if differ else "none differs in silence."
    yield from _paragraphs(
        f"Stepped during backward (`_layerwise`) instead of plainly, {text} {len(by_status['refused'])} are refused, "
        "most because a few steps of small parameters show that one depends on the others. For "
        f"{len(by_status['remark'])}, a remark says that random numbers are drawn in another order, or that rounding "
        f"is amplified. {len(by_status['broken']) - len(differ)} end in an error, as those under `trains` below do in "
        "plain steps, too."
    )


def _summary(name: str, records: Sequence[dict[str, Any]], report: dict[str, Any]) -> list[str]:
    tried = [record for record in records if record["problem"] is None]
    unbroken = sum(not set(record["signs"]) & {"X", "t", " "} for record in tried)
    counts = [
        sum(_status(record, promise, report) in ("kept", "remark") for record in tried)
        for promise in ("resume", "layerwise")
    ]
    return [f"{name} {report['versions'][name]}", *map(str, (len(records), len(tried), unbroken, *counts))]


def _promise(number: int, name: str, report: dict[str, Any], status: dict[str, str]) -> list[str]:
    text = report["promises"][name].rstrip(".").replace("``", "`")
    counts = [
        sum(each in kinds for each in status.values()) for kinds in (("kept", "remark"), "broken", "refused", "late")
    ]
    return [str(number), f"{name}: {text}", *map(str, counts)]


def _status(record: dict[str, Any], promise: str, report: dict[str, Any]) -> str:
    return _STATUSES[record["signs"][list(report["promises"]).index(promise)]]


def _signs(record: dict[str, Any], promises: Sequence[str], report: dict[str, Any]) -> list[str]:
    if record["problem"] is not None:
        return [""] * len(promises)
    return [SIGNS[_status(record, promise, report)] for promise in promises]


def _by_reason(records: Sequence[dict[str, Any]], promise: str, report: dict[str, Any]) -> dict[str, list[str]]:
    """Returns the classes that break a promise, by what was expected and the kind of what happened."""
    grouped: dict[str, list[str]] = defaultdict(list)
    said: dict[str, str] = {}
    for record in records:
        if _status(record, promise, report) == "broken":
            expected, _, happened = record["texts"][promise].partition("; ")
            kind = happened.partition(": ")[0]
            raised = f" ({kind})" if kind.endswith("Error") and " " not in kind else ""
            reason = f"{expected}{raised}".replace("expected no error (", "ends in an error (")
            if raised:
                said.setdefault(reason, textwrap.shorten(happened.removeprefix(f"{kind}: "), 100, placeholder=" ..."))
            grouped[reason].append(record["name"])
    return {f"{reason}, as in {said[reason]!r}" if reason in said else reason: grouped[reason] for reason in grouped}


def _reasons(title: str, grouped: dict[str, list[str]]) -> Iterator[str]:
    if not grouped:
        return
    if title:
        yield from _paragraphs(title)
    for reason, names in sorted(grouped.items(), key=lambda item: -len(item[1])):
        text = f"- {len(names)}: {_escaped(reason)}: {_names(names, _NAMED)}."
        yield from textwrap.wrap(text, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    yield ""


def _names(names: Sequence[str], limit: int) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def _without_name(record: dict[str, Any]) -> str:
    """Returns why a class cannot be built, as far as others have the same reason."""
    text = record["problem"].replace(f"optim={record['name']!r}", "it").replace(f"{record['name']!r}", "it")
    # What a signature holds differs from class to class.
    return text.partition("; Allowed")[0].partition(": ['")[0].rstrip(".")


def _escaped(text: str) -> str:
    for character in "\\`*_<>[]|":
        text = text.replace(character, f"\\{character}")
    return text


def _paragraphs(*texts: str) -> Iterator[str]:
    for text in texts:
        yield from textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
        yield ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for cells in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(cells)} |"
