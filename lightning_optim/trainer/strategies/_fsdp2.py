"""``strategy="fsdp2"``: sharded parameters (FSDP2), stepped after backward."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout

from lightning_optim._compat.lightning import data_parallel_takes_the_rest
from lightning_optim.trainer.strategies._blocks import ShardsBlocks
from lightning_optim.trainer.strategies._movable import Movable
from lightning_optim.trainer.strategies._whole_file import ReadsWholeFiles
from lightning_optim.trainer.strategies._whole_folder import WritesWholeFolders

if TYPE_CHECKING:
    _Base = ModelParallelStrategy
else:
    _Base = object


class Shards(Movable, ShardsBlocks, ReadsWholeFiles, WritesWholeFolders, _Base):
    """Mixin: all of :class:`FSDP2Strategy` but Lightning's base class."""

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
        shard: str | None = None,
    ) -> None:
        super().__init__(
            data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout
        )
        self.shard = shard

    def setup_environment(self) -> None:
        data_parallel_takes_the_rest(self)
        super().setup_environment()


class FSDP2Strategy(Shards, ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` for modules that need not say how they are sharded.

    A module may call ``fully_shard`` in ``configure_model``, on the mesh ``self.device_mesh["data_parallel"]``. One
    without ``configure_model`` has its numbered blocks sharded, each by itself, and then the rest of each submodule;
    with ``precision="bf16-mixed"`` or ``"16-mixed"`` its parameters are gathered in 16 bits and its gradients reduced
    in 32.

    Args:
        data_parallel_size: Processes to shard over; ``"auto"`` means all that tensor parallelism leaves, unlike in
            ``ModelParallelStrategy``, where it means the number of nodes.
        tensor_parallel_size: Processes in each tensor-parallel group.
        save_distributed_checkpoint: As in ``ModelParallelStrategy``.
        process_group_backend: As in ``ModelParallelStrategy``.
        timeout: As in ``ModelParallelStrategy``.
        shard: Regular expression for the whole names of the modules to shard by themselves, for a module without
            ``configure_model``; ``None`` finds numbered blocks, as ``layer_decay`` does.

    Raises:
        InvalidOption: When fit starts, if ``shard`` matches no module, or the module has a ``configure_model``.
        IncompatibleTrainer: When fit starts, if there is nothing to shard by itself.
    """

    strategy_name = layerwise_name = "fsdp2"
