"""``strategy="layerwise_fsdp2"``: sharded parameters (FSDP2), stepped during backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout

from lightning_optim.stepping import without_reduction
from lightning_optim.trainer.strategies._fsdp2 import Shards
from lightning_optim.trainer.strategies._layerwise import StepsInBackward


class StepsShardsInBackward(StepsInBackward, Shards):
    """Mixin: all of :class:`LayerwiseFSDP2Strategy` but Lightning's base class."""

    def __init__(
        self,
        bucket_mb: float | None = None,
        norm_clipping: str | None = None,
        log_grad_norm: bool | None = None,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
        overflow: str | None = None,
        gradient_readers: str | None = None,
        norm_budget_mb: float | None = None,
        shard: str | None = None,
    ) -> None:
        super().__init__(
            data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout, shard
        )
        self.take_options(locals())

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulates the gradients of micro-batches locally."""
        assert self.model is not None
        with without_reduction(self.model):
            yield


class LayerwiseFSDP2Strategy(StepsShardsInBackward, ModelParallelStrategy):
    """Steps every optimizer during backward, on parameters sharded by ``fully_shard`` (FSDP2).

    Modules are sharded as under :class:`~lightning_optim.FSDP2Strategy`. Gradients are reduced by FSDP2 before they are
    stepped; micro-batches that accumulate are not reduced.

    Args:
        bucket_mb: As in :class:`~lightning_optim.LayerwiseStrategy`, counted in shards.
        norm_clipping: As in ``LayerwiseStrategy``.
        log_grad_norm: As in ``LayerwiseStrategy``.
        overflow: As in ``LayerwiseStrategy``.
        gradient_readers: As in ``LayerwiseStrategy``.
        norm_budget_mb: As in ``LayerwiseStrategy``.
        data_parallel_size: As in ``FSDP2Strategy``.
        tensor_parallel_size: As in ``FSDP2Strategy``.
        save_distributed_checkpoint: As in ``FSDP2Strategy``.
        process_group_backend: As in ``FSDP2Strategy``.
        timeout: As in ``FSDP2Strategy``.
        shard: As in ``FSDP2Strategy``.

    Raises:
        InvalidOption: If an option is of the wrong type or out of range.
        IncompatibleTrainer: When fit starts, if the module cannot be trained this way.
    """

    strategy_name = layerwise_name = "layerwise_fsdp2"
