"""The state of another optimizer, of torch, of another package or of other groups, for one that we have built."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.build._resume import INITIAL_LR, KERNEL, KEYS, LR
from lightning_optim.errors import InvalidOption
from lightning_optim.optimizers import OwnOptimizer
from lightning_optim.stepping import FORMAT, IDENTIFIER, MARKS, MEMBERS, plain_name
from lightning_optim.table import REGISTRY, OptimizerSpec, describe

State = Mapping[str, Any]


def migrate_state_dict(
    state_dict: State, optimizer: Optimizer, parameters: Iterable[Any] | None = None
) -> dict[str, Any]:
    """Returns the state of another optimizer for one that :func:`build_optimizer` has built.

    Torch finds a parameter's state by its position in the groups. Here each state goes to its parameter, whatever the
    groups were. Moments and counters move; hyperparameters are those that ``optimizer`` was built with.

    Args:
        state_dict: What the ``state_dict()`` of the other optimizer returned: of the class that the identifier stands
            for, in torch or another package; of transformers' ``Adafactor``; of galore-torch's ``GaLoreAdamW``.
        optimizer: The optimizer that is to go on. It is not changed.
        parameters: What the other optimizer was given, in that order: ``model.parameters()``, its param groups, or
            names. The parameters are those of ``optimizer``. ``None`` if it was given ``model.named_parameters()``, so
            that the state dict has the names.

    Returns:
        A state dict for ``optimizer.load_state_dict``.

    Raises:
        InvalidOption: If it is not known whose state is whose, or no way leads from one state to the other.
    """
    saved = state_dict["param_groups"]
    entries = [(identity, group) for group in saved for identity in group["params"]]
    named = _names(optimizer)
    known = {name: parameter for parameter, name in named.items()}
    found: dict[Tensor, tuple[Any, State]] = {}
    for (identity, group), given in zip(entries, _given(saved, parameters), strict=True):
        parameter = known.get(plain_name(given)) if isinstance(given, str) else given
        if parameter in named:
            found[parameter] = identity, group
        elif state_dict["state"].get(identity):
            what = repr(given) if isinstance(given, str) else f"one of shape {tuple(given.shape)}"
            raise InvalidOption(
                f"the other optimizer stepped a parameter, {what}, that no group of {_called(optimizer)} holds. Build "
                "both for the same model, with the same parameters frozen.",
                code="LO813",
            )
    missing = next((name for parameter, name in named.items() if parameter not in found), None)
    if missing is not None:
        raise InvalidOption(
            f"the other optimizer did not have {missing!r}, which {_called(optimizer)} steps: its state would begin "
            "anew. Freeze it, or start anew from the weights.",
            code="LO813",
        )
    own = optimizer.state_dict()
    groups, states = [], {}
    for group, live in zip(own["param_groups"], optimizer.param_groups, strict=True):
        spec = REGISTRY.find(live[IDENTIFIER])
        sources = [found[parameter] for parameter in live["params"]]
        groups.append({**group, **_counters(optimizer, spec, live, [source for _, source in sources])})
        for number, parameter, (identity, source) in zip(group["params"], live["params"], sources, strict=True):
            state = state_dict["state"].get(identity)
            if state:
                states[number] = _moved(optimizer, spec, named[parameter], parameter, live, state, source)
    return {"state": states, "param_groups": groups}


def _names(optimizer: Optimizer) -> dict[Tensor, str]:
    """Returns the names of an optimizer's parameters, by which they are marked."""
    if not all(MEMBERS in group for group in optimizer.param_groups):
        raise InvalidOption(
            f"{type(optimizer).__name__} was not built by build_optimizer, a module with OptimMixin or OptimCallback: "
            "its groups do not name their parameters. Build it by an identifier or a dotted path.",
            code="LO812",
        )
    return {
        parameter: plain_name(name)
        for group in optimizer.param_groups
        for parameter, name in zip(group["params"], group[MEMBERS], strict=True)
    }


def _given(saved: Sequence[State], parameters: Iterable[Any] | None) -> list[Tensor | str]:
    """Returns, in the order of a state dict, whose state is whose: parameters, or their names."""
    if parameters is None:
        for key in ("param_names", MEMBERS):
            if all(key in group for group in saved):
                return [name for group in saved for name in group[key]]
        raise InvalidOption(
            "the state dict does not say whose state is whose. Pass what the other optimizer was given, in that order: "
            "migrate_state_dict(state_dict, optimizer, model.parameters()), or its param groups.",
            code="LO812",
        )
    listed = [*parameters]
    grouped = [_flat(group["params"]) for group in listed] if listed and isinstance(listed[0], Mapping) else None
    there = [len(group["params"]) for group in saved]
    here = [len(group) for group in grouped] if grouped is not None else [len(listed)]
    if (here != there) if grouped is not None else (sum(here) != sum(there)):
        raise InvalidOption(
            f"parameters has {_sizes(here)}, and the state dict {_sizes(there)}. Pass what the other optimizer was "
            "given, in that order, frozen parameters included if it had them.",
            code="LO812",
        )
    return [each for group in grouped for each in group] if grouped is not None else _flat(listed)


