"""The pipeline, top to bottom: identifier -> row -> package -> options -> groups -> rules -> optimizer -> layerwise.

An identifier that stands for others (``adamw``), or one with a fallback, goes through it several times until one runs.
Patterns that name an optimizer make parts: each goes through it with its own parameters, and then they become one.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Unpack

from lightning_optim._compat.torch import SCALES
from lightning_optim.build import rules
from lightning_optim.build._arguments import OptimizerArguments, takes_arguments
from lightning_optim.build._config import OptimConfig
from lightning_optim.build._division import Part, divide
from lightning_optim.build._memory import state_bytes
from lightning_optim.build._resume import Resuming, mark
from lightning_optim.build._schedules import resolve_warmup
from lightning_optim.errors import IncompatibleTrainer, InvalidOption, InvalidParamGroups, MissingDependency, joined
from lightning_optim.groups import (
    GroupPolicy,
    NamedParameter,
    Target,
    device_types,
    every_parameter,
    left_out,
    make_groups,
    make_unique,
    trainable,
)
from lightning_optim.layerwise import Layerwise
from lightning_optim.optimizers import OwnOptimizer
from lightning_optim.stepping import FORMAT, IDENTIFIER, PART, Composite, keep_kernel, say_if_not_finite
from lightning_optim.table import REGISTRY, SUFFIX, OptimizerSpec, Options, availability, parse, refuse_unknown

# Errors that are the user's on every device, if the requested identifier raises them.
_MISTAKES = (InvalidOption, InvalidParamGroups)

Builder = Callable[[Target, OptimConfig], Optimizer]

# What build_optimizer delegates to; None means it builds the optimizer itself.
_BUILDER: ContextVar[Builder | None] = ContextVar("builder", default=None)
#: Called with every optimizer that build_optimizer builds itself, and its identifier.
WATCHERS: list[Callable[[Optimizer, str], None]] = []


@contextmanager
def built_by(builder: Builder) -> Iterator[None]:
    """Delegates every call of :func:`build_optimizer` inside the context to ``builder``."""
    token = _BUILDER.set(builder)
    try:
        yield
    finally:
        _BUILDER.reset(token)


@dataclass(frozen=True)
class ResolvedOptimizer:
    """An optimizer and how it was built.

    Attributes:
        name: The identifier that was built; not the requested one if that stands for others or cannot run.
        optimizer: The optimizer, ready to step.
        spec: Its row.
        options: Its options, defaults filled in.
        lr: Learning rate.
        weight_decay: Weight decay of the parameters that decay.
        state_bytes: Bytes of its full state, or ``None`` if the row does not say.
        not_projected: Modules that ``optim_target_modules`` names but that cannot be projected, with their kinds.
        resuming: What it does when a state dict is loaded, and the requested hyperparameters.
        parameters: The parameters that were divided into groups.
        policy: How they were divided.
        request: What was asked for, and for which parameters.
        passed_over: Identifiers that were tried before, with the reason why each cannot run here.
        parts: The optimizers that it consists of, the main one first; empty for a single one. The attributes above are
            then the main one's, but for ``optimizer`` and ``state_bytes``, which are the whole's.
    """

    name: str
    optimizer: Optimizer
    spec: OptimizerSpec
    options: Options
    lr: float
    weight_decay: float
    state_bytes: int | None
    not_projected: Mapping[str, str]
    resuming: Resuming
    parameters: list[NamedParameter]
    policy: GroupPolicy
    request: Part
    passed_over: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[ResolvedOptimizer, ...] = ()

    @property
    def each(self) -> tuple[ResolvedOptimizer, ...]:
        """The parts, or itself."""
        return self.parts or (self,)

    def rates(self, lr: float) -> list[float]:
        """Returns the learning rate of each group, had ``lr`` been asked for; parts keep what they asked for."""
        main, *others = self.each
        rates = [part.lr if part.request.follows is None else lr * part.request.follows for part in others]
        return [*main._rates(lr), *(rate for part, own in zip(others, rates, strict=True) for rate in part._rates(own))]

    def _rates(self, lr: float) -> list[float]:
        groups = make_groups(self.parameters, self.spec, self.options, dataclasses.replace(self.policy, lr=lr))
        return [group["lr"] for group in groups]

    def regroup(self, target: Target, lr: float) -> list[dict[str, Any]]:
        """Divides the parameters of ``target`` as its own were, at another learning rate and without layer decay.

        Each group says whose it is, and parts keep the proportion of their rate to the main optimizer's.

        Raises:
            InvalidParamGroups: If some belong to an optimizer that was not built, because it had nothing to train.
            IncompatibleTrainer: If some cannot be stepped by the optimizer they belong to; when it was built, they were
                frozen.
        """
        found = []
        by_name = {built.request.name: built for built in self.each}
        model = every_parameter(target)
        for part in divide(trainable(model), self.request.config, model):
            if part.name not in by_name:
                raise InvalidParamGroups(
                    f"{part.parameters[0].name!r} belongs to optim={part.config.optim!r}, which had nothing to train "
                    "when the optimizers were built. Leave one of its parameters unfrozen from the start.",
                    code="LO317",
                )
            built = by_name[part.name]
            rate = lr if built is self.each[0] or not self.lr else built.lr * lr / self.lr
            policy = dataclasses.replace(
                built.policy, lr=rate, layer_decay=None, layer_pattern=None, roles=part.roles, hidden=part.hidden
            )
            first = built.optimizer.param_groups[0]
            whose = {key: first[key] for key in (IDENTIFIER, FORMAT, PART) if key in first}
            groups = make_groups(part.parameters, built.spec, built.options, policy)
            request = rules.Request(built.spec, part.config.replace(optim=built.name), built.options)
            rules.check_run(rules.Run(request, part.parameters, groups))
            found += [{**group, **whose} for group in groups]
        return found

    def substitution(self, asked: str) -> str:
        """Returns a sentence about which identifier fell back to this one and why; empty if none did."""
        if asked not in self.passed_over:
            return ""
        reasons = "\n".join(dict.fromkeys(self.passed_over.values()))
        return f"optim_fallback=True: optim={self.name!r} takes the place of {asked!r}.\n{reasons}"


def resolve(
    target: Target,
    config: OptimConfig,
    *,
    total_steps: int | None = None,
    trainer: rules.TrainerFacts | None = None,
    only: Set[Tensor] | None = None,
) -> ResolvedOptimizer:
    """Builds the optimizer that ``config`` asks for, of its parts or its candidates the first that can run.

    Args:
        target: A module, its parameters or (name, parameter) pairs.
        config: The request.
        total_steps: Steps of the training, for a warm-up that is a fraction of it; only optimizers that warm up
            themselves use it.
        trainer: Facts about the Trainer, if there is one.
        only: The only parameters of ``target`` to optimize; ``None`` means all.

    Raises:
        UnknownOptimizer, MissingDependency, InvalidOption, InvalidParamGroups, IncompatibleTrainer: For what cannot
            work; the text says what to type instead.
    """
    model = every_parameter(target)
    parameters = [p for p in trainable(model) if only is None or p.parameter in only]
    if not parameters:
        raise InvalidParamGroups(
            "no parameter to optimize: the module's own optimizer has none that can be trained", code="LO306"
        )
    parts = divide(parameters, config, model)
    resolved = [resolve_part(part, parameters, total_steps, trainer) for part in parts]
    whole = resolved[0] if len(parts) == 1 else _as_one(resolved, config)
    if whole.spec.layerwise:
        names = {parameter.parameter: parameter.name for parameter in parameters}
        Layerwise(whole.optimizer, whole.options.select("layerwise")["bucket_mb"], names=names)
    return whole


def resolve_part(
    part: Part,
    everything: list[NamedParameter],
    total_steps: int | None = None,
    trainer: rules.TrainerFacts | None = None,
) -> ResolvedOptimizer:
    """Builds one of the optimizers of a request, to be stepped after backward; see :func:`resolve`."""
    config, parameters = part.config, part.parameters
    warmup_steps = resolve_warmup(config.warmup_steps, total_steps) if config.spec.warmup == "optimizer" else 0
    refusals: dict[str, Any] = {}
    for name in _candidates(config, parameters):
        try:
            resolved = _build(part, config.replace(optim=name), everything, warmup_steps, trainer)
        except (MissingDependency, IncompatibleTrainer, *_MISTAKES) as error:
            if name == config.optim and isinstance(error, _MISTAKES):
                raise
            refusals[name] = error
        else:
            passed_over = {name: error.text for name, error in refusals.items()}
            return dataclasses.replace(resolved, request=part, passed_over=passed_over)
    first, *others = refusals.values()
    if all(isinstance(error, _MISTAKES) for error in refusals.values()) or not others:
        raise first
    raise joined([*refusals.values()], f"no optimizer for optim={config.optim!r} can run here:") from first


def _as_one(parts: list[ResolvedOptimizer], config: OptimConfig) -> ResolvedOptimizer:
    """Returns several optimizers as one; its groups are theirs, those of a part named after it."""
    for part in parts[1:]:
        for group in part.optimizer.param_groups:
            group["name"] = f"{part.request.name}/{group['name']}"
    clips = {part.request.name: part.request.clip for part in parts if part.request.clip is not None}
    whole = Composite({part.request.name: part.optimizer for part in parts}, clips)
    make_unique(whole.param_groups)
    sizes = [part.state_bytes for part in parts]
    return dataclasses.replace(
        parts[0],
        optimizer=whole,
        state_bytes=None if None in sizes else sum(size for size in sizes if size is not None),
        request=dataclasses.replace(parts[0].request, config=config),
        parameters=[parameter for part in parts for parameter in part.parameters],
        parts=tuple(parts),
    )


def _candidates(config: OptimConfig, parameters: Sequence[NamedParameter]) -> tuple[str, ...]:
    # Of the identifiers that stand in for another, only those for these devices are worth mentioning.
    devices = device_types(parameters)
    fitting = (name for name in config.candidates if name == config.optim or REGISTRY.find(name).runs_on(devices))
    return tuple(fitting) or config.candidates


def _runnable(names: Sequence[str], devices: set[str]) -> list[str]:
    rows = {name: REGISTRY.find(name) for name in names}
    return [name for name, row in rows.items() if row.runs_on(devices) and row.availability()]


def _build(
    part: Part,
    config: OptimConfig,
    everything: list[NamedParameter],
    warmup_steps: int,
    trainer: rules.TrainerFacts | None,
) -> ResolvedOptimizer:
    spec, parameters = config.spec, part.parameters
    devices = device_types(parameters)
    nearest = () if config.optim_fallback else _runnable(spec.fallbacks, devices)
    problems = list(spec.availability().reasons)
    if problems:
        if not spec.runs_on(devices):
            problems.append(f"and it is not for parameters on {', '.join(sorted(devices))}")
        raise availability.missing(config.optim, problems, nearest)
    options, policy, groups = grouped(part, config, everything)
    lr, weight_decay = policy.lr, policy.weight_decay
    rules.check_run(rules.Run(rules.Request(spec, config, options), parameters, groups, trainer))

    # Imported late: importing an accelerator's package may initialize the device.
    optimizer_class = spec.load(nearest)
    names = {parameter.parameter: parameter.name for parameter in parameters}
    optimizer = optimizer_class(groups, **constructor_arguments(spec, options, lr, weight_decay, warmup_steps))
    keep_kernel(optimizer)
    say_if_not_finite(optimizer)
    state_format = optimizer_class.format() if issubclass(optimizer_class, OwnOptimizer) else spec.format
    mark(optimizer, REGISTRY.known_as(config.optim.removesuffix(SUFFIX)), state_format, names)
    resuming = Resuming(optimizer, spec, options, config.overrides)
    if getattr(optimizer, SCALES, False):
        # Otherwise a fused kernel unscales the gradients itself, and hooks and clipping would see them scaled.
        setattr(optimizer, SCALES, False)
    not_projected = left_out(parameters, config.optim_target_modules) if spec.projects else {}
    size = state_bytes(spec, options, groups)
    return ResolvedOptimizer(
        name=config.optim,
        optimizer=optimizer,
        spec=spec,
        options=options,
        lr=lr,
        weight_decay=weight_decay,
        state_bytes=size,
        not_projected=not_projected,
        resuming=resuming,
        parameters=parameters,
        policy=policy,
        request=part,
    )


def constructor_arguments(
    spec: OptimizerSpec, options: Options, lr: float, weight_decay: float, warmup_steps: int = 0
) -> dict[str, Any]:
    """Returns what the class of a row is called with, besides param groups."""
    arguments = {"lr": lr, **options.select("group", "constructor"), **spec.fixed}
    if spec.projects:
        # It is set per group; groups added later (by finetuning callbacks) are not projected.
        del arguments["rank"]
    if spec.decays:
        arguments["weight_decay"] = weight_decay
    if spec.warmup == "optimizer":
        arguments["warmup_steps"] = warmup_steps
    return arguments


def settle(config: OptimConfig) -> tuple[Options, GroupPolicy]:
    """Returns the options of a request and how it divides parameters, defaults filled in."""
    spec = config.spec
    options = parse(spec.options, config.optim_args, config.optim)
    lr = options.default_lr(spec.default_lr) if config.lr is None else config.lr
    assert lr is not None, "the config rules see to it"
    policy = GroupPolicy(
        lr,
        spec.default_weight_decay if config.weight_decay is None else config.weight_decay,
        config.param_groups or {},
        config.layer_decay,
        config.layer_pattern,
        config.optim_target_modules,
    )
    return options, policy


def grouped(
    part: Part, config: OptimConfig, everything: list[NamedParameter]
) -> tuple[Options, GroupPolicy, list[dict[str, Any]]]:
    """Returns the options of a request for a part, how its parameters are divided, and their groups."""
    options, policy = settle(config)
    policy = dataclasses.replace(policy, among=everything, roles=part.roles, hidden=part.hidden)
    return options, policy, make_groups(part.parameters, config.spec, options, policy)


@takes_arguments(OptimizerArguments)
def build_optimizer(target: Target, optim: str = "adamw_torch", **arguments: Unpack[OptimizerArguments]) -> Optimizer:
    """Builds an optimizer by name, for plain PyTorch, Fabric and manual optimization.

    It makes no schedule: ``warmup_steps``, in steps, is for optimizers that warm up themselves and refused for others,
    which are warmed up by :func:`build_schedule`. ``override_on_resume`` takes effect when a state dict is loaded.

    Args:
        target: A module, its parameters or (name, parameter) pairs. From a module, biases, norms and embeddings are
            recognized; from bare parameters only the number of dimensions is known.
        optim: Identifier, alias or dotted path such as ``"torch.optim.NAdam"``.
        **arguments: Those of :class:`OptimArguments`, without the schedule's.

    Returns:
        An ordinary ``torch.optim.Optimizer``. If the name ends in ``_layerwise``, :class:`Layerwise` is attached to it:
        ``Layerwise.of(optimizer)``.

    Raises:
        UnknownOptimizer: If there is no such optimizer.
        MissingDependency: If its package is not installed, too old or known to be wrong.
        InvalidOption: If an option is unknown, of the wrong type or out of range.
        InvalidParamGroups: If the parameters cannot be grouped as asked.
        IncompatibleTrainer: If the model's parameters cannot be stepped by it.

    Example:
        >>> import torch
        >>> from lightning_optim import build_optimizer
        >>> optimizer = build_optimizer(torch.nn.Linear(4, 2), "adamw_torch", lr=1e-3, optim_args="eps=1e-6")
        >>> [group["name"] for group in optimizer.param_groups]
        ['decay', 'no_decay']
    """
    taken = inspect.signature(build_optimizer).parameters
    refuse_unknown("build_optimizer", arguments, taken, optim)
    warmup_steps = arguments.get("warmup_steps", 0)
    if warmup_steps and REGISTRY.find(optim).warmup != "optimizer":
        raise IncompatibleTrainer(
            f"warmup_steps={warmup_steps} together with optim={optim!r}: build_optimizer makes no schedule. Leave it "
            f"out and call build_schedule(optimizer, 'constant_with_warmup', warmup_steps={warmup_steps}).",
            code="LO414",
        )
    config = OptimConfig(optim=optim, **arguments)
    builder = _BUILDER.get()
    if builder is not None:
        return builder(target, config)
    resolved = resolve(target, config)
    substitution = resolved.substitution(optim)
    if substitution:
        warnings.warn(substitution, stacklevel=2)
    for watch in WATCHERS:
        watch(resolved.optimizer, optim)
    return resolved.optimizer
