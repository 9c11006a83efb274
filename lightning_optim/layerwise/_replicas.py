"""Processes that train copies of one model: averaging gradients, agreeing on an order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch.distributed as dist
from torch import Tensor

from lightning_optim.errors import IncompatibleTrainer

Namer = Callable[[Tensor], str]


class Replicas:
    """The processes of a process group that hold the same parameters and different data.

    Args:
        process_group: The group; ``None`` means all processes.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self._group = process_group

    @property
    def size(self) -> int:
        """Number of processes."""
        return dist.get_world_size(self._group)

    def average(self, flat: Tensor) -> Callable[[], object]:
        """Starts averaging a tensor over the processes in place; returns the function that waits for it."""
        # Divided before the sum, as DistributedDataParallel does: the results are bit-identical.
        flat.mul_(1 / self.size)
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        assert work is not None
        wait: Callable[[], object] = work.wait
        return wait

    def exchange(self, order: Sequence[int]) -> list[list[int]]:
        """Returns the ``order`` of every process, by rank."""
        orders: list[list[int]] = [[] for _ in range(self.size)]
        dist.all_gather_object(orders, list(order), group=self._group)
        return orders


class AgreedOrder:
    """The order in which gradients arrive in rank 0, which all processes follow.

    Attributes:
        parameters: The parameters in that order; empty until the processes have agreed.
        arrivals: The parameters whose gradient has arrived in this process since, in order.
    """

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self.arrivals: dict[Tensor, None] = {}

    def covers(self, trainable: Iterable[Tensor]) -> bool:
        """Whether it is known for these parameters and no others."""
        return bool(self.parameters) and set(self.parameters) == set(trainable)

    def agree(self, replicas: Replicas, parameters: Sequence[Tensor], name: Namer, complete: bool) -> None:
        """Adopts rank 0's arrivals in all processes.

        Args:
            replicas: The processes.
            parameters: All parameters, in the same order in every process.
            name: Names a parameter in an error text.
            complete: Whether every trainable parameter must have arrived; otherwise missing ones come last.

        Raises:
            IncompatibleTrainer: In every process, if a parameter has not arrived in one of them.
        """
        number = {parameter: index for index, parameter in enumerate(parameters)}
        orders = replicas.exchange([number[parameter] for parameter in self.arrivals])
        self.arrivals.clear()
        needed = {number[parameter] for parameter in parameters if parameter.requires_grad}
        for rank, order in enumerate(orders if complete else ()):
            unused = [parameters[index] for index in sorted(needed - set(order))]
            refuse_unused(unused, f"in process {rank}", name)
        self.parameters = [parameters[index] for index in [*orders[0], *sorted(needed - set(orders[0]))]]


def refuse_unused(unused: Sequence[Tensor], where: str, name: Namer) -> None:
    """Raises :class:`IncompatibleTrainer` if there are parameters that got no gradient."""
    if not unused:
        return
    names = ", ".join(map(name, unused[:5])) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
    raise IncompatibleTrainer(
        f"{names} got no gradient {where}, and stepping during backward averages the gradients of every parameter over "
        "the processes. Freeze what is not used (requires_grad_(False)), or use "
        "Trainer(strategy='ddp_find_unused_parameters_true') and the optimizer without _layerwise.",
        code="LO616",
    )


def refuse_separate_processes(parameters: Iterable[Tensor]) -> None:
    """Raises :class:`IncompatibleTrainer` for several processes that average nothing: they would drift apart."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    # By their method: sharded parameters (FSDP2, tensor parallelism) come with their gradients reduced.
    if not any(hasattr(parameter, "to_local") for parameter in parameters):
        raise IncompatibleTrainer(
            f"{dist.get_world_size()} processes, and nothing averages gradients before they are stepped: "
            "DistributedDataParallel does so too late. Use the model without it and "
            "Layerwise(optimizer, replicas=Replicas()); Replicas(group) of one process if each trains by itself.",
            code="LO617",
        )
