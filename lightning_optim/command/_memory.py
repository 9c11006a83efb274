"""``lightning-optim memory``: what training takes with one identifier, or with all of them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from lightning_optim.build import OptimConfig
from lightning_optim.choose import PRECISIONS, SHAPES, Accelerator, Estimator, MemoryEstimate, Strategy
from lightning_optim.command import _render as render
from lightning_optim.command._machine import CommandError, Facts, write_file
from lightning_optim.command._model import BadRequest, batch_of, model_of, optim_of, read_config, shard_in, strategy_in
from lightning_optim.command._picture import stacked_bars

_GIB = 2**30
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": _GIB, "ti": 2**40}
_PARTS = ("parameters", "buffers", "state", "gradients", "communication", "activations", "temporaries")
_NOT_COUNTED = (
    "Not counted: what kernels take inside of themselves (cuBLAS's workspaces, bitsandbytes on a CPU), what the "
    "allocator rounds up and keeps, the CUDA context."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    add_model_arguments(parser)
    parser.add_argument("--optim", metavar="NAME", help="one identifier in detail, instead of all in one table")
    parser.add_argument("--optim-args", metavar="ARGS", help="its options, 'name=value,...'")
    parser.add_argument("--optim-target-modules", metavar="MODULES", help="what it projects, if it projects")
    parser.add_argument("--param-groups", metavar="YAML", help="patterns, \"{'head.*': {optim: sgd, lr: 0.1}}\"")
    parser.add_argument("--fits", metavar="SIZE", help="show those that fit into this much, such as 24GiB")
    parser.add_argument("--picture", metavar="FILE", help="also draw the result as an SVG file")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says what is trained and how."""
    model = parser.add_argument_group("what is trained")
    model.add_argument(
        "model", nargs="?", metavar="MODEL", help=f"the class of a module, package.module:Class, or {', '.join(SHAPES)}"
    )
    model.add_argument("--init-args", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the class")
    model.add_argument("--config", metavar="FILE", help="a YAML file of LightningCLI or OptimCLI")
    for family in ("llama", "gpt2", "bert", "vit"):
        sizes = [name.partition("-")[2] or "base" for name in SHAPES if name.split("-")[0] == family]
        model.add_argument(f"--{family}", choices=sizes, help="the shape of this size")
    for name in ("hidden", "layers", "heads", "intermediate", "vocab", "kv-heads"):
        model.add_argument(f"--{name}", type=int, metavar="N", help="of a LLaMA of your own sizes")
    how = parser.add_argument_group("how it is trained")
    how.add_argument("--batch", type=int, metavar="N", help="sequences or images of a shape; default 1, 0 for none")
    how.add_argument("--length", type=int, metavar="N", help="tokens of a sequence, for a shape")
    how.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="[NAME=]SHAPE[:DTYPE]",
        help="a tensor of the batch, for a module: 8x2048:int64; several make a tuple, with names a mapping",
    )
    how.add_argument("--precision", choices=list(PRECISIONS), help="the Trainer's; bf16-true for shapes by default")
    how.add_argument("--accelerator", choices=get_args(Accelerator), default="cuda", help="cuda by default")
    how.add_argument("--strategy", choices=get_args(Strategy), help="the Trainer's; default: what NAME needs")
    how.add_argument("--shard", metavar="PATTERN", help="what to shard by itself, without configure_model")
    how.add_argument("--devices", type=int, metavar="N", help="number of devices")
    how.add_argument("--accumulate", type=int, metavar="N", help="the Trainer's accumulate_grad_batches")
    how.add_argument("--clip", type=float, metavar="X", help="the Trainer's gradient_clip_val")
    how.add_argument("--clip-algorithm", choices=("norm", "value"), help="the Trainer's gradient_clip_algorithm")
    how.add_argument("--activation-checkpointing", action="store_true", help="of a shape, block by block")


def collect(arguments: argparse.Namespace) -> Facts:
    """Estimates.

    Raises:
        CommandError: If the request makes no sense, or nothing fits.
    """
    try:
        request = read_config(arguments.config) if arguments.config else {}
        limit = size_of("--fits", arguments.fits) if arguments.fits else None
        optim = optim_of(arguments, request)
        model, setting = setting_of(arguments, request)
        estimator = Estimator(model, **setting)
        found = [estimator.estimate(OptimConfig(**optim))] if optim else estimator.compare()
    except (BadRequest, ValueError, ImportError) as error:
        raise CommandError(str(error)) from error
    fitting = [estimate for estimate in found if limit is None or estimate.resident <= limit]
    if not fitting:
        least = min(found, key=lambda estimate: estimate.resident)
        raise CommandError(
            f"nothing fits into {arguments.fits}: {least.optim!r} needs {shown(least.resident)}. Take fewer "
            "sequences, --activation-checkpointing, a smaller --precision or more --devices"
        )
    if arguments.picture:
        _draw(Path(arguments.picture), fitting)
    return {"fits": limit, "one": bool(optim), "estimates": [estimate.as_dict() for estimate in fitting]}


