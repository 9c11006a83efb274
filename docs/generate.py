"""Writes the parts of the pages that are generated from the tables, into docs/generated/.

``identifiers.md`` and ``schedules.md`` are included by the pages of the same names, ``identifiers-FAMILY.md`` by
``identifiers/FAMILY.md``, ``formats.md`` by ``checkpoints.md``, ``arguments.md`` by ``migrating.md``. What benchmarks
wrote into docs/bench/ becomes ``measured-layerwise.md`` and ``measured-families.md``, included by ``layerwise.md``,
``measured-monitor.md``, by ``monitor.md``, ``measured-muon.md``, by ``muon.md``, and ``measured-sharded.md`` and
``measured-dealt.md``, by ``sharded.md``. ``refusals.py`` and ``reliability.py`` write what the pages of these names
include. ``versions.md``, included by ``hardware.md``, is read from pyproject.toml, the files of requirements and what
``make newest`` wrote.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import runpy
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tomllib
from packaging.requirements import Requirement

from lightning_optim import OptimizerSpec
from lightning_optim.build import CARRIED, PLACES, SCHEDULES, TRAINING_ARGUMENTS, TrainingArgument
from lightning_optim.command import Facts, describe_options, markdown_table, view
from lightning_optim.table import ROWS, STRATEGIES, strategies

#: By page under docs/identifiers/, the rows on it; a page and its names in the order in which the overview has them.
FAMILIES = {
    "adamw": "adamw adamw_torch adamw_torch_fused paged_adamw_32bit adamw_torch_xla adamw_torch_npu_fused "
    "adamw_apex_fused",
    "adamw-8bit": "adamw_bnb_8bit paged_adamw_8bit adamw_torch_8bit adamw_torch_fp8 adamw_torch_4bit flash_adamw",
    "lion": "lion_32bit lion_8bit paged_lion_32bit paged_lion_8bit flash_lion",
    "low-rank": "galore_adamw galore_adamw_8bit galore_adafactor apollo_adamw apollo_mini",
    "matrices": "muon normuon soap scale",
    "little-state": "adafactor came lomo adalomo",
    "ademamix": "ademamix ademamix_8bit paged_ademamix_32bit paged_ademamix_8bit",
    "schedule-free": "schedule_free_adamw schedule_free_radam schedule_free_sgd",
    "adam-relatives": "adopt adan adam_mini prodigy stable_adamw adamw_anyprecision grokadamw",
    "classics": "sgd adagrad rmsprop rmsprop_bnb rmsprop_bnb_8bit lamb lars",
}
ROOT = Path(__file__).parents[1]
#: By column of the table of versions, the file that names those that its make targets install.
INSTALLED = {
    "oldest: `make test-oldest`": "requirements-oldest.txt",
    "pinned: `make test`, `test-sharded`, `test-benchmarks`, `test-installed`, `docs`": "constraints.txt",
    "`make test-xla`": "requirements-xla.txt",
}
SCOPES = {"group": "parameter group", "constructor": "optimizer", "policy": "grouping", "layerwise": "optimizer"}


def main(target: Path) -> None:
    """Writes the files into the directory ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "identifiers.md").write_text("\n".join(identifiers()) + "\n", encoding="utf-8")
    for name, rows in families().items():
        (target / f"identifiers-{name}.md").write_text("\n".join(family(rows)) + "\n", encoding="utf-8")
    (target / "schedules.md").write_text("\n".join(schedules()) + "\n", encoding="utf-8")
    (target / "strategies.md").write_text("\n".join(trained()) + "\n", encoding="utf-8")
    (target / "formats.md").write_text("\n".join(formats()) + "\n", encoding="utf-8")
    (target / "arguments.md").write_text("\n".join(arguments()) + "\n", encoding="utf-8")
    (target / "versions.md").write_text("\n".join(versions()) + "\n", encoding="utf-8")
    for name, table in (
        ("layerwise", measured_layerwise),
        ("families", measured_families),
        ("monitor", measured_monitor),
        ("sharded", measured_sharded),
        ("dealt", measured_dealt),
    ):
        measured = _written(name)
        lines = [*table(measured["records"]), "", _where(name, measured)]
        (target / f"measured-{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (target / "measured-muon.md").write_text("\n".join(measured_muon()) + "\n", encoding="utf-8")
    for name in ("refusals", "reliability"):
        runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))["main"](target)


