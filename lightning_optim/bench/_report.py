"""From measurements to a report: plain facts, computed from the file alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from lightning_optim.bench._candidates import Candidate
from lightning_optim.bench._run import CHOOSING_SEED, Comparison, Measurements
from lightning_optim.bench._statistics import CONFIDENCE, paired, rank_correlation
from lightning_optim.choose import CLAIMS, Claim
from lightning_optim.table import REGISTRY

Facts = dict[str, Any]


def summarize(measurements: Measurements) -> Facts:
    """Returns what was found, a row per optimizer and a comparison with each published ranking."""
    comparison = measurements.comparison
    reference = comparison.candidates[0]
    rows = [_row(measurements, one, reference) for one in comparison.candidates]
    metrics = sorted({trial["metric"] for one in comparison.candidates for trial in _successes(measurements, one)})
    return {
        "request": comparison.request,
        "workload": comparison.workload.name,
        "machine": comparison.request["machine"],
        "metric": metrics[0] if metrics else None,
        "maximize": comparison.judgement.maximize,
        "steps": comparison.steps,
        "rates": comparison.rates,
        "seeds": comparison.seeds,
        "choosing_seed": CHOOSING_SEED,
        "confidence": CONFIDENCE,
        "method": "Student's t-interval of the differences to the reference, paired by seed",
        "reference": reference.label,
        "memory_method": (measurements.memory(reference) or {}).get("method"),
        "optimizers": rows,
        "rankings": [_ranking(claim, rows, comparison) for claim in CLAIMS],
        "left_out": comparison.left_out,
        "left_out_of_config": list(comparison.workload.left_out),
    }


def _successes(measurements: Measurements, candidate: Candidate) -> Iterator[Facts]:
    yield from (trial for trial in measurements.judged(candidate).values() if trial["value"] is not None)


def _row(measurements: Measurements, candidate: Candidate, reference: Candidate) -> Facts:
    judged, theirs = measurements.judged(candidate), measurements.judged(reference)
    values = {seed: trial["value"] for seed, trial in judged.items()}
    whole = bool(values) and None not in values.values()
    tried = measurements.tried(candidate)
    best = measurements.best_rate(candidate)
    memory = measurements.memory(candidate) or {}
    failures = [trial["failure"] for trial in (*tried.values(), *judged.values()) if trial and trial["failure"]]
    return {
        "optimizer": candidate.label,
        "identifier": candidate.name,
        "lr": best,
        "lr_is_at_the_edge": best is not None and len(tried) > 1 and best in (min(tried), max(tried)),
        "tried": [{"lr": rate, "value": trial and trial["value"]} for rate, trial in tried.items()],
        "values": [{"seed": seed, "value": value} for seed, value in values.items()],
        "loss": statistics.fmean(values.values()) if whole else None,
        "difference": None if candidate is reference else _difference(values, theirs),
        "failures": {kind: failures.count(kind) for kind in dict.fromkeys(failures)},
        "peak_bytes": memory.get("peak_bytes"),
        "state_bytes": memory.get("state_bytes"),
        **_speed(measurements, candidate, reference),
        "curve": _curve([trial["curve"] for trial in judged.values() if trial["value"] is not None]),
    }


def _difference(values: dict[int, Any], theirs: dict[int, Facts]) -> Facts | None:
    seeds = [seed for seed in values if seed in theirs]
    mine, other = [values[seed] for seed in seeds], [theirs[seed]["value"] for seed in seeds]
    if len(seeds) < 2 or None in (*mine, *other):
        return None
    interval = paired(mine, other)
    return {
        "mean": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "pairs": interval.pairs,
        "excludes_zero": interval.excludes_zero,
    }


def _speed(measurements: Measurements, candidate: Candidate, reference: Candidate) -> Facts:
    """Returns the medians over the rounds; ratios are taken within a round, where both trained side by side."""
    rounds = list(zip(measurements.rounds(candidate), measurements.rounds(reference), strict=True))
    mine = [trial for trial, _ in rounds if trial]
    ratios = [one["step_seconds"] / other["step_seconds"] for one, other in rounds if one and other]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else None
    return {
        "step_seconds": _median([trial["step_seconds"] for trial in mine]),
        "step_ratio": _median(ratios),
        "step_ratio_quartiles": quartiles and [quartiles[0], quartiles[2]],
        "samples_per_second": _median([trial["samples_per_second"] for trial in mine]),
        "tokens_per_second": _median([trial["tokens_per_second"] for trial in mine]),
    }


def _median(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _curve(curves: list[list[Any]]) -> list[Facts]:
    """Returns the training loss by step, the mean over the seeds."""
    if not curves or not all(curves):
        return []
    return [
        {"step": points[0][0], "loss": statistics.fmean(loss for _, loss in points)}
        for points in zip(*curves, strict=True)
        if all(loss is not None for _, loss in points)
    ]


def _ranking(claim: Claim, rows: list[Facts], comparison: Comparison) -> Facts:
    """Puts the claimed places next to the measured ones."""
    sign = -1 if claim.measure == "loss" and comparison.judgement.maximize else 1
    # By the rows' names, of which the identifiers may be aliases.
    places = {REGISTRY.find(name).name: place for name, place in claim.places.items()}
    found: dict[str, float] = {}
    for row in rows:
        name = REGISTRY.find(row["identifier"]).name
        if name in places and name not in found and row[claim.measure] is not None:
            found[name] = sign * row[claim.measure]
    shown = {REGISTRY.find(name).name: name for name in claim.places}
    names = sorted(found, key=lambda name: (places[name], found[name]))
    order = sorted(found.values())
    return {
        "claim": claim.name,
        "measure": claim.measure,
        "places": [
            {
                "identifier": shown[name],
                "claimed": places[name],
                "measured": order.index(found[name]) + 1,
                "value": sign * found[name],
            }
            for name in names
        ],
        "missing": [shown[name] for name in places if name not in found],
        "rank_correlation": rank_correlation([places[name] for name in names], [found[name] for name in names]),
    }