def setting_of(arguments: argparse.Namespace, request: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the model and the setting that were typed or written.

    Raises:
        BadRequest: If they make no sense.
    """
    model, is_shape = model_of(arguments, request)
    trainer = request.get("trainer", {})
    given = {
        "precision": (arguments.precision, trainer.get("precision"), "bf16-true" if is_shape else None),
        "strategy": (arguments.strategy, strategy_in(trainer)),
        "shard": (arguments.shard, shard_in(trainer)),
        "devices": (arguments.devices, trainer.get("devices")),
        "accumulate_grad_batches": (arguments.accumulate, trainer.get("accumulate_grad_batches")),
        "gradient_clip_val": (arguments.clip, trainer.get("gradient_clip_val")),
        "gradient_clip_algorithm": (arguments.clip_algorithm, trainer.get("gradient_clip_algorithm")),
    }
    chosen = {name: next((v for v in values if v not in (None, "auto")), None) for name, values in given.items()}
    settings = {name: value for name, value in chosen.items() if value is not None}
    settings["batch"] = batch_of(arguments, model, is_shape)
    settings["accelerator"] = arguments.accelerator
    settings["activation_checkpointing"] = arguments.activation_checkpointing
    return model, settings


def as_text(report: Facts) -> str:
    """Returns the table, or one identifier in detail."""
    estimates = report["estimates"]
    first = estimates[0]
    devices = f"each of {first['devices']} devices ({first['strategy']})" if first["devices"] > 1 else "one device"
    what = (
        f"{first['model']}, {first['precision']}, {first['accelerator']}: memory of {devices}, from the second step on"
    )
    notes = list(render.wrap(_NOT_COUNTED))
    if first["activations"] is None:
        notes = [*render.wrap("Without activations: no batch was given (--batch, or --input for a module)."), *notes]
    if report["one"]:
        return render.sections([what], _detail(first, report["fits"]), notes)
    rows = [["identifier", *(part for part in _PARTS if part in _shown_parts(estimates)), "peak", "when"]]
    for estimate in estimates:
        cells = [shown(estimate[part]) for part in _PARTS if part in _shown_parts(estimates)]
        paged = " *" if estimate["pageable"] else ""
        rows.append([estimate["optim"], *cells, shown(estimate["peak"]) + paged, estimate["moment"]])
    parameters, buffers = shown(first["parameters"]), shown(first["buffers"])
    head = [what, f"parameters {parameters}, buffers {buffers}; the other columns are the most of each"]
    if any(estimate["pageable"] for estimate in estimates):
        notes = [*render.wrap("* The state moves to the host's memory where the device is full."), *notes]
    return render.sections(head, render.table(rows), notes)


def _shown_parts(estimates: Sequence[Facts]) -> list[str]:
    always = ("state", "gradients", "temporaries")
    varying = [part for part in ("communication", "activations") if any(estimate[part] for estimate in estimates)]
    return [part for part in _PARTS if part in always or part in varying]


def _detail(estimate: Facts, limit: int | None) -> list[str]:
    rows = [[estimate["optim"], "at most", "at the peak"]]
    for part in _PARTS:
        if estimate[part] or estimate["at_peak"][part] or part in ("parameters", "state", "gradients"):
            rows.append([f"  {part}", shown(estimate[part]), shown(estimate["at_peak"][part])])
    rows.append(["  peak", shown(estimate["peak"]), f"in {_WHEN[estimate['moment']]}"])
    lines = render.table(rows)
    if estimate["pageable"]:
        lines += render.wrap(
            f"{shown(estimate['pageable'])} of state move to the host's memory where the device is full."
        )
    return lines if limit is None else [*lines, f"It fits into {shown(limit)}."]


_WHEN = {"forward": "forward", "backward": "backward", "step": "the step"}


def shown(size: int | None) -> str:
    """Returns a number of bytes as a person reads it."""
    if size is None:
        return "?"
    for unit, bytes_ in (("GiB", _GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= bytes_:
            return f"{size / bytes_:.2f} {unit}" if unit != "KiB" else f"{size / bytes_:.1f} {unit}"
    return f"{size} B"


def size_of(flag: str, text: str) -> int:
    """Returns the bytes that a size such as 24GiB means.

    Raises:
        BadRequest: If it is none.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[1].count(".") > 1 or match[2] == "i":
        raise BadRequest(f"{flag} {text!r} is not a size: give one such as 24GiB, 24GB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2]])


def _draw(path: Path, estimates: Sequence[MemoryEstimate]) -> None:
    parts = [part for part in _PARTS if any(estimate.at_peak[part] for estimate in estimates)]
    bars = {estimate.optim: [estimate.at_peak[part] / _GIB for part in parts] for estimate in estimates}
    title = f"{estimates[0].model}, {estimates[0].precision}: GiB alive at the peak"
    write_file(path, lambda beside: beside.write_text(stacked_bars(title, parts, bars), encoding="utf-8"))
