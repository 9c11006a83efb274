"""The memory of a training step: parameters, gradients, state, activations, temporaries, and when most is alive."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, TypedDict, get_args

from typing_extensions import Unpack

from lightning_optim._compat.fake import tensors_in
from lightning_optim._compat.shards import absent_processes, has_processes
from lightning_optim.build import (
    OptimConfig,
    OptimizerArguments,
    Part,
    divide,
    grouped,
    rules,
    settle,
    state_bytes,
    takes_arguments,
)
from lightning_optim.choose._fake_run import FakeTraining, Loss, quiet
from lightning_optim.choose._fakes import find_precision
from lightning_optim.choose._memory_estimate import MemoryEstimate
from lightning_optim.choose._model import Model, as_batch, as_module, name_of
from lightning_optim.choose._replay import Replay, Stepping, replay
from lightning_optim.choose._shapes import Transformer
from lightning_optim.choose._sharded import ShardedTraining, run_sharded
from lightning_optim.choose._temporaries import StepTemporaries
from lightning_optim.choose._tracker import Moment
from lightning_optim.errors import IncompatibleTrainer, InvalidOption, InvalidParamGroups, MissingDependency, listing
from lightning_optim.groups import NamedParameter, every_parameter, named_parameters
from lightning_optim.layerwise import Clipping
from lightning_optim.table import REGISTRY, SUFFIX, OptimizerSpec, layerwise_row, refuse_unknown

Strategy = Literal["auto", "ddp", "fsdp2", "layerwise", "layerwise_ddp", "layerwise_fsdp2"]
Accelerator = Literal["cuda", "cpu"]
#: Those that shard parameters.
SHARDS = ("fsdp2", "layerwise_fsdp2")
#: What cannot be trained so, and is left out of a comparison.
REFUSALS = (IncompatibleTrainer, InvalidOption, InvalidParamGroups, MissingDependency)


class Setting(TypedDict, total=False):
    """How the step is taken; :func:`estimate_memory` explains it."""

    batch: Any
    loss: Loss | None
    precision: str | int
    accelerator: Accelerator
    strategy: Strategy
    devices: int
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    gradient_clip_algorithm: Literal["norm", "value"]
    activation_checkpointing: bool
    shard: str | None


class Estimator:
    """Estimates any optimizer for one module, batch and way of stepping; what they share is run once."""

    def __init__(
        self,
        model: Model,
        *,
        batch: Any = None,
        loss: Loss | None = None,
        precision: str | int = "32-true",
        accelerator: Accelerator = "cuda",
        strategy: Strategy = "auto",
        devices: int = 1,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        activation_checkpointing: bool = False,
        shard: str | None = None,
    ) -> None:
        one_of("accelerator", accelerator, get_args(Accelerator))
        one_of("strategy", strategy, get_args(Strategy))
        one_of("gradient_clip_algorithm", gradient_clip_algorithm, ("norm", "value"))
        for name, number in (("devices", devices), ("accumulate_grad_batches", accumulate_grad_batches)):
            if not isinstance(number, int) or number < 1:
                raise InvalidOption(f"{name}={number!r} is no whole number of at least 1", code="LO204")
        if strategy == "layerwise" and devices > 1:
            raise InvalidOption(
                f"strategy='layerwise' is for one device, not {devices}: use 'layerwise_ddp'", code="LO901"
            )
        self._sharded = strategy in SHARDS
        if self._sharded and devices == 1:
            raise InvalidOption(f"strategy={strategy!r} shards over devices, and devices=1: say how many", code="LO901")
        self._shard = shard
        self._strategy, self._devices, self._accumulate = strategy, devices, accumulate_grad_batches
        self._clip, self._clip_algorithm = gradient_clip_val, gradient_clip_algorithm
        self._name = name_of(model)
        self._has_batch = batch is not None
        module = as_module(model, activation_checkpointing)
        if shard is not None and (not self._sharded or isinstance(module, Transformer)):
            raise InvalidOption(
                f"shard={shard!r} is for a LightningModule and strategy='fsdp2' or 'layerwise_fsdp2': leave it out",
                code="LO901",
            )
        found = find_precision(precision)
        self._given = module, as_batch(batch, module), loss, found, accelerator
        # Sharded, it is there between opening and closing.
        self._made: FakeTraining | None = None if self._sharded else FakeTraining(*self._given)
        self._forget()

    def estimate(self, config: OptimConfig) -> MemoryEstimate:
        """Returns the estimate of a request.

        Raises:
            IncompatibleTrainer, InvalidOption, InvalidParamGroups, MissingDependency: For what cannot be trained so.
        """
        with self.opened():
            return self._estimated(config)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside, estimates share what cannot outlive them: shards live in a process group of their own.

        Raises:
            IncompatibleTrainer: If parameters are to be sharded, and there is a process group or the module does not
                say how.
        """
        if self._made is not None:
            yield
            return
        if has_processes():
            raise IncompatibleTrainer(
                f"strategy={self._strategy!r} is estimated in a process group of its own, and this process has one "
                "already. Estimate before it is made, or after torch.distributed.destroy_process_group()",
                code="LO903",
            )
        with absent_processes(self._devices) as mesh:
            try:
                with quiet():
                    self._made = ShardedTraining(mesh, self._shard, *self._given)
                yield
            finally:
                self._made = None
                self._forget()

    def _forget(self) -> None:
        self._replays: dict[Stepping, Replay] = {}
        self._temporaries: dict[str, StepTemporaries] = {}
        self.__dict__.pop("_parameters", None)

    def _estimated(self, config: OptimConfig) -> MemoryEstimate:
        accelerator = self._training.accelerator
        parts = [
            self._chosen(part) for part in divide(self._parameters, config, every_parameter(self._training.module))
        ]
        built, spec = parts[0].config, parts[0].config.spec
        strategy = self._strategy_of(spec, built.optim)
        replayed = self._replayed(self._stepping(parts, strategy))
        temporaries = [self._temporaries_of(part) for part in parts]
        states = [self._state_of(part, own) for part, own in zip(parts, temporaries, strict=True)]
        state = sum(states)
        taken: list[tuple[Moment, int | None]] = [(moment, 0) for moment in replayed.passes]
        # One part is stepped after the other.
        taken += [(moment, _most(own.of(parameters) for own in temporaries)) for parameters, moment in replayed.steps]
        buckets = replayed.gradients if strategy == "ddp" else 0
        moment, extra = max(taken, key=lambda pair: pair[0].total + (pair[1] or 0))
        at_peak = moment.shares | {"state": state, "temporaries": extra or 0}
        at_peak["communication"] += buckets
        known = [most for _, most in taken if most is not None]
        return MemoryEstimate(
            optim=config.optim,
            built=built.optim,
            model=self._name,
            precision=self._training.precision.name,
            accelerator=accelerator,
            strategy=strategy,
            devices=self._devices,
            parameters=moment.live["parameters"],
            buffers=moment.live["buffers"],
            state=state,
            gradients=replayed.gradients,
            communication=replayed.communication + buckets,
            activations=replayed.activations + moment.live["batch"] if self._has_batch else None,
            temporaries=max(known) if len(known) == len(taken) else None,
            pageable=sum(
                own for own, part in zip(states, parts, strict=True) if accelerator in (part.config.spec.paged_on or ())
            ),
            peak=sum(at_peak.values()),
            moment=moment.phase,
            at_peak=MappingProxyType(at_peak),
        )

    def compare(self, names: Iterable[str] | None = None) -> list[MemoryEstimate]:
        """Returns the estimates of many identifiers, those with the lowest peak first."""
        found = []
        # Whoever is quiet already need not change the level of loggers again, which forgets what they cached.
        with quiet(), self.opened():
            for name in _all_names(self._training.accelerator) if names is None else names:
                try:
                    found.append(self.estimate(OptimConfig(name)))
                except REFUSALS:
                    if names is not None:
                        raise
        return sorted(found, key=lambda estimate: (estimate.peak, estimate.optim))

    def count_parameters(self) -> int:
        """Returns how many elements the parameters have."""
        with self.opened():
            return sum(parameter.numel() for parameter in self._training.parameters)

    @property
    def _training(self) -> FakeTraining:
        assert self._made is not None, "not opened"
        return self._made

    @cached_property
    def _parameters(self) -> list[NamedParameter]:
        return named_parameters(self._training.module)

    def _chosen(self, part: Part) -> Part:
        """Returns a part of a request with the identifier that is built on the accelerator."""
        config, accelerator = part.config, {self._training.accelerator}
        choices = config.spec.choices or (config.optim,)
        chosen = next((name for name in choices if REGISTRY.find(name).runs_on(accelerator)), config.optim)
        spec = REGISTRY.find(chosen)
        if not spec.runs_on(accelerator):
            raise IncompatibleTrainer(
                f"optim={config.optim!r} runs on {listing(sorted(spec.devices or ()))}, not on {listing(accelerator)}",
                code="LO501",
            )
        if refusal := rules.sharded_parameters(config.optim, spec, part.parameters):
            raise IncompatibleTrainer(refusal, code="LO509")
        return dataclasses.replace(part, config=config.replace(optim=chosen))

    def _state_of(self, part: Part, temporaries: StepTemporaries) -> int:
        if self._sharded and part.config.spec.projects:
            # Which side is projected the whole matrix decides, and what is shared the processes have each.
            return temporaries.state()
        options, _, groups = grouped(part, part.config, self._parameters)
        # Of a sharded parameter the shard.
        groups = [{**group, "params": tensors_in(group["params"])} for group in groups]
        state = state_bytes(part.config.spec, options, groups)
        return temporaries.state() if state is None else state

    def _strategy_of(self, spec: OptimizerSpec, name: str) -> str:
        several, given = self._devices > 1, self._strategy
        fitting = ("layerwise_ddp" if several else "layerwise") if spec.layerwise else ("ddp" if several else "auto")
        if self._sharded:
            fitting = "layerwise_fsdp2" if spec.layerwise else "fsdp2"
        if given == "auto" or (given == "layerwise" and fitting in ("auto", "layerwise")):
            return fitting
        if given in ("ddp", "layerwise_ddp", *SHARDS) and given != fitting and several:
            raise IncompatibleTrainer(
                f"strategy={given!r} cannot step optim={name!r}: use strategy={fitting!r}", code="LO905"
            )
        return fitting if not several else given

    def _stepping(self, parts: Sequence[Part], strategy: str) -> Stepping:
        main = parts[0].config
        if not main.spec.layerwise:
            return Stepping(self._accumulate)
        layerwise = settle(main)[0].select("layerwise")
        # The other ways clip what arrives.
        by_norm = [part.clip for part in parts if part.clip is not None and part.clip.kind == "norm"]
        if self._clip and self._clip_algorithm == "norm" and layerwise["norm_clipping"] in (None, "exact"):
            by_norm.append(Clipping("norm", self._clip))
        clipping = by_norm[-1] if by_norm else None
        replicas = self._devices if strategy == "layerwise_ddp" else 1
        return Stepping(self._accumulate, True, layerwise["bucket_mb"], clipping, replicas)

    def _replayed(self, stepping: Stepping) -> Replay:
        if stepping not in self._replays:
            training = self._training
            run = run_sharded if isinstance(training, ShardedTraining) else replay
            self._replays[stepping] = run(training, stepping)
        return self._replays[stepping]

    def _temporaries_of(self, part: Part) -> StepTemporaries:
        # Stepped in backward or after it, an optimizer takes the same for the same parameters.
        config = part.config
        own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "optim"}
        key = f"{config.optim.removesuffix(SUFFIX)} {own} {[id(p.parameter) for p in part.parameters]}"
        if key not in self._temporaries:
            self._temporaries[key] = StepTemporaries(self._training, part, self._parameters)
        return self._temporaries[key]


