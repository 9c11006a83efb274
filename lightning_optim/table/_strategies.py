"""Which strategies train an optimizer, and why the others refuse it: what the rules say before the first batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_optim.table._spec import OptimizerSpec

#: Why strategies that need gradients after backward refuse what is stepped during it.
AFTER_BACKWARD = "it steps during backward, and the strategy works on gradients after it, when they are freed"
#: Why several processes refuse a step that calls the closure, or differentiates gradients.
CLOSURE_OF_ONE_PROCESS = (
    "its step calls the closure, whose loss is another in every process, and they would drift apart"
)
GRAPH_OF_ONE_PROCESS = "its step differentiates the gradients, and what averages them leaves no graph to do so"
#: Why one process refuses a step that sends.
NEEDS_PROCESS_GROUP = "exchanges tensors between processes in its step, and torch.distributed is not initialized"
#: Types of device on which Lightning's strategies do not run, and the strategies for several of them.
OWN_STRATEGIES: Mapping[str, str] = {"xla": "xla_syncfree", "npu": "npu_ddp"}


@dataclass(frozen=True)
class Strategy:
    """A column of the table of strategies.

    Attributes:
        name: What it is called there.
        several: Whether several processes train together.
        layerwise: Whether it steps every optimizer during backward.
        shards: Whether it gives each process a part of a parameter.
    """

    name: str
    several: bool = True
    layerwise: bool = False
    shards: bool = False


#: By what Python calls them.
STRATEGIES: Mapping[str, Strategy] = {
    "single_device": Strategy("one device", several=False),
    "ddp": Strategy("DDP"),
    "layerwise_ddp": Strategy("layerwise_ddp", layerwise=True),
    "fsdp2": Strategy("FSDP2", shards=True),
    "layerwise_fsdp2": Strategy("layerwise_fsdp2", layerwise=True, shards=True),
    "tensor_parallel": Strategy("tensor parallel", shards=True),
}


@dataclass(frozen=True)
class Support:
    """Whether a strategy trains an optimizer.

    Attributes:
        trains: If so.
        why: Why it is refused; for one that trains, a condition, or empty.
    """

    trains: bool
    why: str = ""


def strategies(spec: OptimizerSpec) -> Mapping[str, Support]:
    """Returns what each of :data:`STRATEGIES` does with an optimizer.

    One that steps during backward steps the ``_layerwise`` form of a plain one, the others what ``spec`` is.
    """
    return {key: _support(spec, strategy) for key, strategy in STRATEGIES.items()}


def _support(spec: OptimizerSpec, strategy: Strategy) -> Support:
    refusals = (
        (spec.coupled, strategy.layerwise),
        (AFTER_BACKWARD, spec.layerwise and strategy.several and not strategy.layerwise),
        (spec.unsharded, strategy.shards),
        (CLOSURE_OF_ONE_PROCESS, spec.needs_closure and strategy.several),
        (GRAPH_OF_ONE_PROCESS, spec.needs_graph and strategy.several),
        (NEEDS_PROCESS_GROUP, spec.needs_process_group and not strategy.several),
    )
    refusal = next((why for why, holds in refusals if why and holds), None)
    if refusal is not None:
        return Support(False, refusal)
    only = "" if spec.devices is None or "cpu" in spec.devices else ", ".join(sorted(spec.devices))
    if strategy.several and only in OWN_STRATEGIES:
        return Support(False, f"it is for {only}, where several devices take strategy={OWN_STRATEGIES[only]!r}")
    return Support(True, f"on {only}" if only else "")
