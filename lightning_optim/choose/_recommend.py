"""Which optimizer to take: those that evidence speaks for and that fit, ranked, each with the reason."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from typing_extensions import Unpack

from lightning_optim.build import OptimConfig
from lightning_optim.choose._estimate import REFUSALS, SHARDS, Estimator, Setting, one_of
from lightning_optim.choose._evidence import EVIDENCE, LAYERWISE, Evidence, Room, Task
from lightning_optim.choose._memory_estimate import MemoryEstimate
from lightning_optim.choose._model import Model
from lightning_optim.choose._rankings import CLAIMS
from lightning_optim.errors import IncompatibleTrainer, InvalidOption, listing
from lightning_optim.table import REGISTRY, SUFFIX

Preference = Literal["memory", "speed", "quality"]
_GIB = 2**30
_PLACES = {claim.name.partition(",")[0]: claim.places for claim in CLAIMS}


@dataclass(frozen=True)
class Recommendation:
    """An identifier that fits, and what speaks for it.

    Attributes:
        optim: The identifier.
        points: The conditions that the claims for it make, and that are met.
        evidence: The claims.
        inherited: Whether they are about the plain form of a ``_layerwise`` identifier.
        estimate: The memory that it takes.
        missing: Why it cannot be built on this machine, each with the remedy; empty if it can.
        python: The line for ``trainer``, to paste.
        command_line: The words for a script with OptimCLI, to paste.
    """

    optim: str
    points: int
    evidence: tuple[Evidence, ...]
    inherited: bool
    estimate: MemoryEstimate
    missing: tuple[str, ...]
    python: str
    command_line: str

    @property
    def conditions(self) -> dict[str, int]:
        """How many of the claims are about the memory, the task and the size that were given."""
        named = [name for claim in self.evidence for name in claim.conditions]
        return {name: named.count(name) for name in ("memory", "task", "size") if name in named}

    @property
    def reason(self) -> str:
        """The claims in one sentence."""
        said = "; ".join(f"{claim.says} ({claim.source.name})" for claim in self.evidence)
        return f"{said} ({LAYERWISE.name})" if self.inherited else said

    def as_dict(self) -> dict[str, Any]:
        """Returns the attributes and the reason as plain values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        evidence = [
            {"says": claim.says, "source": claim.source.name, "link": claim.source.link} for claim in self.evidence
        ]
        return values | {
            "reason": self.reason,
            "conditions": self.conditions,
            "evidence": evidence,
            "estimate": self.estimate.as_dict(),
        }


def recommend(
    model: Model,
    *,
    memory: int | None = None,
    task: Task | None = None,
    prefer: Preference = "quality",
    **setting: Unpack[Setting],
) -> list[Recommendation]:
    """Ranks the identifiers that fit into the device's memory and that published evidence speaks for.

    Args:
        model: As of :func:`estimate_memory`.
        memory: Bytes of one device; ``None`` for no limit.
        task: What is trained: ``"pretrain"`` or ``"finetune"`` (language models), ``"vision"`` or ``"sparse"``.
        prefer: ``"quality"`` ranks by evidence, ``"memory"`` by the estimate, ``"speed"`` by the published order.
        **setting: Arguments of :func:`estimate_memory` between ``batch`` and ``shard``.

    Raises:
        InvalidOption: If nothing fits, or an argument is wrong.
        IncompatibleTrainer: If nothing can be trained so.

    Example:
        >>> from lightning_optim import recommend
        >>> recommend("llama-7b", memory=20 * 2**30, precision="bf16-true", task="pretrain")[0].optim
        'galore_adamw_8bit_layerwise'
    """
    return rank(Estimator(model, **setting), setting, memory=memory, task=task, prefer=prefer)