def _flat(parameters: Iterable[Any]) -> list[Tensor | str]:
    return [each[1] if isinstance(each, tuple) else each for each in parameters]


def _sizes(sizes: Sequence[int]) -> str:
    return f"{' + '.join(map(str, sizes)) or 0} parameters"


def _called(optimizer: Optimizer) -> str:
    names = dict.fromkeys(group[IDENTIFIER] for group in optimizer.param_groups)
    return " and ".join(f"optim={name!r}" for name in names)


def _counters(
    optimizer: Optimizer, spec: OptimizerSpec, group: dict[str, Any], sources: Sequence[State]
) -> dict[str, Any]:
    """Returns what a class counts in its groups, such as schedule-free's ``k``: from the groups of the members."""
    keys: Mapping[str, tuple[str, ...]] = getattr(type(optimizer), KEYS, {})
    options = {key for info in describe(spec.options) for key in keys.get(info.name, (info.name,))}
    chosen = {*options, *KERNEL, *MARKS, *_CHOSEN}
    counted: dict[str, Any] = {}
    # Some make theirs in the first step.
    keep = (
        group.keys()
        if isinstance(optimizer, OwnOptimizer)
        else group.keys() | {key for each in sources for key in each}
    )
    for key in keep - chosen:
        values = [source[key] for source in sources if key in source]
        if any(value != values[0] for value in values):
            raise InvalidOption(
                f"the groups of the other optimizer have counted {key!r} differently, {values[0]!r} and another, and "
                f"their parameters are in one group of {_called(optimizer)}. Build it with the same groups.",
                code="LO813",
            )
        # A copy: tensors are counted up in place.
        counted.update({key: copy.deepcopy(values[0])} if values else {})
    return counted


#: Hyperparameters of torch's groups that may be no options.
_CHOSEN = {
    "params",
    "name",
    "param_names",
    LR,
    INITIAL_LR,
    "weight_decay",
    "maximize",
    "differentiable",
    "betas",
    "eps",
}


def _moved(
    optimizer: Optimizer,
    spec: OptimizerSpec,
    name: str,
    parameter: Tensor,
    group: dict[str, Any],
    state: State,
    source: State,
) -> dict[str, Any]:
    """Returns the state of one parameter."""
    state_format, moved = group.get(FORMAT), dict(state)
    if isinstance(optimizer, OwnOptimizer) and source.get(FORMAT) != state_format:
        translate = _TRANSLATIONS.get(str(state_format))
        if translate is None or FORMAT in source:
            raise InvalidOption(
                f"no way leads from the state of the other optimizer, which has {', '.join(map(str, state))}, to that "
                f"of {_called(optimizer)}. Go on with what wrote it, or start anew from the weights.",
                code="LO813",
            )
        moved = translate(moved, group)
        expected = optimizer._initial_state(parameter, group)
        wrong = [key for key, value in expected.items() if _shape(moved.get(key)) != _shape(value)]
    else:
        copies = spec.state.always if spec.state is not None else {}
        wrong = [key for key, count in copies.items() if count == 1 and not _fits(moved.get(key), parameter)]
    if wrong:
        raise InvalidOption(
            f"{name!r}, of shape {tuple(parameter.shape)}, would get {wrong[0]!r} of shape "
            f"{_shape(moved.get(wrong[0]))}. "
            "It is another optimizer's or another parameter's: pass what the other optimizer was given, in that order.",
            code="LO812",
        )
    return moved


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _fits(value: Any, parameter: Tensor) -> bool:
    # bitsandbytes nests its tensors; torchao's and flattened ones have one code per element.
    return not isinstance(value, Tensor) or value.ndim < 2 or value.shape == parameter.shape


def _from_adafactor(state: dict[str, Any], group: State) -> dict[str, Any]:
    """From transformers' Adafactor: it also notes the size of the weights, which is computed when it is needed."""
    return {key: value for key, value in state.items() if key != "RMS"}


def _from_galore(state: dict[str, Any], group: State) -> dict[str, Any]:
    """From galore-torch's GaLoreAdamW: its projector is an object with a basis."""
    projector = state.pop("projector", None)
    if projector is None:
        return state
    basis, moment = projector.ortho_matrix, state["exp_avg"]
    if isinstance(basis, (list, tuple)):
        return {**state, "found": True, "left": basis[0], "right": basis[1].mT}
    # [m, rank] with moments [rank, n], or [rank, n] with moments [m, rank].
    rank = min(*basis.shape, *moment.shape)
    left = basis.shape[1] == moment.shape[0] == rank and not basis.shape[0] == moment.shape[1] == rank
    return {**state, "found": True, **({"left": basis} if left else {"right": basis.mT})}


_TRANSLATIONS: Mapping[str, Callable[[dict[str, Any], State], dict[str, Any]]] = {
    "Adafactor/1": _from_adafactor,
    "GaLoreAdamW/1": _from_galore,
}
