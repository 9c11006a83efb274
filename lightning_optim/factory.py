"""The pipeline, top to bottom: identifier -> row -> package -> options -> groups -> rules -> optimizer -> layerwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from lightning_optim import rules
from lightning_optim.config import OptimConfig
from lightning_optim.errors import IncompatibleTrainer
from lightning_optim.layerwise.engine import Layerwise
from lightning_optim.memory import state_bytes
from lightning_optim.optimizers.base import MEMBERS, OwnOptimizer
from lightning_optim.options import Options, parse
from lightning_optim.param_groups import GroupPolicy, make_groups
from lightning_optim.parameters import Target, named_parameters
from lightning_optim.registry import REGISTRY
from lightning_optim.spec import OptimizerSpec
from lightning_optim.target_modules import TargetModules, left_out


@dataclass(frozen=True)
class ResolvedOptimizer:
    """An optimizer and how it came about.

    Attributes:
        optimizer: The optimizer, ready to step.
        spec: Its row.
        options: Its options, defaults filled in.
        lr: Learning rate.
        weight_decay: Weight decay of the parameters that decay.
        state_bytes: Bytes of its full state, or ``None`` if the row does not say.
        not_projected: Modules that ``optim_target_modules`` names in vain, with what they are.
    """

    optimizer: Optimizer
    spec: OptimizerSpec
    options: Options
    lr: float
    weight_decay: float
    state_bytes: int | None
    not_projected: Mapping[str, str]


def resolve(
    target: Target, config: OptimConfig, *, warmup_steps: int = 0, trainer: rules.TrainerFacts | None = None
) -> ResolvedOptimizer:
    """Builds the optimizer that ``config`` asks for.

    Args:
        target: A module, its parameters or (name, parameter) pairs.
        config: The request.
        warmup_steps: Warm-up in steps; only optimizers that warm up themselves use it.
        trainer: What to know of the Trainer, if there is one.

    Raises:
        UnknownOptimizer, MissingDependency, InvalidOption, InvalidParamGroups, IncompatibleTrainer: See there.
    """
    spec = REGISTRY[config.optim]
    optimizer_class = spec.load()
    options = parse(spec.options, config.optim_args, config.optim)
    lr = options.default_lr(spec.default_lr) if config.lr is None else config.lr
    assert lr is not None, "the config rules see to it"
    weight_decay = spec.default_weight_decay if config.weight_decay is None else config.weight_decay

    parameters = named_parameters(target)
    policy = GroupPolicy(
        lr,
        weight_decay,
        config.param_groups or {},
        config.layer_decay,
        config.layer_pattern,
        config.optim_target_modules,
    )
    groups = make_groups(parameters, spec, options, policy)
    rules.check_run(rules.Run(rules.Request(spec, config, options), parameters, groups, trainer))

    names = {parameter.parameter: parameter.name for parameter in parameters}
    if issubclass(optimizer_class, OwnOptimizer):
        groups = [{**group, MEMBERS: [names[parameter] for parameter in group["params"]]} for group in groups]
    arguments = {"lr": lr, **options.select("group", "constructor"), **spec.fixed}
    if spec.projects:
        # The groups say it; what is added to the optimizer later (finetuning callbacks) is not projected.
        del arguments["rank"]
    if spec.decays:
        arguments["weight_decay"] = weight_decay
    if spec.warmup == "optimizer":
        arguments["warmup_steps"] = warmup_steps
    optimizer = optimizer_class(groups, **arguments)
    if spec.layerwise:
        Layerwise(optimizer, options.select("layerwise")["bucket_mb"], names=names)
    not_projected = left_out(parameters, config.optim_target_modules) if spec.projects else {}
    size = state_bytes(spec, options, groups)
    return ResolvedOptimizer(optimizer, spec, options, lr, weight_decay, size, not_projected)


def build_optimizer(
    target: Target,
    optim: str = "adamw_torch",
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    optim_args: Mapping[str, Any] | str | None = None,
    optim_target_modules: TargetModules = None,
    param_groups: Mapping[str, Mapping[str, Any]] | None = None,
    layer_decay: float | None = None,
    layer_pattern: str | None = None,
    warmup_steps: int = 0,
) -> Optimizer:
    """Builds an optimizer by name, for plain PyTorch, Fabric and manual optimization.

    Args:
        target: A module, its parameters or (name, parameter) pairs. From a module, biases, norms and embeddings are
            recognized; from bare parameters only the number of dimensions is known.
        optim: Identifier, alias or dotted path such as ``"torch.optim.NAdam"``.
        lr: Learning rate; ``None`` takes the row's default.
        weight_decay: Weight decay of the parameters that decay; ``None`` takes the row's default.
        optim_args: The row's options, a mapping or ``"name=value,..."``.
        optim_target_modules: Modules whose weights are projected, for optimizers that project: ``"all-linear"``, a
            regular expression over names, or a list of parts of names; ``None`` means every ``nn.Linear``.
        param_groups: Hyperparameters by regular expression over parameter names; the first match wins.
        layer_decay: The learning rate is multiplied by this once per layer below the top.
        layer_pattern: Regular expression whose one group is a layer's number.
        warmup_steps: Warm-up in steps, for optimizers that warm up themselves (``schedule_free_adamw``,
            ``schedule_free_sgd``); refused for others, whose warm-up is :func:`build_schedule`'s.

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
    config = OptimConfig(
        optim=optim,
        lr=lr,
        weight_decay=weight_decay,
        optim_args=optim_args,
        optim_target_modules=optim_target_modules,
        param_groups=param_groups,
        layer_decay=layer_decay,
        layer_pattern=layer_pattern,
    )
    if warmup_steps and REGISTRY[optim].warmup != "optimizer":
        raise IncompatibleTrainer(
            f"warmup_steps={warmup_steps} beside optim={optim!r}: build_optimizer makes no schedule. Leave it out and "
            f"call build_schedule(optimizer, 'constant_with_warmup', warmup_steps={warmup_steps})."
        )
    return resolve(target, config, warmup_steps=warmup_steps).optimizer
