"""Rules for optimizers that need more than gradients: the closure, the graph, one group, or matrices only."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.distributed as dist

from lightning_optim.build.rules._run import Run
from lightning_optim.table import CLOSURE_OF_ONE_PROCESS, GRAPH_OF_ONE_PROCESS, NEEDS_PROCESS_GROUP


def _graph_is_not_scaled(run: Run) -> str | None:
    if not (run.spec.needs_graph and run.trainer and run.trainer.scales):
        return None
    return (
        f"optim={run.name!r} under a GradScaler: its step differentiates the gradients, and those of a scaled loss "
        "would be unscaled once, the second derivatives never. Use Trainer(precision='bf16-mixed') or '32-true'."
    )


def _graph_is_of_one_process(run: Run) -> str | None:
    if not (run.spec.needs_graph and run.trainer and run.trainer.processes > 1):
        return None
    return (
        f"optim={run.name!r} with {run.trainer.processes} processes: {GRAPH_OF_ONE_PROCESS}. Use "
        "Trainer(devices=1, num_nodes=1)."
    )


def _backward_makes_a_graph(run: Run) -> str | None:
    if not (run.spec.needs_graph and run.trainer and not run.trainer.makes_graphs):
        return None
    return (
        f"optim={run.name!r} needs backward(create_graph=True), which the module's own backward() does not take. Write "
        "`def backward(self, loss, *args, **kwargs): loss.backward(*args, **kwargs)`."
    )


def _closure_is_not_scaled(run: Run) -> str | None:
    if not (run.spec.needs_closure and run.trainer and run.trainer.scales):
        return None
    return (
        f"optim={run.name!r} under a GradScaler: its step calls the closure, and a GradScaler's step takes none. Use "
        "Trainer(precision='bf16-mixed') or '32-true'."
    )


def _closure_is_one_batch(run: Run) -> str | None:
    if not (run.spec.needs_closure and run.trainer and run.trainer.accumulates > 1):
        return None
    return (
        f"optim={run.name!r} with accumulate_grad_batches={run.trainer.accumulates}: its step calls the closure, which "
        "computes the last batch only, once more. Leave accumulate_grad_batches out and take larger batches."
    )


def _closure_is_of_one_process(run: Run) -> str | None:
    if not (run.spec.needs_closure and run.trainer and run.trainer.processes > 1):
        return None
    return (
        f"optim={run.name!r} with {run.trainer.processes} processes: {CLOSURE_OF_ONE_PROCESS}. Use "
        "Trainer(devices=1, num_nodes=1)."
    )


def _needs_a_process_group(run: Run) -> str | None:
    if not run.spec.needs_process_group or (dist.is_available() and dist.is_initialized()):
        return None
    return (
        f"optim={run.name!r} {NEEDS_PROCESS_GROUP}. Use Trainer(strategy='ddp'), or an optimizer that leaves this to "
        "the strategy, such as optim='muon'."
    )


def _takes_one_group(run: Run) -> str | None:
    if not run.spec.one_group or len(run.groups) < 2:
        return None
    names = ", ".join(repr(group["name"]) for group in run.groups)
    return (
        f"optim={run.name!r} takes one param group, and there are {len(run.groups)}: {names}. Leave param_groups and "
        "layer_decay out."
    )


def _takes_only_matrices(run: Run) -> str | None:
    if not run.spec.only_matrices:
        return None
    stray = next((parameter for parameter in run.parameters if parameter.parameter.ndim != 2), None)
    if stray is None:
        return None
    return (
        f"optim={run.name!r} takes parameters of two dimensions only, and {stray.name!r} has "
        f"{stray.parameter.ndim}. Use optim='muon', which leaves the others to another optimizer, or name it for the "
        f"matrices alone: optim='adamw', param_groups={{'.*linear.weight': {{'optim': {run.name!r}}}}}."
    )


def _not_in_backward(run: Run) -> str | None:
    if not (run.spec.coupled and run.trainer and run.trainer.steps_in_backward):
        return None
    return (
        f"optim={run.name!r} under a strategy that steps during backward: {run.spec.coupled}. Use another strategy, "
        "such as 'auto' or 'ddp'."
    )


#: By code: see lightning_optim/refusals.
DEMAND_RULES: Mapping[str, Callable[[Run], str | None]] = {
    "LO516": _graph_is_not_scaled,
    "LO517": _graph_is_of_one_process,
    "LO518": _backward_makes_a_graph,
    "LO519": _closure_is_not_scaled,
    "LO520": _closure_is_one_batch,
    "LO521": _closure_is_of_one_process,
    "LO522": _needs_a_process_group,
    "LO523": _takes_one_group,
    "LO524": _takes_only_matrices,
    "LO525": _not_in_backward,
}
