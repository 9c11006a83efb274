"""Which parameters each of the optimizers takes that a request names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_optim.build._config import OptimConfig
from lightning_optim.build._parts import leaving_options, part_clip
from lightning_optim.build._resume import overridable
from lightning_optim.errors import InvalidParamGroups, listing
from lightning_optim.groups import NamedParameter, all_matrices, first_matches, hidden_matrices
from lightning_optim.stepping import Clipping
from lightning_optim.table import SUFFIX, Role


@dataclass(frozen=True)
class Part:
    """One of the optimizers that a request asks for.

    Attributes:
        name: The pattern that names it; for the main optimizer its identifier.
        config: The request for it alone.
        parameters: What it steps.
        follows: Its learning rate as a factor of the main optimizer's; ``None`` if it has its own.
        clip: How its gradients are clipped by themselves; ``None`` if with all others.
        remark: How its parameters were found, for the report.
        roles: Which of them are a model's ends, by id, for an optimizer that treats those in a way of their own.
        hidden: Hidden matrices, by id, for an optimizer that must be told of them.
    """

    name: str
    config: OptimConfig
    parameters: list[NamedParameter]
    follows: float | None = None
    clip: Clipping | None = None
    remark: str = ""
    roles: Mapping[int, Role] = field(default_factory=dict)
    hidden: frozenset[int] = frozenset()


def divide(parameters: Sequence[NamedParameter], config: OptimConfig, model: Sequence[NamedParameter]) -> list[Part]:
    """Returns the optimizers of a request with their parameters, the main one first.

    Args:
        parameters: What is trained.
        config: The request.
        model: What there is, also frozen, in the order of registration.

    Raises:
        InvalidParamGroups: If a pattern takes nothing, or nothing is left for the main optimizer.
    """
    patterns = config.param_groups or {}
    if not config.parts and config.spec.takes == "all":
        return [_flagged(Part(_plain_name(config.optim), config, list(parameters)), parameters, model)]
    pattern_of = first_matches(parameters, patterns)
    taken = {pattern: _matched(parameters, pattern_of, pattern) for pattern in config.parts}
    rest = [p for p in parameters if pattern_of.get(id(p.parameter)) not in taken]
    if not rest:
        raise InvalidParamGroups(
            f"the patterns {listing(taken)} of param_groups take every parameter, and optim={config.optim!r} would "
            "train nothing. Name the optimizer of one of them as optim, and leave its pattern out.",
            code="LO316",
        )
    main = config.replace(
        param_groups={pattern: values for pattern, values in patterns.items() if pattern not in taken} or None,
        override_on_resume=[name for name in config.overrides if name in overridable(config.spec)] or None,
    )
    parts = [Part(_plain_name(config.optim), main, rest)]
    if config.spec.takes != "all":
        parts = _matrices_and_others(parameters, model, rest, main, pattern_of)
    named = (
        Part(pattern, config.parts[pattern], members, clip=part_clip(pattern, patterns[pattern]))
        for pattern, members in taken.items()
    )
    return [_flagged(part, parameters, model) for part in (*parts, *named)]


def _flagged(part: Part, parameters: Sequence[NamedParameter], model: Sequence[NamedParameter]) -> Part:
    """Returns a part with what its class must be told, if it must be, of hidden matrices."""
    if part.config.spec.flag is None:
        return part
    # Of the whole model: what is thawed later may hold none, and is told so.
    found = hidden_matrices(model or parameters, part.config.optim_target_modules)
    return dataclasses.replace(part, remark=found.remark, hidden=frozenset(found.stack_dims))


def _matrices_and_others(
    parameters: Sequence[NamedParameter],
    model: Sequence[NamedParameter],
    rest: Sequence[NamedParameter],
    config: OptimConfig,
    pattern_of: Mapping[int, str],
) -> list[Part]:
    """Returns the matrices that the main optimizer takes, and the others for the one in its option ``others``.

    Raises:
        InvalidParamGroups: If patterns leave it none.
    """
    hidden_only = config.spec.takes == "hidden matrices"
    # Among all: where a pattern takes the output layer, the last layer that is left is none.
    targets = config.optim_target_modules
    found = hidden_matrices(parameters, targets, model) if hidden_only else all_matrices(parameters, model)
    own = [p for p in rest if id(p.parameter) in found.stack_dims]
    left = [p for p in rest if id(p.parameter) not in found.stack_dims]
    if not own:
        raise InvalidParamGroups(
            f"the patterns of param_groups that name an optimizer leave no matrix to optim={config.optim!r}. Name one "
            "of theirs as optim, or let their patterns take less.",
            code="LO315",
        )
    own_config = _with_patterns_of(own, config, pattern_of)
    main = Part(_plain_name(config.optim), own_config, own, remark=found.remark, roles=found.roles)
    if not left:
        return [main]
    assert config.others is not None, "the request has made it"
    others = _with_patterns_of(left, config.others.replace(param_groups=config.param_groups), pattern_of)
    return [main, Part(_plain_name(others.optim), others, left, leaving_options(config, config.spec).others_factor)]


def _with_patterns_of(
    parameters: Sequence[NamedParameter], config: OptimConfig, pattern_of: Mapping[int, str]
) -> OptimConfig:
    """Returns the request with those patterns only that one of these parameters takes."""
    used = {pattern_of.get(id(p.parameter)) for p in parameters}
    return config.replace(param_groups={p: v for p, v in (config.param_groups or {}).items() if p in used} or None)


def _matched(parameters: Iterable[NamedParameter], pattern_of: Mapping[int, str], pattern: str) -> list[NamedParameter]:
    return [p for p in parameters if pattern_of.get(id(p.parameter)) == pattern]


def _plain_name(identifier: str) -> str:
    return identifier.removesuffix(SUFFIX)
