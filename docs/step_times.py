"""Tables of what steps of our own optimizers take, from what ``benchmarks/optimizers.py`` and ``muon.py`` wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lightning_optim.command import markdown_table

Facts = dict[str, Any]
#: By identifier, the class that the benchmark names.
PROJECTING = {
    "galore_adamw": "GaLoreAdamW",
    "galore_adamw_8bit": "GaLoreAdamW8bit",
    "galore_adafactor": "GaLoreAdafactor",
    "apollo_adamw": "ApolloAdamW",
}
OTHERS = {
    "adafactor": "Adafactor",
    "lomo": "LOMO",
    "adalomo": "AdaLomo",
    "grokadamw": "GrokAdamW",
    "adamw_anyprecision": "AnyPrecisionAdamW",
}


def own(names: dict[str, str]) -> Callable[[Facts], Iterator[str]]:
    """Returns what yields the time of steps in units of AdamW's and of the upstream class's."""

    def table(measured: Facts) -> Iterator[str]:
        loads = [measured["small"], measured["large"]]
        header = ("", *(column for load in loads for column in (f"{load['load']}: x AdamW", "x upstream")))
        rows = []
        for name, class_ in names.items():
            ratios = [load["ratios"][class_][against] for load in loads for against in ("adamw", "upstream")]
            rows.append((f"`{name}`", *(f"{ratio[1]:.2f}" if ratio else "-" for ratio in ratios)))
        yield from markdown_table(header, rows)
        yield from ("", f"Medians of {measured['rounds']} rounds. {where(measured)}")

    return table


def stacks(measured: Facts) -> Iterator[str]:
    """Yields the time of orthogonalizing matrices one after the other, in units of that in stacks."""
    rows = ((f"{_sides(one)}, {one['stack']} in a stack", f"{one['ratio']:.1f}") for one in measured["stacks"])
    yield from markdown_table(("shape", "alone / in stacks"), rows)


def steps(measured: Facts) -> Iterator[str]:
    """Yields the time of a step of torch's Muon, in units of ours."""
    yield from markdown_table(
        ("shape", "torch / ours"), ((_sides(one), f"{one['ratio']:.1f}") for one in measured["steps"])
    )
    yield from ("", where(measured))


def where(measured: Facts) -> str:
    """Returns on what it was measured."""
    there = measured["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in there["versions"].items())
    threads = f"{there['threads']} thread{'s' if there['threads'] > 1 else ''}"
    return f"{there['device']}, {there['cores']} cores, {threads}; {versions}."


def _sides(record: Facts) -> str:
    return "x".join(map(str, record["shape"]))