@takes_arguments(OptimizerArguments)
def estimate_memory(
    model: Model,
    optim: str = "adamw_torch",
    *,
    batch: Any = None,
    loss: Loss | None = None,
    precision: str | int = "32-true",
    accelerator: Accelerator = "cuda",
    strategy: Strategy = "auto",
    devices: int = 1,
    accumulate_grad_batches: int = 1,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: Literal["norm", "value"] = "norm",
    activation_checkpointing: bool = False,
    shard: str | None = None,
    **arguments: Unpack[OptimizerArguments],
) -> MemoryEstimate:
    """Estimates the memory of training a module with an optimizer, without allocating any of it.

    Forward and backward run once on tensors that have shapes and no memory, and so does a step. The module is left
    alone. Not counted: what kernels take inside of themselves, what the allocator rounds up and keeps, CUDA's context.

    Args:
        model: Any module, on any device, the meta device too; a :class:`Shape`; or the name of one, ``"llama-7b"``.
        optim: Identifier, alias or dotted path.
        batch: What ``training_step`` gets, or ``forward`` of a module that is no LightningModule (a tuple as its
            arguments, a mapping as keywords); tensors of the right shapes, for instance on the meta device. For a shape
            ``(sequences, tokens)``. ``None`` leaves activations out.
        loss: Computes the loss from the module and the batch, where neither of the two does.
        precision: The Trainer's.
        accelerator: ``"cuda"`` or ``"cpu"``.
        strategy: The Trainer's; ``"auto"`` takes the one that the identifier needs for ``devices``. ``"fsdp2"``
            (Lightning's ``ModelParallelStrategy``, too) and ``"layerwise_fsdp2"`` shard as ``configure_model`` says,
            numbered blocks where there is none, a shape block by block.
        devices: Number of devices.
        accumulate_grad_batches: The Trainer's.
        gradient_clip_val: The Trainer's.
        gradient_clip_algorithm: The Trainer's.
        activation_checkpointing: Of a shape, whether each block runs again in backward.
        shard: That of :class:`~lightning_optim.FSDP2Strategy`.
        **arguments: Those of :class:`OptimArguments`, without the schedule's.

    Raises:
        IncompatibleTrainer, InvalidOption, InvalidParamGroups, MissingDependency, UnknownOptimizer: For what cannot be
            trained so; the text says what to type instead.

    Example:
        >>> from lightning_optim import estimate_memory
        >>> estimate = estimate_memory("llama-7b", "adamw_8bit_layerwise", precision="bf16-true")
        >>> f"{estimate.state / 2**30:.1f} GiB of state, at most {estimate.gradients / 2**20:.0f} MiB of gradients"
        '13.5 GiB of state, at most 250 MiB of gradients'
    """
    refuse_unknown("estimate_memory", arguments, (*OptimizerArguments.__annotations__,), optim)
    estimator = Estimator(
        model,
        batch=batch,
        loss=loss,
        precision=precision,
        accelerator=accelerator,
        strategy=strategy,
        devices=devices,
        accumulate_grad_batches=accumulate_grad_batches,
        gradient_clip_val=gradient_clip_val,
        gradient_clip_algorithm=gradient_clip_algorithm,
        activation_checkpointing=activation_checkpointing,
        shard=shard,
    )
    return estimator.estimate(OptimConfig(optim=optim, **arguments))


