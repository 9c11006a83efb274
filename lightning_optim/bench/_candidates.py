"""The optimizers of a comparison: identifiers with options, and the learning rates that each may try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_optim.bench._workload import Workload
from lightning_optim.build import OptimConfig
from lightning_optim.choose import RANKED
from lightning_optim.errors import InvalidOption, MissingDependency, listing
from lightning_optim.table import REGISTRY, OptimizerSpec, as_mapping, parse

_STEPS_PER_DECADE = 2
_DIGITS = 3


@dataclass(frozen=True)
class Candidate:
    """An optimizer that takes part.

    Attributes:
        label: As it was typed: ``NAME`` or ``NAME,option=value,...``.
        config: With the learning rate in the middle of its grid.
    """

    label: str
    config: OptimConfig

    @property
    def name(self) -> str:
        """The identifier."""
        return self.config.optim

    def rates(self, count: int) -> list[float]:
        """Returns ``count`` learning rates, the default one in the middle, each the square root of ten apart."""
        assert self.config.lr is not None
        exponents = ((number - count // 2) / _STEPS_PER_DECADE for number in range(count))
        return [float(f"{self.config.lr * 10**exponent:.{_DIGITS}g}") for exponent in exponents]


def candidate(text: str, workload: Workload) -> Candidate:
    """Returns the optimizer that ``text`` names, with what the workload shares as far as it takes it.

    Raises:
        UnknownOptimizer, InvalidOption, IncompatibleTrainer, MissingDependency: If it cannot take part.
    """
    name, _, options = text.partition(",")
    spec = REGISTRY.find(name)
    # Options of a config belong to the optimizer that it names.
    own = workload.own if workload.own is not None and workload.own.optim == name else None
    args = {**(as_mapping(own.optim_args, name) if own else {}), **as_mapping(options or None, name)}
    lr = args.pop("lr", own.lr if own else None)
    config = OptimConfig(optim=name, lr=lr, optim_args=args or None, **_taken(spec, workload.shared))
    config.ensure_available()
    if config.lr is None:
        default = parse(spec.options, config.optim_args, name).default_lr(spec.default_lr)
        if not default:
            raise InvalidOption(
                f"{text!r} has no learning rate to try others around; write one, as in '{name},lr=1e-3'", code="LO907"
            )
        config = config.replace(lr=default)
    if not config.lr:
        raise InvalidOption(f"{text!r}: a grid of learning rates needs one above 0 in its middle", code="LO907")
    return Candidate(text, config)


def _taken(spec: OptimizerSpec, shared: Any) -> dict[str, Any]:
    """Returns what of the shared arguments this row takes; the others would be refused."""
    refused = set()
    if not spec.decays:
        refused |= {"weight_decay"}
    if spec.averages_weights:
        refused |= {"lr_scheduler", "lr_scheduler_args"}
    if spec.warmup == "none":
        refused |= {"warmup_steps"}
    if not spec.projects:
        refused |= {"optim_target_modules"}
    taken = {name: value for name, value in shared.items() if name not in refused}
    return {"optim_target_modules": "all-linear", **taken} if spec.projects else taken


def chosen(names: Sequence[str], workload: Workload, quick: bool) -> tuple[list[Candidate], dict[str, str]]:
    """Returns the optimizers to compare, the reference first, and those left out with the reasons.

    Args:
        names: What was asked for; if nothing, those of the published rankings that can run here.
        workload: What is trained.
        quick: Whether what has to be compiled first is left out of the latter.

    Raises:
        UnknownOptimizer, InvalidOption, IncompatibleTrainer, MissingDependency: If one that was asked for cannot take
            part.
    """
    if names:
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise InvalidOption(f"{listing(repeated)} named more than once", code="LO907")
        return [candidate(name, workload) for name in names], {}
    own = [workload.own.optim] if workload.own else []
    taken, left_out = [], {}
    for name in dict.fromkeys((*own, *RANKED)):
        if quick and name not in own and REGISTRY.find(name).compiles:
            left_out[name] = "has to be compiled first, which --quick has no time for"
            continue
        try:
            taken.append(candidate(workload.defaults.get(name, name), workload))
        except MissingDependency as error:
            left_out[name] = error.text
    return taken, left_out
