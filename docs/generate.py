"""Writes the parts of the pages that come from the tables, into docs/generated/.

``identifiers.md`` and ``schedules.md`` are included by the pages of the same names, ``formats.md`` by
``checkpoints.md``, so that they cannot drift.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightning_optim import OptimizerSpec, Options
from lightning_optim.build import SCHEDULES, parameter_bytes
from lightning_optim.table import ROWS, describe

SIDE = 1024
ELEMENTS, ELEMENT_SIZE = SIDE * SIDE, 4
PROVIDERS = {
    "torch": "PyTorch",
    "torch_xla": "torch_xla",
    "torch_npu": "torch_npu",
    "apex": "apex",
    "torchao": "torchao",
    "bitsandbytes": "bitsandbytes",
    "lightning_optim": "Our own",
    "optimi": "optimi",
    "schedulefree": "schedulefree",
}
SCOPES = {"group": "parameter group", "constructor": "optimizer", "policy": "grouping", "layerwise": "optimizer"}


def main(target: Path) -> None:
    """Writes the files into the directory ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "identifiers.md").write_text("\n".join(identifiers()) + "\n", encoding="utf-8")
    (target / "schedules.md").write_text("\n".join(schedules()) + "\n", encoding="utf-8")
    (target / "formats.md").write_text("\n".join(formats()) + "\n", encoding="utf-8")


def formats() -> Iterator[str]:
    """Yields the lines of the table of state formats, each with the identifiers that read and write it."""
    names: dict[str, list[str]] = {}
    for spec in ROWS:
        names.setdefault(spec.format, []).extend((spec.name, *spec.aliases))
    lines = ((_code(key), ", ".join(map(_code, same))) for key, same in sorted(names.items()))
    yield from _table(("format", "identifiers"), lines)


def identifiers() -> Iterator[str]:
    """Yields the lines of the overview and of every row's section."""
    header = ("identifier", "class", "lr", "weight decay", "extra", "state")
    yield from _table(header, (_overview(name, spec) for spec in ROWS for name in (spec.name, *spec.aliases)))
    for package, provider in itertools.groupby(ROWS, key=lambda spec: spec.implementation.partition(".")[0]):
        yield from ("", f"## {PROVIDERS[package]}")
        for spec in provider:
            yield from _row(spec)


def schedules() -> Iterator[str]:
    """Yields the lines of the overview and of every schedule's options."""
    header = ("name", "what it does", "warm-up", "needs the length of the training")
    yield from _table(
        header,
        ((_code(spec.name), spec.summary, _yes(spec.warms_up), _yes(spec.needs_total)) for spec in SCHEDULES.values()),
    )
    for spec in SCHEDULES.values():
        if dataclasses.fields(spec.options):
            yield from ("", f"Options of `{spec.name}`:", "")
            yield from _options(spec.options, with_scope=False)


def _overview(name: str, spec: OptimizerSpec) -> tuple[str, ...]:
    identifier = f"[`{name}`](#optim-{spec.name})"
    return (
        identifier if name == spec.name else f"{identifier}, alias of `{spec.name}`",
        _code(spec.implementation),
        _number(spec.default_lr),
        _number(spec.default_weight_decay) if spec.decays else "none",
        _code(spec.extra) if spec.extra else "",
        _state(spec),
    )


def _row(spec: OptimizerSpec) -> Iterator[str]:
    summary = spec.summary[0].upper() + spec.summary[1:]
    yield from ("", f"(optim-{spec.name})=", f"### {spec.name}", "", f"{summary}.", "")
    yield f"- Class: `{spec.implementation}`"
    if spec.aliases:
        yield f"- Also called: {', '.join(map(_code, spec.aliases))}"
    if spec.fixed:
        yield f"- Fixed arguments: {', '.join(_code(f'{name}={value!r}') for name, value in spec.fixed.items())}"
    yield f"- Install: {_install(spec)}"
    yield f"- Devices: {_devices(spec)}"
    if spec.choices:
        yield f"- Builds the first that can run of: {', '.join(map(_code, spec.choices))}"
    if spec.fallbacks:
        yield f"- `optim_fallback=True` takes the first that can run of: {', '.join(map(_code, spec.fallbacks))}"
    yield f"- State of a {SIDE}x{SIDE} float32 parameter: {_state(spec)} bytes per element"
    yield f"- Warm-up: {_warmup(spec)}"
    yield f"- Gradients and parameters: {_abilities(spec)}"
    if spec.coupled:
        yield f"- Layerwise: no; {spec.coupled}"
    if spec.note:
        yield f"- Note: {spec.note}"
    yield f"- Source: {_linked(spec.source)}"
    yield ""
    yield from _options(spec.options)


def _options(options: type[Options], with_scope: bool = True) -> Iterator[str]:
    infos = describe(options)
    if not infos:
        yield "No options."
        return
    header = ("option", "type", "default", "range", "meaning", "one value per")
    rows = (
        (
            _code(info.name),
            _code(info.type),
            "required" if info.default is dataclasses.MISSING else _code(repr(info.default)),
            info.range,
            info.help,
            SCOPES[info.scope],
        )
        for info in infos
    )
    width = len(header) if with_scope else len(header) - 1
    yield from _table(header[:width], (row[:width] for row in rows))


def _state(spec: OptimizerSpec) -> str:
    if spec.state is None:
        return "unknown"
    return f"{parameter_bytes(spec, spec.options(), (SIDE, SIDE), ELEMENT_SIZE) / ELEMENTS:.2f}"


def _install(spec: OptimizerSpec) -> str:
    if not spec.requirements:
        return "nothing beyond torch"
    packages = ", ".join(_code(requirement.distribution + requirement.versions) for requirement in spec.requirements)
    if not spec.extra:
        return f"{packages}: {'; '.join(requirement.install_command for requirement in spec.requirements)}"
    return f"the extra `{spec.extra}` ({packages})"


def _devices(spec: OptimizerSpec) -> str:
    if spec.devices is not None:
        return ", ".join(sorted(spec.devices))
    return f"all but XLA: {spec.xla}" if spec.xla else "all"


def _warmup(spec: OptimizerSpec) -> str:
    return {
        "schedule": "by the `lr_scheduler`",
        "optimizer": "by the optimizer itself, from `warmup_steps`",
        "none": "none, the algorithm needs none",
    }[spec.warmup]


def _abilities(spec: OptimizerSpec) -> str:
    abilities = {
        "sparse gradients": spec.sparse,
        "complex parameters": spec.complex,
        "float16 parameters": spec.half_weights,
        "sharded parameters (DTensor)": spec.sharded,
    }
    refused = [name for name, able in abilities.items() if not able]
    taken = [name for name, able in abilities.items() if able]
    parts = [f"takes {', '.join(taken)}"] if taken else []
    return "; ".join(parts + ([f"refuses {', '.join(refused)}"] if refused else []))


def _linked(source: str) -> str:
    return re.sub(r"https://[^\s;,]+", r"<\g<0>>", source)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    header = tuple(header)
    yield _line(header)
    yield _line("---" for _ in header)
    for row in rows:
        yield _line(cell.replace("|", r"\|") for cell in row)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _code(text: str) -> str:
    return f"`{text}`"


def _number(value: float | None) -> str:
    return "must be given" if value is None else f"{value:g}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "generated")