Record = dict[str, Any]


def _written(name: str) -> Record:
    """Returns what a benchmark wrote."""
    found: Record = json.loads((Path(__file__).parent / "bench" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def measured_layerwise(records: list[Record]) -> Iterator[str]:
    """Yields the lines of the table of the engine's costs, time in units of the plain step with the same kernel."""
    models = list(dict.fromkeys(record["model"] for record in records))
    cells = {(record["variant"], record["model"]): record for record in records}
    header = ["", *itertools.chain(*((model, "live gradients", "peak") for model in models))]
    rows = []
    for variant in dict.fromkeys(record["variant"] for record in records):
        row = [variant]
        for model in models:
            one = cells.get((variant, model))
            sizes = [one and one[f"{name}_bytes"] for name in ("live", "peak")]
            row += [_ratio(one), *(f"{size / 1024:,.0f} KiB" if size else "" for size in sizes)]
        rows.append(row)
    yield from markdown_table(header, rows)


def measured_families(records: list[Record]) -> Iterator[str]:
    """Yields the lines of a table per model: each optimizer's variants, in units of the one named."""
    for model in dict.fromkeys(record["model"] for record in records):
        own = [record for record in records if record["model"] == model]
        cells = {(record["variant"], record["optimizer"]): record for record in own}
        optimizers = list(dict.fromkeys(record["optimizer"] for record in own))
        yield from ("", f"{model[0].upper()}{model[1:]}:", "")
        rows = [
            (record["variant"], record["against"], *(_ratio(cells[record["variant"], name]) for name in optimizers))
            for record in own
            if record["optimizer"] == optimizers[0] and record["variant"] != record["against"]
        ]
        yield from markdown_table(("", "in units of", *map(_code, optimizers)), rows)


def measured_monitor(records: list[Record]) -> Iterator[str]:
    """Yields the lines of the table of what OptimizerMonitor costs."""
    header = ("model", "optimizer", "monitor", "ms per step", "with the monitor", "inside the monitor")
    rows = (
        (
            record["model"],
            _code(record["optimizer"]),
            record["variant"],
            f"{record['milliseconds']:.1f}",
            f"{record['ratio']['median']:.3f} ({record['ratio']['low']:.3f} - {record['ratio']['high']:.3f})",
            f"{record['inside']:.1%}",
        )
        for record in records
    )
    yield from markdown_table(header, rows)


def measured_sharded(records: list[Record]) -> Iterator[str]:
    """Yields what FSDP2 sends, and the lines of the table of what optimizers send and how long steps take."""
    header = ("", "sends", "messages", f"x `{records[0]['against']}`", "wall-clock time", "sends in its first step")
    for strategy in dict.fromkeys(record["variant"] for record in records):
        own = [record for record in records if record["variant"] == strategy]
        fsdp2 = own[0]["bytes"]
        yield from (
            "",
            f"{_code(strategy)}, where FSDP2 itself sends {_kib(fsdp2['gathered'] + fsdp2['reduced'])}:",
            "",
        )
        rows = (
            (
                _code(one["optimizer"]),
                _kib(one["bytes"]["optimizer"]),
                str(one["messages"]),
                _ratio(one),
                f"{one['wall_ratio']['median']:.2f}",
                _kib(one["first_bytes"]),
            )
            for one in own
        )
        yield from markdown_table(header, rows)


def measured_dealt(records: list[Record]) -> Iterator[str]:
    """Yields the lines of the table of dealing out under DDP, in units of every process making all."""
    header = (
        "width of the block",
        "dealt out",
        "wall-clock time",
        "each makes all, ms",
        "GFLOP saved",
        "MiB sent",
        "FLOP per byte",
    )
    rows = (
        (
            str(one["width"]),
            _ratio(one),
            f"{one['wall_ratio']['median']:.2f}",
            f"{one['milliseconds']:.1f}",
            f"{one['saved_operations'] / 1e9:.2f}",
            f"{one['sent_bytes'] / 2**20:.2f}",
            f"{one['saved_operations'] / one['sent_bytes']:.0f}",
        )
        for one in records
    )
    yield from markdown_table(header, rows)


def _kib(size: int) -> str:
    return f"{size / 1024:,.1f} KiB" if size else "nothing"


def measured_muon() -> Iterator[str]:
    """Yields the lines of the table of losses at the end, of AdamW and of Muon in fewer steps, and on what."""
    measured = _written("muon_steps")
    adamw = measured["adamw_torch"]
    rows = [("`adamw_torch`", str(adamw["steps"]), f"{adamw['lr']:g}", f"{adamw['loss']:.3f}", "")]
    for share, found in measured["muon"].items():
        pairs = [one - other for one, other in zip(found["losses"], adamw["losses"], strict=True)]
        differences = ", ".join(f"{pair:+.3f}" for pair in pairs)
        steps = f"{found['steps']} ({float(share):g})"
        rows.append(("`muon`", steps, f"{found['lr']:g}", f"{found['loss']:.3f}", differences))
    yield from markdown_table(("optimizer", "steps", "best lr", "loss", "less AdamW's, by seed"), rows)
    yield from ("", f"{measured['workload'][0].upper()}{measured['workload'][1:]}. {_machine(measured)}.")


def _ratio(record: Record | None) -> str:
    return f"{record['ratio']['median']:.2f}" if record else ""


def _where(name: str, measured: Record) -> str:
    """Returns what was counted, on which hardware and with which versions."""
    return (
        f"{measured['time']}, medians of the ratios within rounds; [{name}.json](bench/{name}.json) has their "
        f"intervals. {measured['machine']['threads']} thread on {_machine(measured)}."
    )


def _machine(measured: Record) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in measured["machine"]["versions"].items())
    return f"{measured['machine']['device']}; {versions}"


def arguments() -> Iterator[str]:
    """Yields the lines of the tables of Hugging Face's arguments: the converted ones, then the others by place."""
    for places in (CARRIED, *((place,) for place in PLACES if place not in CARRIED)):
        rows = [row for row in TRAINING_ARGUMENTS.values() if row.place in places]
        header = ("`TrainingArguments`", "default there", "here", "of")
        width = 4 if places == CARRIED else 3
        if places != CARRIED:
            yield from ("", f"### {PLACES[places[0]]}", "")
        yield from markdown_table(header[:width], (_argument(row)[:width] for row in rows))


def _argument(row: TrainingArgument) -> tuple[str, ...]:
    name = f"{_code(row.name)}, dropped" if row.former else _code(row.name)
    return name, _code(repr(row.default)), row.here, PLACES[row.place]


def formats() -> Iterator[str]:
    """Yields the lines of the table of state formats, each with the identifiers that read and write it."""
    names: dict[str, list[str]] = {}
    for spec in ROWS:
        names.setdefault(spec.format, []).extend((spec.name, *spec.aliases))
    lines = ((_code(key), ", ".join(map(_code, same))) for key, same in sorted(names.items()))
    yield from markdown_table(("format", "identifiers"), lines)


def families() -> dict[str, list[OptimizerSpec]]:
    """Returns the rows by family.

    Raises:
        ValueError: If a row is in no family, or in two.
    """
    rows = {spec.name: spec for spec in ROWS}
    named = [name for names in FAMILIES.values() for name in names.split()]
    if wrong := [name for name in {*rows, *named} if named.count(name) != (name in rows)]:
        raise ValueError(f"FAMILIES in docs/generate.py must have every row once; look at {', '.join(wrong)}")
    return {family: [rows[name] for name in names.split()] for family, names in FAMILIES.items()}


def identifiers() -> Iterator[str]:
    """Yields the lines of the overview: what to choose by comes first."""
    header = ("identifier", "state, bytes per parameter", "extra", "devices", "what it is")
    rows = itertools.chain.from_iterable(families().values())
    lines = (_overview(view(name, spec), spec) for spec in rows for name in (spec.name, *spec.aliases))
    yield from _stacked(header, lines, "filtered")


def family(rows: Sequence[OptimizerSpec]) -> Iterator[str]:
    """Yields the lines of the sections of a page's rows, and of their aliases."""
    for spec in rows:
        yield from _row(spec, view(spec.name, spec))
        for alias in spec.aliases:
            # A heading of its own is what the search finds.
            yield from ("", f"(optim-{alias})=", f"## {alias}", "")
            yield f"Another name of [`{spec.name}`](#optim-{spec.name}), with the same options and defaults."


def trained() -> Iterator[str]:
    """Yields the lines of the table of strategies, each row with the reasons of its refusals."""
    header = ("identifier", *(strategy.name for strategy in STRATEGIES.values()), "")
    rows = []
    for spec in ROWS:
        cells = strategies(spec).values()
        reasons = dict.fromkeys(cell.why for cell in cells if not cell.trains)
        names = ", ".join(map(_code, (spec.name, *spec.aliases)))
        rows.append((names, *((cell.why or "yes") if cell.trains else "no" for cell in cells), "; ".join(reasons)))
    yield from markdown_table(header, rows)


def promised() -> dict[str, Requirement]:
    """Returns the packages that pyproject.toml names bounds of, ours left out, as users install them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = ("bitsandbytes", "torchao", "schedulefree", "optimi", "flashoptim", "cli")
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, lines):
        found.setdefault(requirement.name, requirement)
    return found


def pins(name: str) -> dict[str, str]:
    """Returns the versions that a file of requirements pins, and those that it includes."""
    found: dict[str, str] = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("--requirement "):
            found |= pins(line.split()[1])
        elif "==" in line and not line.startswith("#"):
            package, _, version = line.partition("==")
            found[package] = version
    return found


def versions() -> Iterator[str]:
    """Yields the lines of the table of versions: promised, run with, and the newest that exist."""
    newest = json.loads((ROOT / "docs" / "newest.json").read_text(encoding="utf-8"))
    columns = [pins(name) for name in INSTALLED.values()]
    rows = []
    for name, requirement in promised().items():
        latest = newest["versions"][name]
        is_pinned = latest == pins("constraints.txt").get(name)
        other = f"{latest}, {'not run' if latest in requirement.specifier else 'not taken'}"
        cell = "the pinned one" if is_pinned else other
        bounds = ", ".join(sorted(map(str, requirement.specifier), reverse=True))
        rows.append((name, bounds, *(column.get(name, "not installed") for column in columns), cell))
    yield from markdown_table(("package", "taken", *INSTALLED, f"newest on {newest['date']}"), rows)


def schedules() -> Iterator[str]:
    """Yields the lines of the overview and of every schedule's options."""
    header = ("name", "what it does", "warm-up", "needs the length of the training")
    yield from markdown_table(
        header,
        ((_code(spec.name), spec.summary, _yes(spec.warms_up), _yes(spec.needs_total)) for spec in SCHEDULES.values()),
    )
    for spec in SCHEDULES.values():
        if dataclasses.fields(spec.options):
            yield from ("", f"Options of `{spec.name}`:", "")
            yield from _options(describe_options(spec.options), with_scope=False)


def _overview(facts: Facts, spec: OptimizerSpec) -> tuple[str, ...]:
    summary = spec.summary[0].upper() + spec.summary[1:]
    return (
        f"[`{facts['identifier']}`](#optim-{facts['identifier']})",
        _state(facts),
        _extra(facts),
        "all but XLA" if spec.xla and spec.devices is None else _devices(spec),
        f"Another name of `{facts['alias_of']}`" if facts["alias_of"] else summary,
    )


def _extra(facts: Facts) -> str:
    if facts["extra"]:
        return _code(facts["extra"])
    return "".join(f"no extra: {package['distribution']}" for package in facts["packages"])


def _row(spec: OptimizerSpec, facts: Facts) -> Iterator[str]:
    summary = spec.summary[0].upper() + spec.summary[1:]
    yield from ("", f"(optim-{spec.name})=", f"## {spec.name}", "", f"{summary}.", "")
    if spec.aliases:
        yield f"- Also called: {', '.join(map(_code, spec.aliases))}"
    yield f"- Class: `{spec.implementation}`"
    yield f"- Defaults: {_defaults(facts)}"
    if spec.fixed:
        yield f"- Fixed arguments: {', '.join(_code(f'{name}={value!r}') for name, value in spec.fixed.items())}"
    yield f"- Install: {_install(facts)}"
    yield f"- Devices: {_devices(spec)}"
    if spec.choices:
        yield f"- Builds the first that can run of: {', '.join(map(_code, spec.choices))}"
    if spec.fallbacks:
        yield f"- `optim_fallback=True` takes the first that can run of: {', '.join(map(_code, spec.fallbacks))}"
    yield f"- State of a {facts['state']['parameter']} parameter: {_state(facts)} bytes per element"
    yield f"- Warm-up: {_warmup(spec)}"
    yield f"- Gradients and parameters: {_abilities(spec)}"
    if spec.coupled:
        yield f"- Layerwise: no; {spec.coupled}"
    if spec.note:
        yield f"- Note: {spec.note}"
    yield f"- Source: {_linked(spec.source)}"
    yield ""
    yield from _options(facts["options"])


def _defaults(facts: Facts) -> str:
    lr = "`lr` must be given" if facts["lr"] is None else f"`lr` {facts['lr']:g}"
    decay = "no weight decay" if facts["weight_decay"] is None else f"`weight_decay` {facts['weight_decay']:g}"
    return f"{lr}, {decay}"


def _options(options: Sequence[Facts], with_scope: bool = True) -> Iterator[str]:
    if not options:
        yield "No options."
        return
    header = ("option", "type", "default", "range", "meaning", "one value per")
    rows = (
        (
            _code(option["name"]),
            _code(option["type"]),
            "required" if option["required"] else _code(repr(option["default"])),
            option["range"] or "",
            option["help"],
            SCOPES[option["scope"]],
        )
        for option in options
    )
    width = len(header) if with_scope else len(header) - 1
    yield from _stacked(header[:width], (row[:width] for row in rows))


def _stacked(header: Sequence[str], rows: Iterable[Sequence[str]], classes: str = "") -> Iterator[str]:
    """Yields a table that docs/_static/site.css stacks where the screen is narrow."""
    yield from (f":::{{rst-class}} stacked {classes}".rstrip(), "", *markdown_table(header, rows), "", ":::")


def _state(facts: Facts) -> str:
    return f"{facts['state']['bytes_per_element']:.2f}"


def _install(facts: Facts) -> str:
    if not facts["packages"]:
        return "nothing beyond torch"
    packages = ", ".join(_code(package["distribution"] + package["versions"]) for package in facts["packages"])
    if facts["extra"]:
        return f"the extra `{facts['extra']}` ({packages})"
    return f"{packages}: {'; '.join(package['install'] for package in facts['packages'])}"


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


def _code(text: str) -> str:
    return f"`{text}`"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "generated")
