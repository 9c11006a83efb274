"""``lightning-optim bench``: optimizers compared on the user's module and data."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lightning_optim.bench import (
    TRIALS,
    Comparison,
    Judgement,
    Measurements,
    chosen,
    configured,
    demo,
    draw,
    new_figure,
    summarize,
)
from lightning_optim.command import _render as render
from lightning_optim.command._machine import CommandError, Facts, write_file
from lightning_optim.errors import (
    IncompatibleTrainer,
    InvalidOption,
    InvalidParamGroups,
    MissingDependency,
    UnknownOptimizer,
    UnknownSchedule,
)

_MIB = 2**20
_REPORT, _TEXT, _PICTURE = "report.json", "report.txt", "bench.png"
# Of the shell, for a process that Ctrl-C ended.
_INTERRUPTED = 128 + signal.SIGINT
_RATES, _SEEDS, _QUICK_STEPS = 5, 3, 75
_WRONG = (
    IncompatibleTrainer,
    InvalidOption,
    InvalidParamGroups,
    MissingDependency,
    UnknownOptimizer,
    UnknownSchedule,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "optimizers",
        nargs="*",
        metavar="NAME",
        help="identifiers, the reference first, each with options if it needs some: NAME,option=value,...; without "
        "any, those of the published rankings that can run here",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a file of your OptimCLI or LightningCLI")
    parser.add_argument("--model", metavar="CLASS", help="your LightningModule, as in train.LitModel")
    parser.add_argument("--data", metavar="CLASS", help="your LightningDataModule, if the module has no data itself")
    parser.add_argument("--steps", type=int, help="steps per training (default: max_steps of the config)")
    parser.add_argument(
        "--lrs", type=int, help=f"learning rates that each tries around its default (default: {_RATES})"
    )
    parser.add_argument("--seeds", type=int, help=f"trainings at the best rate that are judged (default: {_SEEDS})")
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="what to judge by, as your module logs it (default: val_loss, or else the loss)",
    )
    parser.add_argument("--maximize", action="store_true", help="more of the metric is better")
    parser.add_argument(
        "--quick", action="store_true", help=f"a first look: {_QUICK_STEPS} steps, and a smaller built-in GPT"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("bench_output"), metavar="FOLDER", help="results (default: bench_output)"
    )
    parser.add_argument("--no-picture", action="store_true", help="draw nothing, for which matplotlib is not needed")


def collect(arguments: argparse.Namespace) -> Facts:
    """Measures what is missing in the output folder, and writes and returns the report.

    Raises:
        CommandError: If the request cannot work, a file cannot be written, or Ctrl-C ended it.
    """
    try:
        if not arguments.no_picture:
            new_figure()
        measurements = Measurements(_comparison(arguments))
        try:
            measurements.take()
        except KeyboardInterrupt:
            raise CommandError(_left(measurements), status=_INTERRUPTED) from None
    except _WRONG as error:
        raise CommandError(str(error)) from error
    return _written(summarize(measurements), arguments)


def _comparison(arguments: argparse.Namespace) -> Comparison:
    if arguments.config or arguments.model:
        workload = configured(arguments.config, arguments.model, arguments.data)
    elif arguments.data:
        raise InvalidOption(
            f"--data {arguments.data} without a module: add --model CLASS or --config FILE", code="LO907"
        )
    else:
        workload = demo(arguments.quick)
    steps = arguments.steps
    if steps is None:
        steps = _QUICK_STEPS if arguments.quick else workload.steps
    if steps is None:
        raise InvalidOption(
            "the length of a training is not known: add --steps N, or max_steps to the config's trainer", code="LO210"
        )
    candidates, left_out = chosen(arguments.optimizers, workload, arguments.quick)
    return Comparison(
        workload=workload,
        candidates=tuple(candidates),
        steps=steps,
        rates=_RATES if arguments.lrs is None else arguments.lrs,
        seeds=_SEEDS if arguments.seeds is None else arguments.seeds,
        judgement=Judgement(arguments.metric, arguments.maximize),
        output=arguments.output,
        left_out=left_out,
    )


def _left(measurements: Measurements) -> str:
    comparison = measurements.comparison
    total = len(comparison.candidates) * (comparison.rates + comparison.seeds)
    return (
        f"interrupted; {measurements.finished()} of {total} trainings are in {comparison.output / TRIALS}. The "
        "same command goes on from there."
    )


def _written(report: Facts, arguments: argparse.Namespace) -> Facts:
    """Writes the report next to the measurements, and adds where."""
    output = arguments.output
    report["files"] = {"trials": str(output / TRIALS), "report": str(output / _REPORT)}
    if not arguments.no_picture:
        report["files"]["picture"] = str(output / _PICTURE)
        write_file(output / _PICTURE, lambda beside: draw(report, beside))
    for name, text in ((_REPORT, render.as_json(report)), (_TEXT, as_text(report))):
        write_file(output / name, partial(Path.write_text, data=text + "\n", encoding="utf-8"))
    return report


def as_text(report: Facts) -> str:
    """Returns the tables, what their columns mean, the rankings and where it ran."""
    rows = report["optimizers"]
    tokens = any(row["tokens_per_second"] for row in rows)
    interval = f"{report['confidence']:.0%} interval"
    return render.sections(
        render.wrap(f"{report['workload']}; {report['steps']} steps per training"),
        render.table([("optimizer", "lr", "loss", "difference", interval), *map(_quality, rows)]),
        list(_quality_legend(report)),
        render.table(
            [
                ("optimizer", "peak", "state", "ms/step", "ratio", "quartiles", "tokens/s" if tokens else "samples/s"),
                *map(_cost, rows),
            ]
        ),
        list(_cost_legend(report)),
        *_options(rows),
        *(lines for ranking in report["rankings"] if (lines := list(_ranking(ranking)))),
        *_left_out(report),
        list(_machine(report)),
        [f"{kind}: {path}" for kind, path in report["files"].items()],
    )


def _name(row: Facts) -> str:
    """Returns the identifier, with a sign that it has options."""
    name, options, _ = row["optimizer"].partition(",")
    return f"{name} +" if options else str(name)


def _options(rows: list[Facts]) -> Iterator[list[str]]:
    labels = [row["optimizer"] for row in rows if "," in row["optimizer"]]
    if labels:
        yield ["+ with options", *(line for label in labels for line in render.wrap(label, "  ", "  "))]


def _quality(row: Facts) -> tuple[str, ...]:
    difference = row["difference"]
    failures = ", ".join(f"{count} {kind}" for kind, count in row["failures"].items())
    mean, interval = "", ""
    if difference:
        mean = f"{difference['mean']:+.4f}{'*' if difference['excludes_zero'] else ''}"
        interval = f"{difference['low']:+.4f} to {difference['high']:+.4f}"
    return (
        _name(row),
        "-" if row["lr"] is None else f"{row['lr']:g}{' !' if row['lr_is_at_the_edge'] else ''}",
        failures if row["loss"] is None else f"{row['loss']:.4f}",
        mean,
        interval,
    )


def _cost(row: Facts) -> tuple[str, ...]:
    quartiles = row["step_ratio_quartiles"]
    return (
        _name(row),
        _number(row["peak_bytes"], ".2f", _MIB),
        _number(row["state_bytes"], ".2f", _MIB),
        _number(row["step_seconds"], ".2f", 1e-3),
        _number(row["step_ratio"], ".2f"),
        f"{quartiles[0]:.2f} - {quartiles[1]:.2f}" if quartiles else "-",
        _number(row["tokens_per_second"] or row["samples_per_second"], ",.0f"),
    )


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else format(value / unit, form)


def _quality_legend(report: Facts) -> Iterator[str]:
    best = "most" if report["maximize"] else "least"
    yield from render.properties(
        [
            (
                "lr",
                f"of {report['rates']} tried with seed {report['choosing_seed']}, that with the {best} "
                f"{report['metric']}; ! at the edge of its grid: one beyond may do better",
            ),
            ("loss", f"{report['metric']} at the end of the schedule, mean of {report['seeds']} other seeds"),
            ("difference", f"to {report['reference']}; * its interval does not hold 0"),
            ("interval", report["method"]),
        ]
    )


def _cost_legend(report: Facts) -> Iterator[str]:
    rounds = report["rates"] + report["seeds"]
    yield from render.properties(
        [
            ("peak, state", f"MiB; the peak of {report['memory_method'] or 'what this device does not tell'}"),
            ("ms/step", f"median of {rounds} trainings, in rounds in which every optimizer trains once"),
            ("ratio", f"to {report['reference']} within a round, median and quartiles of the rounds"),
        ]
    )


def _ranking(ranking: Facts) -> Iterator[str]:
    places = ranking["places"]
    if ranking["rank_correlation"] is None:
        return
    yield f"Published ranking: {ranking['claim']} (rank correlation {ranking['rank_correlation']:+.2f})"
    cells = [(one["identifier"], f"claimed {one['claimed']}", f"measured {one['measured']}") for one in places]
    yield from render.table(cells, "  ")
    if ranking["missing"]:
        yield from render.wrap(f"not measured: {', '.join(ranking['missing'])}", "  ")


def _left_out(report: Facts) -> Iterator[list[str]]:
    lines = [f"{name}: {reason}" for name, reason in report["left_out"].items()] + report["left_out_of_config"]
    if lines:
        yield ["Left out", *(line for text in lines for line in render.wrap(text, "  ", "  "))]


def _machine(report: Facts) -> Iterator[str]:
    machine: dict[str, Any] = report["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    yield from render.wrap(f"{machine['device']}, {machine['cores']} cores, threads: {machine['threads']}; {versions}")
