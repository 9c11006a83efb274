"""The requests for parts: what a pattern of ``param_groups`` names, and what an optimizer leaves to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_optim.build._arguments import Arguments
from lightning_optim.build._curves import follows_the_step
from lightning_optim.errors import IncompatibleTrainer, InvalidOption, InvalidParamGroups, listing
from lightning_optim.stepping import Clipping
from lightning_optim.table import REGISTRY, SUFFIX, LeavesOthers, OptimizerSpec, parse

#: What a pattern of ``param_groups`` says to name an optimizer.
OPTIM = "optim"
# What such a pattern may say besides the optimizer's options.
_CLIP = "clip"
_OF_SCHEDULES = ("lr_scheduler", "lr_scheduler_args", "warmup_steps")
_ARGUMENTS = ("lr", "weight_decay", "optim_target_modules", *_OF_SCHEDULES)
# What it may say only with an optimizer.
_OF_PARTS = (*_OF_SCHEDULES, _CLIP)


def named_parts(patterns: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """Returns the patterns that name an optimizer, with what they say."""
    return {
        pattern: values
        for pattern, values in (patterns or {}).items()
        if isinstance(values, Mapping) and OPTIM in values
    }


def refuse_parts_without_optim(patterns: Mapping[str, Any] | None, optim: str) -> None:
    """Refuses patterns that say what only an optimizer of its own can have, and name none.

    Raises:
        InvalidParamGroups: If there is one.
    """
    for pattern, values in (patterns or {}).items():
        own = [key for key in _OF_PARTS if isinstance(values, Mapping) and OPTIM not in values and key in values]
        if own:
            raise InvalidParamGroups(
                f"param_groups[{pattern!r}] sets {listing(own)} and names no optimizer. Parameters with {own[0]} of "
                f"their own have an optimizer of their own: add 'optim': {optim.removesuffix(SUFFIX)!r}, or another.",
                code="LO304",
            )


def part_arguments(pattern: str, values: Mapping[str, Any], stepped_in_backward: bool) -> dict[str, Any]:
    """Returns the arguments of the request that a pattern makes for its parameters.

    Args:
        pattern: The pattern.
        values: What it says; ``optim`` is among it.
        stepped_in_backward: Whether the main optimizer is.

    Raises:
        UnknownOptimizer, IncompatibleTrainer: If the optimizer does not exist or cannot be a part of this whole.
    """
    where = f"param_groups[{pattern!r}]"
    name = values[OPTIM]
    if not isinstance(name, str):
        raise InvalidParamGroups(
            f"{where} names optim={name!r}, which is no identifier such as 'adamw_torch'", code="LO101"
        )
    row = REGISTRY.find(name)
    if name.endswith(SUFFIX) or (row.layerwise and not stepped_in_backward):
        raise IncompatibleTrainer(
            f"{where} names optim={name!r}, which is stepped during backward; that is all or nothing. Name the main "
            f"optimizer with {SUFFIX} at its end, and leave it out here.",
            code="LO318",
        )
    if stepped_in_backward:
        # Refuses what couples its parameters, with the reason.
        REGISTRY.find(name.removesuffix(SUFFIX) + SUFFIX)
    own = {key: values[key] for key in _ARGUMENTS if key in values}
    schedule = own.get("lr_scheduler")
    if schedule is not None and not follows_the_step(schedule):
        raise IncompatibleTrainer(
            f"{where} has lr_scheduler={schedule!r}, which is for the whole: the schedule of a part is a function of "
            "the step, such as 'cosine'. Give it to the main optimizer, whose parts follow it.",
            code="LO319",
        )
    part_clip(pattern, values)
    options = {key: value for key, value in values.items() if key not in (OPTIM, _CLIP, *own)}
    return {"optim": name, **own, "optim_args": options or None}


def part_clip(pattern: str, values: Mapping[str, Any]) -> Clipping | None:
    """Returns how a pattern says that the gradients of its part are clipped, if it does.

    Raises:
        InvalidOption: If it is not ``{"norm": limit}`` or ``{"value": limit}`` with a limit above 0.
    """
    given = values.get(_CLIP)
    if given is None:
        return None
    if isinstance(given, Mapping) and len(given) == 1:
        kind, limit = next(iter(given.items()))
        number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if kind in ("norm", "value") and number and limit > 0:
            return Clipping(kind, float(limit))
    raise InvalidOption(
        f"param_groups[{pattern!r}] has clip={given!r}. Use clip={{'norm': 1.0}} or clip={{'value': 0.5}}, with a "
        "limit above 0.",
        code="LO320",
    )


def others_arguments(config: Arguments, spec: OptimizerSpec) -> dict[str, Any]:
    """Returns the arguments of the request for the parameters that an optimizer for hidden matrices leaves to another.

    Raises:
        UnknownOptimizer, IncompatibleTrainer: If that optimizer does not exist or cannot be a part of this whole.
    """
    options = leaving_options(config, spec)
    row = REGISTRY.find(options.others)
    if row.takes != "all" or row.layerwise:
        raise IncompatibleTrainer(
            f"optim={config.optim!r} with others={options.others!r}, which is not for these parameters. Use an "
            f"optimizer for all, without {SUFFIX} at its end, such as others='adamw_torch'.",
            code="LO318",
        )
    if spec.layerwise:
        # Refuses what couples its parameters, with the reason.
        REGISTRY.find(options.others + SUFFIX)
    lr, factor = options.others_lr, options.others_factor
    if factor is not None:
        main = options.default_lr(spec.default_lr) if config.lr is None else config.lr
        lr = None if main is None else main * factor
    return {
        "optim": options.others,
        "lr": lr,
        "weight_decay": config.weight_decay if row.decays else None,
        "warmup_steps": config.warmup_steps if row.warmup == "optimizer" else 0,
    }


def leaving_options(config: Arguments, spec: OptimizerSpec) -> LeavesOthers:
    """Returns the options of a request for an optimizer that leaves parameters to others."""
    options = parse(spec.options, config.optim_args, config.optim)
    assert isinstance(options, LeavesOthers), "rows that leave parameters to others say to whom"
    return options