def compare_memory(
    model: Model, optims: Iterable[str] | None = None, **setting: Unpack[Setting]
) -> list[MemoryEstimate]:
    """Estimates many identifiers with their default options at the price of one; the lowest peak comes first.

    Args:
        model: As of :func:`estimate_memory`.
        optims: The identifiers; ``None`` takes all that run on the accelerator, plain and ``_layerwise``, and leaves
            out those that cannot train the module so.
        **setting: Arguments of :func:`estimate_memory` between ``batch`` and ``shard``.

    Raises:
        IncompatibleTrainer, InvalidOption, InvalidParamGroups, MissingDependency, UnknownOptimizer: For what cannot be
            trained so.
    """
    return Estimator(model, **setting).compare(optims)


def _all_names(accelerator: str) -> Iterator[str]:
    for name, spec in REGISTRY.plain.items():
        if name != spec.name or spec.choices or not spec.runs_on({accelerator}):
            continue
        yield name
        if not (spec.coupled or spec.layerwise):
            yield layerwise_row(spec).name


def _most(values: Iterable[int | None]) -> int | None:
    """Returns the largest value; ``None`` if one is not known."""
    found = list(values)
    known = [value for value in found if value is not None]
    return max(known) if len(known) == len(found) else None


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raises :class:`InvalidOption` unless an argument has one of the allowed values."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise InvalidOption(f"{name}={value!r} is not one of {listing(allowed)}", code="LO207")
