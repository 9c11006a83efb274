"""From named parameters and a policy to param groups: every trainable parameter in exactly one of them.

The policy, in the order in which it is applied to a parameter:

1. the first of the user's patterns that matches it sets its hyperparameters;
2. layer-wise decay scales its learning rate by its depth, unless a pattern sets it;
3. biases, parameters of norm layers and others with fewer than two dimensions are not decayed, unless a pattern sets
   weight_decay;
4. if states are quantized, those of embeddings stay in 32 bits, unless the options say otherwise;
5. if gradients are projected, those of parameters that no target module owns are not;
6. if groups must say by a flag whether they are hidden matrices, they do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from lightning_optim.errors import InvalidOption, InvalidParamGroups, close_names, listing
from lightning_optim.groups._layer_decay import layer_depths
from lightning_optim.groups._parameters import NamedParameter, compiled
from lightning_optim.groups._target_modules import TargetModules, matrices, projected
from lightning_optim.table import NON_NEGATIVE, OptimizerSpec, Options, Role, as_number, coerce, describe


@dataclass(frozen=True)
class GroupPolicy:
    """How parameters are divided into groups.

    Attributes:
        lr: Learning rate.
        weight_decay: Weight decay of the parameters that decay.
        overrides: Hyperparameters by regular expression over parameter names.
        layer_decay: Factor per layer of depth; ``None`` gives all layers the same lr.
        layer_pattern: Regular expression whose one group is the layer's number; ``None`` finds the layers.
        target_modules: The modules whose matrices a projecting optimizer projects; ``None`` means ``"all-linear"``.
        among: All parameters of the model, among which layers are counted; ``()`` means those that are divided.
        roles: Which matrices are a model's ends, by id, for an optimizer that treats those in a way of their own.
        hidden: Which parameters are hidden matrices, by id, for a class whose groups must say so.
    """

    lr: float
    weight_decay: float
    overrides: Mapping[str, Mapping[str, Any]]
    layer_decay: float | None = None
    layer_pattern: str | None = None
    target_modules: TargetModules = None
    among: Sequence[NamedParameter] = ()
    roles: Mapping[int, Role] = field(default_factory=dict)
    hidden: Set[int] = frozenset()


def make_groups(
    parameters: list[NamedParameter], spec: OptimizerSpec, options: Options, policy: GroupPolicy
) -> list[dict[str, Any]]:
    """Divides the parameters into groups for ``spec``'s class, in a fixed order.

    Returns:
        Param groups with ``name``, ``params``, ``lr``, ``weight_decay`` (if the class decays), ``optim_bits`` (if its
        states are quantized), ``rank`` (if the class projects; ``None`` for groups that are not projected), the flag of
        hidden matrices (if the class has one) and the overridden options.

    Raises:
        InvalidParamGroups: If a pattern is malformed, matches nothing or only what an earlier pattern took, or if
            nothing is projected by an optimizer that projects.
        InvalidOption: If an override is unknown, of the wrong type or out of range.
    """
    overrides = {pattern: _checked(pattern, values, spec, options) for pattern, values in policy.overrides.items()}
    pattern_of = first_matches(parameters, overrides)
    among = policy.among or parameters
    depths = layer_depths(among, policy.layer_pattern) if policy.layer_decay is not None else {}
    targets = projected(parameters, policy.target_modules) if spec.projects else {}
    stacks = matrices(parameters, policy.target_modules) if spec.takes != "all" else {}
    flag = spec.flag
    _check_projected(parameters, pattern_of, overrides, targets, options)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for parameter in parameters:
        identity = id(parameter.parameter)
        pattern = pattern_of.get(identity)
        override = overrides[pattern] if pattern is not None else {}
        labels = [pattern] if pattern is not None else []
        rates = (policy.lr, policy.weight_decay)
        group: dict[str, Any] = {}
        if flag is not None:
            group[flag.key] = identity in policy.hidden
            labels += ["hidden"] if identity in policy.hidden else []
            rates = rates if identity in policy.hidden else flag.rates(options)
        group["lr"] = rates[0]
        if identity in depths:
            labels.append(f"layer_{depths[identity].layer}")
            group["lr"] *= (policy.layer_decay or 1.0) ** depths[identity].from_top
        if identity in policy.roles:
            labels.append(policy.roles[identity])
            group.update(options.for_role(policy.roles[identity]))
        if spec.decays:
            group["weight_decay"] = rates[1] if parameter.decays else 0.0
            labels += [] if "weight_decay" in override else ["decay" if parameter.decays else "no_decay"]
        if spec.bits is not None:
            keep = parameter.is_embedding and not getattr(options, "quantize_embeddings", False)
            group["optim_bits"] = 32 if keep else spec.bits
            labels += ["32bit"] if keep and "optim_bits" not in override else []
        if identity in targets:
            labels.append("low_rank")
            group["rank"] = options.rank  # type: ignore[attr-defined]
            if targets[identity]:
                labels.append("stacked")
                group["stack_dims"] = targets[identity]
        elif stacks.get(identity):
            labels.append("stacked")
            group["stack_dims"] = stacks[identity]
        elif spec.projects:
            override = {name: value for name, value in override.items() if name not in options.only_projected}
            group["rank"] = None
        name = "/".join(labels) or "all"
        # The pattern is part of the key: a pattern "decay" must not meet the group of that name.
        key = (pattern, name, group.get("stack_dims"))
        groups.setdefault(key, {"name": name, "params": [], **group, **override})["params"].append(parameter.parameter)
    make_unique(list(groups.values()))
    # Decayed groups first, whichever module comes first: adding a leading norm layer must not swap the groups.
    return sorted(groups.values(), key=lambda group: "no_decay" in group["name"].split("/"))


def _check_projected(
    parameters: list[NamedParameter],
    pattern_of: Mapping[int, str],
    overrides: Mapping[str, Mapping[str, Any]],
    targets: Mapping[int, int],
    options: Options,
) -> None:
    """Refuses projection options for parameters that are not projected, except for biases matched with a weight."""
    for pattern, values in overrides.items():
        matched = [p for p in parameters if pattern_of.get(id(p.parameter)) == pattern]
        without = [p for p in matched if id(p.parameter) not in targets]
        stray = next((p for p in without if p.decays or len(without) == len(matched)), None)
        wanted = next((name for name in values if name in options.only_projected), None)
        if stray is not None and wanted is not None:
            raise InvalidParamGroups(
                f"param_groups[{pattern!r}] sets {wanted}={values[wanted]!r} for {stray.name!r}, which is not "
                "projected. Name its module, or the parameter itself, in optim_target_modules (matrices, weights "
                "of convolutions and stacks of matrices can be projected), or narrow the pattern",
                code="LO314",
            )


def make_unique(groups: list[dict[str, Any]]) -> None:
    """Numbers groups of the same name: LearningRateMonitor refuses equal names."""
    seen: dict[str, int] = {}
    for group in groups:
        seen[group["name"]] = seen.get(group["name"], 0) + 1
        if seen[group["name"]] > 1:
            group["name"] += f"_{seen[group['name']]}"


def override_keys(spec: OptimizerSpec) -> tuple[str, ...]:
    """Returns the names of what a pattern of ``param_groups`` may set."""
    decay = ("weight_decay",) if spec.decays else ()
    bits = ("optim_bits",) if spec.bits else ()
    return ("lr", *decay, *bits, *(info.name for info in describe(spec.options) if info.scope == "group"))


def _checked(pattern: str, values: Mapping[str, Any], spec: OptimizerSpec, options: Options) -> dict[str, Any]:
    """Returns an override with its values converted, and checked together with the other options."""
    if not isinstance(values, Mapping):
        raise InvalidParamGroups(
            f"param_groups[{pattern!r}] must be a mapping such as {{'lr': 1e-4}}, got {values!r}", code="LO301"
        )
    checked: dict[str, Any] = {}
    allowed = override_keys(spec)
    for key, value in values.items():
        if key not in allowed:
            raise InvalidParamGroups(
                f"param_groups[{pattern!r}] sets {key!r}, which {spec.name!r} cannot vary between groups; "
                f"allowed: {listing(allowed)}",
                code="LO304",
            )
        if key in ("lr", "weight_decay"):
            checked[key] = as_number(f"param_groups[{pattern!r}][{key!r}]", value, NON_NEGATIVE, optional=False)
        elif key == "optim_bits":
            if value not in (spec.bits, 32):
                raise InvalidParamGroups(
                    f"param_groups[{pattern!r}] sets optim_bits={value!r}; {spec.name!r} allows {spec.bits} or 32",
                    code="LO304",
                )
            checked[key] = value
        else:
            checked[key] = coerce(spec.options, key, value, spec.name)
    own = options.select("group")
    try:
        dataclasses.replace(options, **{key: value for key, value in checked.items() if key in own}).check()
    except InvalidOption as error:
        raise InvalidOption(f"param_groups[{pattern!r}] of {spec.name!r}: {error.text}", code=error.codes) from None
    return checked


def first_matches(parameters: Sequence[NamedParameter], patterns: Iterable[str]) -> dict[int, str]:
    """Returns the first pattern that matches each parameter, by the parameter's id.

    Raises:
        InvalidParamGroups: If a pattern is malformed, matches nothing or only what an earlier pattern took.
    """
    assigned: dict[int, str] = {}
    for pattern in patterns:
        expression = compiled(pattern, "param_groups")
        matches = [p for p in parameters if any(expression.fullmatch(name) for name in p.names)]
        fresh = [p for p in matches if id(p.parameter) not in assigned]
        if not fresh:
            taken = sorted({assigned[id(p.parameter)] for p in matches})
            names = [name for p in parameters for name in p.names]
            if matches:
                reason = f"matches only parameters that an earlier pattern takes ({listing(taken)}); put it first"
            elif names:
                near = close_names(pattern, names, limit=4) or names[:4]
                reason = (
                    "matches no trainable parameter; patterns are regular expressions over whole names such as "
                    f"{listing(near)}"
                )
            else:
                reason = "needs names to match; pass the module or model.named_parameters()"
            raise InvalidParamGroups(f"param_groups pattern {pattern!r} {reason}", code="LO302")
        assigned.update({id(p.parameter): pattern for p in fresh})
    return assigned
