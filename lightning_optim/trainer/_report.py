"""The report of what was resolved, for the terminal and for the logger's hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_optim.build import (
    INITIAL_LR,
    KERNEL,
    LR,
    ResolvedOptimizer,
    comparable,
    parameter_bytes,
    state_bytes,
    storable,
)
from lightning_optim.errors import InvalidOption
from lightning_optim.layerwise import Layerwise
from lightning_optim.table import REGISTRY, SUFFIX, OptimizerSpec, parse

# How many unprojected modules the report names.
_NAMED = 4
# What a small state is compared with, the matrix whose state must be small by default, and the shares of the usual
# state from which on hardly anything, and apart from counters nothing, is saved.
_USUAL, _LARGE, _HARDLY, _NONE = "adamw_torch", (4096, 4096), 0.9, 0.99


def describe(resolved: ResolvedOptimizer, identifier: str, schedule: str) -> str:
    """Returns the report for humans: identifier, class, hyperparameters, groups with counts, state bytes, schedule."""
    main, *others = resolved.each
    width = max(len(group["name"]) for group in resolved.optimizer.param_groups)
    lines = _part_lines(main, identifier, width)
    for part in others:
        first, *rest = _part_lines(part, part.request.config.optim, width)
        lines += [f"  {part.request.name}: {first}", *rest]
    lines.append(f"  state: {_bytes_text(resolved)}; schedule: {schedule}; layerwise: {_layerwise_text(resolved)}")
    for part in resolved.each:
        if part.request.remark:
            lines.append(f"  {part.request.name}: {part.request.remark}")
        if part.not_projected:
            lines.append(f"  {_not_projected_text(part.not_projected)}")
        if part.spec.projects:
            lines += _wide_ranks(part)
        lines += _no_saving(part)
        if part.spec.note:
            lines.append(f"  note: {part.spec.note}")
    return "\n".join(lines)


def _part_lines(resolved: ResolvedOptimizer, identifier: str, width: int) -> list[str]:
    """Returns a line about a single optimizer, and one for each of its groups."""
    spec = resolved.spec
    shared = {**_settings(resolved), **spec.fixed}
    taken = "" if resolved.name.removesuffix(SUFFIX) == identifier.removesuffix(SUFFIX) else f" takes {resolved.name!r}"
    lines = [f"optim={identifier!r}{taken}: {spec.implementation} ({', '.join(f'{k}={v}' for k, v in shared.items())})"]
    if taken and identifier not in resolved.passed_over:
        # For an identifier that stands for several: why not the better ones. A fallback has its own warning.
        lines += [f"  not {name!r}: {reason}" for name, reason in resolved.passed_over.items()]
    for group in resolved.optimizer.param_groups:
        elements = _elements(group)
        own = ", ".join(f"{key}={value}" for key, value in _differences(group, resolved).items())
        lines.append(f"  {group['name']:<{width}}  {len(group['params']):>4} tensors  {elements:>12,} elements  {own}")
    return lines


def hyperparameters(resolved: ResolvedOptimizer, identifier: str, schedule: str) -> dict[str, Any]:
    """Returns the report as plain values, for ``Logger.log_hyperparams``."""
    values = {
        "identifier": identifier,
        "taken": resolved.name,
        "class": resolved.spec.implementation,
        **_settings(resolved.each[0]),
        **resolved.spec.fixed,
        "schedule": schedule,
        "state_bytes": resolved.state_bytes,
        "layerwise": Layerwise.of(resolved.optimizer) is not None,
        "groups": {
            group["name"]: {
                "tensors": len(group["params"]),
                "elements": _elements(group),
                **_differences(group, part),
            }
            for part in resolved.each
            for group in part.optimizer.param_groups
        },
    }
    if resolved.parts:
        values["parts"] = {
            part.request.name: {
                "taken": part.name,
                "class": part.spec.implementation,
                **_settings(part),
                **part.spec.fixed,
            }
            for part in resolved.parts[1:]
        }
    return {name: storable(value) for name, value in values.items()}


def is_report(name: str, value: Any) -> bool:
    """Whether a hyperparameter stored by a logger is a report, not an argument of the module."""
    is_ours = isinstance(value, Mapping) and {"identifier", "taken"} <= set(value)
    return is_ours and name.partition("_")[0] == "optimizer"


def _layerwise_text(resolved: ResolvedOptimizer) -> str:
    layerwise = Layerwise.of(resolved.optimizer)
    if layerwise is None:
        return "no"
    return f"buckets of {_size_text(layerwise.bucket_bytes)}" if layerwise.bucket_bytes else "one parameter at a time"


def _not_projected_text(modules: Mapping[str, str]) -> str:
    named = [f"{name or 'the model itself'}: {kind}" for name, kind in modules.items()]
    shown = ", ".join(named[:_NAMED] + ["..."] * (len(named) > _NAMED))
    return f"named by optim_target_modules, but not projected ({len(named)}): {shown}"


def _wide_ranks(resolved: ResolvedOptimizer) -> list[str]:
    """Returns a line if projected matrices keep more state than they would unprojected."""
    with_rank = without = matrices = 0
    for group in resolved.optimizer.param_groups:
        for parameter in group["params"] if group["rank"] is not None else ():
            one, other = (
                state_bytes(resolved.spec, resolved.options, [{**group, "params": [parameter], "rank": rank}]) or 0
                for rank in (group["rank"], None)
            )
            if one > other:
                with_rank, without, matrices = with_rank + one, without + other, matrices + 1
    if not matrices:
        return []
    return [
        f"  {matrices} projected matrices keep more state than they would unprojected ({_size_text(with_rank)}, "
        f"{_size_text(without)}): use a smaller rank, or leave them out of optim_target_modules"
    ]


def _no_saving(resolved: ResolvedOptimizer) -> list[str]:
    """Returns a line if an optimizer with a small state keeps hardly less here than AdamW would.

    This happens with ranks as large as the matrices, with tensors too small to be quantized, and in models that are
    mostly embeddings, which are neither projected nor quantized.
    """
    if resolved.state_bytes is None or not _promises_memory(resolved.spec):
        return []
    usual = REGISTRY.find(_USUAL)
    groups = [{"params": group["params"]} for group in resolved.optimizer.param_groups]
    size = state_bytes(usual, usual.options(), groups) or 0
    if resolved.state_bytes < _HARDLY * size:
        return []
    saved = "no" if resolved.state_bytes >= _NONE * size else "hardly any"
    return [
        f"  {saved} memory is saved: {_size_text(resolved.state_bytes)} of state, where {_USUAL!r} would keep "
        f"{_size_text(size)}"
    ]


def _promises_memory(spec: OptimizerSpec) -> bool:
    """Whether, with the row's defaults, the state of a large matrix takes at most half of AdamW's bytes."""
    try:
        options = parse(spec.options, None, spec.name)
    except InvalidOption:  # An option is required.
        return False
    usual = REGISTRY.find(_USUAL)
    return parameter_bytes(spec, options, _LARGE, 4) <= parameter_bytes(usual, usual.options(), _LARGE, 4) / 2


def _elements(group: Mapping[str, Any]) -> int:
    return sum(parameter.numel() for parameter in group["params"])


def _settings(resolved: ResolvedOptimizer) -> dict[str, Any]:
    """Returns the hyperparameters in effect, which a checkpoint may have replaced."""
    settings = {"lr": resolved.lr}
    if resolved.spec.decays:
        settings["weight_decay"] = resolved.weight_decay
    settings |= resolved.options.settled().select("group", "constructor", "policy")
    return {name: _trained(resolved, name, asked) for name, asked in settings.items()}


def _trained(resolved: ResolvedOptimizer, name: str, asked: Any) -> Any:
    """Returns the value in effect in the first group for which the given one was requested."""
    if name in KERNEL:
        return asked
    value = resolved.resuming.value
    for before, group in zip(resolved.resuming.asked, resolved.optimizer.param_groups, strict=False):
        wanted = comparable(value(before, name))
        if wanted in (comparable(asked), float(f"{asked:.7g}") if isinstance(asked, float) else asked):
            trains = comparable(_peak(group) if name == LR else value(group, name))
            return asked if trains == wanted else trains
    return asked


def _peak(group: Mapping[str, Any]) -> Any:
    """Returns a group's base rate, before a schedule changes it."""
    return group.get(INITIAL_LR, group[LR])


def _differences(group: Mapping[str, Any], resolved: ResolvedOptimizer) -> dict[str, Any]:
    """Returns what is set per group: lr, weight decay, bits, overrides."""
    options, settings = resolved.options.select("group"), _settings(resolved)
    return {
        key: comparable(_peak(group) if key == LR else value)
        for key, value in group.items()
        if key in (LR, "weight_decay", "optim_bits")
        or (key in options and comparable(settings[key]) != comparable(value))
    }


def _bytes_text(resolved: ResolvedOptimizer) -> str:
    if resolved.state_bytes is None:
        return "unknown"
    elements = sum(map(_elements, resolved.optimizer.param_groups))
    return f"{_size_text(resolved.state_bytes)} ({resolved.state_bytes / elements:.3g} bytes per element)"


def _size_text(count: float) -> str:
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"
