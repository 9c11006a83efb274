"""``strategy="layerwise_fsdp2"``: sharded parameters (FSDP2), stepped during backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout

from lightning_optim._compat.lightning import data_parallel_takes_the_rest
from lightning_optim.stepping import without_reduction
from lightning_optim.trainer.strategies._blocks import ShardsBlocks
from lightning_optim.trainer.strategies._layerwise import StepsInBackward
from lightning_optim.trainer.strategies._whole_file import ReadsWholeFiles

if TYPE_CHECKING:
    _Base = ModelParallelStrategy
else:
    _Base = object


class StepsShardsInBackward(StepsInBackward, ShardsBlocks, ReadsWholeFiles, _Base):
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
            data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout
        )
        self.take_options(locals())
        self.shard = shard

    def setup_environment(self) -> None:
        data_parallel_takes_the_rest(self)
        super().setup_environment()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulates the gradients of micro-batches locally."""
        assert self.model is not None
        with without_reduction(self.model):
            yield


class LayerwiseFSDP2Strategy(StepsShardsInBackward, ModelParallelStrategy):
    """Steps every optimizer during backward, on parameters sharded by ``fully_shard`` (FSDP2).

    As with Lightning's ``ModelParallelStrategy``, the module calls ``fully_shard`` in ``configure_model``, on the mesh
    ``self.device_mesh["data_parallel"]``. One without ``configure_model`` has its numbered blocks sharded, each by
    itself, and then the rest of each submodule. Gradients are reduced by FSDP2 before they are stepped; micro-batches
    that accumulate are not reduced.

    Args:
        bucket_mb: As in :class:`~lightning_optim.LayerwiseStrategy`, counted in shards.
        norm_clipping: As in ``LayerwiseStrategy``.
        log_grad_norm: As in ``LayerwiseStrategy``.
        overflow: As in ``LayerwiseStrategy``.
        gradient_readers: As in ``LayerwiseStrategy``.
        norm_budget_mb: As in ``LayerwiseStrategy``.
        data_parallel_size: Processes to shard over; ``"auto"`` means all that tensor parallelism leaves, unlike in
            ``ModelParallelStrategy``, where it means the number of nodes.
        tensor_parallel_size: Processes in each tensor-parallel group.
        save_distributed_checkpoint: As in ``ModelParallelStrategy``.
        process_group_backend: As in ``ModelParallelStrategy``.
        timeout: As in ``ModelParallelStrategy``.
        shard: Regular expression for the whole names of the modules to shard by themselves, for a module without
            ``configure_model``; ``None`` finds numbered blocks, as ``layer_decay`` does.

    Raises:
        InvalidOption: If an option is of the wrong type or out of range.
        IncompatibleTrainer: When fit starts, if the module cannot be trained this way.
    """

    strategy_name = layerwise_name = "layerwise_fsdp2"
