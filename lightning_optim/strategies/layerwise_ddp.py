"""``strategy="layerwise_ddp"``: copies of one model, their gradients averaged and stepped during backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_optim.layerwise.engine import Layerwise
from lightning_optim.layerwise.replicas import Replicas
from lightning_optim.strategies.layerwise import StepsInBackward, layerwise_options


class LayerwiseDDPStrategy(StepsInBackward, DDPStrategy):
    """Steps every optimizer during backward, in several processes with a copy of the model each.

    The model is not wrapped in ``DistributedDataParallel``: its gradients are averaged bucket by bucket while backward
    goes on, stepped and freed. Ranks stay bit-identical. Parameters and buffers of rank 0 are broadcast when fit
    starts, buffers also before every forward. Every parameter must get a gradient in every process.

    Args:
        bucket_mb: As in :class:`~lightning_optim.LayerwiseStrategy`.
        norm_clipping: As there.
        log_grad_norm: As there.
        broadcast_buffers: Whether all processes take rank 0's buffers (BatchNorm's statistics) before every forward.
        **kwargs: Those of ``DDPStrategy`` that do not belong to ``DistributedDataParallel``: ``process_group_backend``,
            ``timeout``, ``start_method``, ``cluster_environment`` ...

    Raises:
        InvalidOption: If an option is of the wrong type or out of range.
        IncompatibleTrainer: When fit starts, if the module cannot be trained so; in the first step, if a parameter gets
            no gradient.
        TypeError: For arguments of ``DistributedDataParallel``, which is not used.
    """

    strategy_name = layerwise_name = "layerwise_ddp"

    def __init__(
        self,
        bucket_mb: float | None = None,
        norm_clipping: str | None = None,
        log_grad_norm: bool | None = None,
        broadcast_buffers: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self._ddp_kwargs or self._ddp_comm_hook or self._ddp_comm_state:
            given = [*self._ddp_kwargs, *(["ddp_comm_hook"] if self._ddp_comm_hook or self._ddp_comm_state else [])]
            raise TypeError(
                f"LayerwiseDDPStrategy got {', '.join(given)}: arguments of DistributedDataParallel, which it does not "
                "use. Leave them out, or use DDPStrategy and the optimizer without _layerwise."
            )
        self.layerwise_options = layerwise_options(
            self.layerwise_name, bucket_mb=bucket_mb, norm_clipping=norm_clipping, log_grad_norm=log_grad_norm
        )
        self._broadcast_buffers = broadcast_buffers

    def configure_ddp(self) -> None:
        # What DistributedDataParallel's constructor does; nothing wraps the model.
        assert self.model is not None
        _sync_module_states(self.model)

    def prepare(self, layerwise: Layerwise) -> None:
        layerwise.replicas = Replicas()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._sync_buffers()
        return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._sync_buffers()
        return super().validation_step(*args, **kwargs)

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        assert self.lightning_module is not None
        if self.lightning_module.trainer.fit_loop._should_accumulate():
            return
        for optimizer in self.optimizers:
            layerwise = Layerwise.of(optimizer)
            # A step that has to wait for the end of backward finds its gradients averaged, as DDP would leave them.
            if layerwise is not None and layerwise.has_gradients():
                layerwise.average_alive()

    def _sync_buffers(self) -> None:
        if not self._broadcast_buffers:
            return
        assert self.model is not None
        alike: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.model.buffers():
            alike.setdefault(buffer.dtype, []).append(buffer)
        with torch.no_grad():
            for buffers in alike.values():
                # One message per dtype: BatchNorm's buffers are many and small.
                flat = torch.cat([buffer.flatten() for buffer in buffers])
                dist.broadcast(flat, src=0)
                parts = torch.split_with_sizes(flat, [buffer.numel() for buffer in buffers])
                for buffer, part in zip(buffers, parts, strict=True):
                    buffer.copy_(part.view_as(buffer))

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Does nothing: :func:`lightning_optim.strategies.register` knows the flags."""