def rank(
    estimator: Estimator,
    setting: Setting,
    *,
    memory: int | None = None,
    task: Task | None = None,
    prefer: Preference = "quality",
) -> list[Recommendation]:
    """Ranks as :func:`recommend` does, with an estimator of that setting.

    Raises:
        InvalidOption: If nothing fits, or an argument is wrong.
        IncompatibleTrainer: If nothing can be trained so.
    """
    one_of("task", task, (None, *get_args(Task)))
    one_of("prefer", prefer, get_args(Preference))
    with estimator.opened():
        estimates, parameters = _estimates(estimator), estimator.count_parameters()
    if not estimates:
        raise IncompatibleTrainer(
            "no identifier that the evidence names can be trained so: see estimate_memory", code="LO906"
        )
    fitting = {name: found for name, found in estimates.items() if memory is None or found.resident <= memory}
    if not fitting:
        raise InvalidOption(_nothing_fits(memory, estimates, setting), code="LO906")
    room = None if memory is None else _room(memory, estimates)
    found = []
    for name, estimate in fitting.items():
        plain = name.removesuffix(SUFFIX)
        claims = [(claim, claim.points(task, parameters, room)) for claim in EVIDENCE if name in claim.optims]
        inherited = not any(points is not None for _, points in claims)
        if inherited and name != plain:
            # The suffix is for what does not fit without it, or for the least memory.
            if plain in fitting and prefer != "memory":
                continue
            claims = [(claim, claim.points(task, parameters, room)) for claim in EVIDENCE if plain in claim.optims]
        met = {claim: points for claim, points in claims if points is not None}
        if met:
            found.append(_recommendation(name, met, inherited, estimate, setting))
    if not found:
        raise InvalidOption(
            f"no claim speaks for what fits ({listing(sorted(fitting))}): `lightning-optim memory --fits` shows all",
            code="LO906",
        )
    return sorted(found, key=lambda one: _order(one, prefer))


def _order(one: Recommendation, prefer: Preference) -> tuple[Any, ...]:
    """Returns the sort key: what is preferred first, then how much speaks for it, then the estimate."""
    about_task = one.conditions.get("task", 0)
    said = (-one.points, one.inherited, -about_task, -len(one.evidence))
    if prefer == "memory":
        return (one.estimate.resident, *said, one.optim)
    if prefer == "speed":
        return (_place("speed", one.optim), *said, one.estimate.resident, one.optim)
    return (*said, _place("convergence", one.optim), one.estimate.resident, one.optim)


def _place(ranking: str, name: str) -> int:
    places = _PLACES[ranking]
    return places.get(name, places.get(name.removesuffix(SUFFIX), len(places) + 1))


def _estimates(estimator: Estimator) -> dict[str, MemoryEstimate]:
    found = {}
    for name in _candidates():
        try:
            found[name] = estimator.estimate(OptimConfig(name))
        except REFUSALS:
            continue
    return found


def _candidates() -> Iterator[str]:
    named = dict.fromkeys(name for claim in EVIDENCE for name in claim.optims)
    for name in named:
        yield name
        spec = REGISTRY.find(name)
        suffixed = name + SUFFIX
        if not (spec.layerwise or spec.coupled) and suffixed not in named:
            yield suffixed


def _room(memory: int, estimates: dict[str, MemoryEstimate]) -> Room | None:
    adamw = estimates.get("adamw_torch")
    if adamw is None:
        return None
    if memory < adamw.parameters + adamw.gradients:
        return "hardly any"
    if memory < adamw.resident:
        return "little"
    return "plenty" if memory >= 2 * adamw.resident else None


def _nothing_fits(memory: int | None, estimates: dict[str, MemoryEstimate], setting: Setting) -> str:
    least = min(estimates.values(), key=lambda estimate: estimate.resident)
    remedies = ["fewer sequences", "a precision of 16 bits", "a smaller model"]
    sharded = least.strategy in SHARDS
    shard = "more devices" if sharded else "shard the parameters over devices (strategy='fsdp2', devices=8)"
    if not setting.get("activation_checkpointing"):
        remedies.insert(0, "activation checkpointing")
    return (
        f"nothing fits into {(memory or 0) / _GIB:.2f} GiB: {least.optim!r} needs the least, "
        f"{least.resident / _GIB:.2f} GiB. Take {', '.join(remedies)}, or {shard}"
    )


def _recommendation(
    name: str, met: dict[Evidence, int], inherited: bool, estimate: MemoryEstimate, setting: Setting
) -> Recommendation:
    flags: dict[str, Any] = {"accelerator": estimate.accelerator, "devices": estimate.devices}
    # One device steps without a strategy of its own, and with the suffix in the default one, too.
    if estimate.devices > 1:
        flags["strategy"] = estimate.strategy
    flags["precision"] = estimate.precision
    flags |= {
        key: setting[key]
        for key in ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
        if setting.get(key) is not None
    }
    written = {key: repr(value) for key, value in flags.items()}
    shown = ", ".join(f"{key}={value}" for key, value in written.items())
    words = ["--optim", name, *(word for key, value in flags.items() for word in (f"--trainer.{key}", str(value)))]
    return Recommendation(
        optim=name,
        points=sum(met.values()),
        evidence=tuple(met),
        inherited=inherited and name.endswith(SUFFIX),
        estimate=estimate,
        missing=tuple(REGISTRY.find(name).availability().reasons),
        python=f'trainer = L.Trainer(callbacks=[OptimCallback("{name}")], {shown})',
        command_line=shlex.join(["python", "train.py", "fit", *words]),
    )
