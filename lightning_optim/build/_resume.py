"""An optimizer that resumes from a state dict: which states it accepts, and whose hyperparameters win.

torch accepts any state, together with the saved hyperparameters. Here another optimizer's state is refused, saved
values that differ from the requested ones are warned of once, and ``override_on_resume`` names what wins over them.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.build._memory import parameter_bytes
from lightning_optim.errors import InvalidOption
from lightning_optim.optimizers import OwnOptimizer
from lightning_optim.stepping import FORMAT, IDENTIFIER, MARKS, MEMBERS, check_state, refuse_foreign, spread_state
from lightning_optim.table import OptimizerSpec, Options, describe

#: Attribute of an adapter's class: the group keys under which upstream keeps an option with another name.
KEYS = "option_keys"
#: Attribute of an adapter's class: True if torch loads only a part of its state.
INCOMPLETE = "loads_in_parts"
LR, INITIAL_LR = "lr", "initial_lr"
#: What ``override_on_resume`` calls the schedule.
SCHEDULE = "lr_scheduler"

Groups = Sequence[Mapping[str, Any]]


def overridable(spec: OptimizerSpec) -> tuple[str, ...]:
    """Returns what ``override_on_resume`` may name for an optimizer."""
    # For a dotted path only the class's signature is known: whether a group keeps an option shows when it is built.
    scopes = ("group", "constructor") if spec.state is None else ("group",)
    names = (info.name for info in describe(spec.options) if info.scope in scopes)
    free = (name for name in names if name not in spec.options.bound_to_state)
    return (LR, *(("weight_decay",) if spec.decays else ()), *free, SCHEDULE)


def mark(optimizer: Optimizer, identifier: str, state_format: str, names: Mapping[Tensor, str]) -> None:
    """Writes into every group its optimizer's identifier and format and its members' names."""
    for group in optimizer.param_groups:
        members = [names[parameter] for parameter in group["params"]]
        group.update({IDENTIFIER: identifier, FORMAT: state_format, MEMBERS: members})


class Resuming:
    """What an optimizer does in addition to its class when a state dict is loaded.

    Attached to this optimizer only; like hooks, it is not carried over by ``copy.deepcopy`` or ``pickle``.

    Args:
        optimizer: The optimizer as built, before a schedule changes its learning rates.
        spec: Its row.
        options: Its options.
        overrides: Names of :func:`overridable` that win over the state dict.

    Raises:
        InvalidOption: If the optimizer's groups do not keep what ``overrides`` names.
    """

    def __init__(self, optimizer: Optimizer, spec: OptimizerSpec, options: Options, overrides: Sequence[str]) -> None:
        self._spec = spec
        self._options = options
        self._overrides = tuple(name for name in overrides if name != SCHEDULE)
        self._keys: Mapping[str, tuple[str, ...]] = getattr(type(optimizer), KEYS, {})
        self._names = ("weight_decay", *(info.name for info in describe(spec.options)))
        #: The groups' requested hyperparameters.
        self.asked = [
            {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}
            for group in ({**group, "params": None} for group in optimizer.param_groups)
        ]
        for name in self._overrides:
            if not any(set(self.keys(name)) <= set(group) for group in self.asked):
                raise InvalidOption(
                    f"override_on_resume names {name!r}, which {spec.name!r} does not keep in its param groups: it "
                    "comes from the constructor already. Leave it out.",
                    code="LO810",
                )
        self._own: list[dict[str, Any]] = []
        self._counters = frozenset(spec.state.counters if spec.state else ())
        self._saved: Mapping[str, Any] | None = None
        if _runs_hooks(type(optimizer)):
            optimizer.register_load_state_dict_pre_hook(self._before)
            optimizer.register_load_state_dict_post_hook(self._after)
        else:
            optimizer.load_state_dict = MethodType(self._around, optimizer)  # type: ignore[method-assign]

    def keys(self, name: str) -> tuple[str, ...]:
        """Returns the group keys under which the optimizer keeps an option."""
        return self._keys.get(name, (name,))

    def value(self, group: Mapping[str, Any], name: str) -> Any:
        """Returns a group's value of an option; ``None`` if it has none."""
        values = tuple(group.get(key) for key in self.keys(name))
        return values[0] if len(values) == 1 else values

    def _around(self, optimizer: Optimizer, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Wraps the ``load_state_dict`` of a class that runs no hooks."""
        state_dict = self._before(optimizer, state_dict)
        type(optimizer).load_state_dict(optimizer, state_dict, *args, **kwargs)
        self._after(optimizer)

    def _before(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._own = [dict(group) for group in optimizer.param_groups]
        self._saved = state_dict if self._counters else None
        if not isinstance(optimizer, OwnOptimizer):
            # OwnOptimizer checks by itself, after the hooks that translate a state.
            refuse_foreign(self._own, state_dict["param_groups"], f"optim={self._spec.name!r}")
            if self._spec.state is not None and not getattr(optimizer, INCOMPLETE, False):
                check_state(optimizer, state_dict, self._spec.state.always)
            state_dict = spread_state(optimizer, state_dict)
        return state_dict

    def _after(self, optimizer: Optimizer) -> None:
        own, self._own = self._own, []
        saved, self._saved = self._saved, None
        if not isinstance(optimizer, OwnOptimizer):
            self._refuse_lost(optimizer, own)
            if saved is not None:
                self._keep_counters(optimizer, saved)
        for before, group in zip(own, optimizer.param_groups, strict=False):
            group.update({key: before[key] for key in MARKS if key in before})
        for asked, group in zip(self.asked, optimizer.param_groups, strict=False):
            for name in self._overrides:
                self._override(optimizer, group, asked, name)
        self._say_replaced(optimizer)

    def _keep_counters(self, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
        """Restores the counters exactly as saved: torch casts all but ``step`` to the parameter's dtype."""
        indices = (index for group in saved["param_groups"] for index in group["params"])
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        for index, parameter in zip(indices, parameters, strict=True):
            state = optimizer.state.get(parameter, {})
            for key in state.keys() & self._counters:
                counter = saved["state"][index][key]
                state[key] = counter.to(state[key].device, copy=True)

    def _refuse_lost(self, optimizer: Optimizer, own: Groups) -> None:
        """Refuses unmarked groups of another optimizer: they lack hyperparameters."""
        for before, group in zip(own, optimizer.param_groups, strict=False):
            # Keys that torch added to its groups after a file was written are filled in by torch.
            # heavyball takes the locals of a constructor for defaults; its files leave "__class__" among them out.
            names = [key for key in optimizer.defaults if not str(key).startswith("__")]
            lost = [key for key in names if key in before and key not in group]
            if lost:
                raise InvalidOption(
                    f"the param groups in the checkpoint are another optimizer's: they lack {', '.join(lost)}, which "
                    f"optim={self._spec.name!r} needs. Resume with the optimizer that wrote them, or start anew: "
                    "LitModel.load_from_checkpoint(path) reads the weights.",
                    code="LO807",
                )

    def _override(self, optimizer: Optimizer, group: dict[str, Any], asked: Mapping[str, Any], name: str) -> None:
        if name == LR:
            override_lr(group, asked[LR])
            return
        if not set(self.keys(name)) <= set(asked):
            return
        if name != "weight_decay" and self.value(group, name) != self.value(asked, name):
            self._refuse_other_state(optimizer, group, asked, name)
        for key in self.keys(name):
            group[key] = asked[key]

    def _refuse_other_state(
        self, optimizer: Optimizer, group: Mapping[str, Any], asked: Mapping[str, Any], name: str
    ) -> None:
        """Refuses an option under which the loaded state would have another layout."""
        value, other = self.value(asked, name), self.value(group, name)
        if self._spec.state is None:
            differs = isinstance(value, (bool, str)) or value is None or other is None
        else:
            trained = {key: self.value(group, key) for key in self._options.select("group") if key in group}
            layouts = (dataclasses.replace(self._options, **{**trained, name: setting}) for setting in (value, other))
            one, two = (self._bytes(optimizer, group, layout) for layout in layouts)
            differs = one != two
        if differs:
            raise InvalidOption(
                f"override_on_resume names {name!r}, and {name}={value!r} keeps another state than {name}={other!r}, "
                "with which the checkpoint was written. Leave it out of override_on_resume, or start anew from the "
                "checkpoint's weights: LitModel.load_from_checkpoint(path).",
                code="LO810",
            )

    def _bytes(self, optimizer: Optimizer, group: Mapping[str, Any], options: Options) -> list[int]:
        bits = group.get("optim_bits")
        return [
            parameter_bytes(self._spec, options, tuple(parameter.shape), parameter.element_size(), bits)
            for parameter in group["params"]
        ]

    def _say_replaced(self, optimizer: Optimizer) -> None:
        replaced = list(dict.fromkeys(self._replaced(optimizer.param_groups)))
        if not replaced:
            return
        texts = [f"{name}={trained!r} (asked: {asked!r})" for name, trained, asked in replaced]
        free = [name for name in dict.fromkeys(name for name, *_ in replaced) if name in overridable(self._spec)]
        names = f"({', '.join(map(repr, free))}{',' if len(free) == 1 else ''})"
        remedy = f"pass override_on_resume={names}, or " if free else ""
        warnings.warn(
            f"optim={self._spec.name!r} resumes with the checkpoint's hyperparameters: {', '.join(texts)}. To train "
            f"with what was asked, {remedy}start anew from its weights: LitModel.load_from_checkpoint(path).",
            UserWarning,
            stacklevel=5,
        )

    def _replaced(self, groups: Groups) -> Iterator[tuple[str, Any, Any]]:
        """Yields (name, value in effect, requested value) where they differ."""
        for asked, group in zip(self.asked, groups, strict=False):
            # Without a peak the rate may have been changed by a schedule.
            if INITIAL_LR in group or INITIAL_LR not in asked:
                trained = comparable(group.get(INITIAL_LR, group[LR]))
                if not math.isclose(trained, comparable(asked[LR]), rel_tol=1e-6):
                    yield LR, trained, comparable(asked[LR])
            for name in self._names:
                # OneCycleLR cycles momentum or betas, and keeps their range in the group.
                cycled = name in ("betas", "momentum") and "max_momentum" in group
                if not set(self.keys(name)) <= set(asked) or name in KERNEL or cycled:
                    continue
                trained, wanted = comparable(self.value(group, name)), comparable(self.value(asked, name))
                if trained != wanted:
                    yield name, trained, wanted


def _runs_hooks(optimizer_class: type[Optimizer]) -> bool:
    """Whether a class's ``load_state_dict`` is torch's, or calls it, as ours do."""
    load: Any = optimizer_class.load_state_dict
    return load is Optimizer.load_state_dict or load.__module__.partition(".")[0] == __name__.partition(".")[0]


#: Options for how a step is computed, not what: the run keeps its own.
KERNEL = frozenset({"foreach", "fused", "capturable", "triton"})


def override_lr(group: dict[str, Any], lr: Any) -> None:
    """Makes ``lr`` a group's peak; its current rate keeps its proportion to the peak."""
    peak = float(group.get(INITIAL_LR, group[LR]))
    part = float(group[LR]) / peak if peak else 1.0
    group[LR] = _like(group[LR], float(lr) * part)
    if INITIAL_LR in group:
        group[INITIAL_LR] = _like(group[INITIAL_LR], float(lr))


def _like(before: Any, value: float) -> Any:
    return before.new_tensor(value) if isinstance(before, Tensor) else value


def comparable(value: Any) -> Any:
    """Returns a hyperparameter as a plain value, for comparing and printing."""
    if isinstance(value, Tensor):
        # A float32 tensor's 0.001 would print as 0.0010000000474974513.
        return float(f"{value.item():.7g}")
    return tuple(map(comparable, value)) if isinstance(value, (list, tuple)) else value


def as_overrides(value: Iterable[str] | str | None) -> tuple[str, ...]:
    """Returns ``override_on_resume``, names or a comma-separated string, as a tuple; else raises InvalidOption."""
    if value is None:
        return ()
    names = value.split(",") if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(name, str) for name in names):
        raise InvalidOption(
            f"override_on_resume={value!r} is not a list of names such as ['lr', 'weight_decay', 'lr_scheduler']",
            code="LO203",
        )
    return tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
