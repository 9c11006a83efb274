"""``strategy="layerwise_ddp"``: copies of one model, their gradients averaged and stepped during backward."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from lightning_optim._compat.lightning import is_accumulating, sync_module_states
from lightning_optim.layerwise import Layerwise, Replicas
from lightning_optim.trainer.strategies._layerwise import StepsInBackward

if TYPE_CHECKING:
    _Base = DDPStrategy
else:
    _Base = object


class StepsCopiesInBackward(StepsInBackward, _Base):
    """Mixin: all of :class:`LayerwiseDDPStrategy` but Lightning's base class."""

    def __init__(
        self,
        bucket_mb: float | None = None,
        norm_clipping: str | None = None,
        log_grad_norm: bool | None = None,
        broadcast_buffers: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        overflow: str | None = None,
        gradient_readers: str | None = None,
        norm_budget_mb: float | None = None,
        **others: Any,
    ) -> None:
        # Not passed on: otherwise a command line would offer the arguments of DistributedDataParallel.
        if others:
            raise TypeError(
                f"LayerwiseDDPStrategy got {', '.join(others)}. If that is for DistributedDataParallel: it is not used "
                "here. Leave it out, or use DDPStrategy and the optimizer without _layerwise."
            )
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self.take_options(locals())
        self._broadcast_buffers = broadcast_buffers

    def configure_ddp(self) -> None:
        # DistributedDataParallel's constructor does this; here nothing wraps the model.
        assert self.model is not None
        sync_module_states(self.model)

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
        if is_accumulating(self.lightning_module.trainer):
            return
        for optimizer in self.optimizers:
            layerwise = Layerwise.of(optimizer)
            # A step that has to wait for the end of backward finds its gradients averaged, as with DDP.
            if layerwise is not None and layerwise.has_gradients():
                layerwise.average_alive()

    def _sync_buffers(self) -> None:
        assert self.model is not None
        assert self.lightning_module is not None
        if not self._broadcast_buffers or self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            # Outside of fit, processes may have different numbers of batches, as with DDP.
            return
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


class LayerwiseDDPStrategy(StepsCopiesInBackward, DDPStrategy):
    """Steps every optimizer during backward, in several processes with a copy of the model each.

    The model is not wrapped in ``DistributedDataParallel``: its gradients are averaged, stepped and freed bucket by
    bucket during backward. Ranks stay bit-identical. Parameters and buffers of rank 0 are broadcast when fit starts,
    buffers also before every forward. Every parameter must get a gradient in every process.

    Args:
        bucket_mb: As in :class:`~lightning_optim.LayerwiseStrategy`.
        norm_clipping: As in ``LayerwiseStrategy``.
        log_grad_norm: As in ``LayerwiseStrategy``.
        overflow: As in ``LayerwiseStrategy``.
        gradient_readers: As in ``LayerwiseStrategy``.
        norm_budget_mb: As in ``LayerwiseStrategy``.
        broadcast_buffers: Whether all processes take rank 0's buffers (BatchNorm's statistics) before every forward.
        process_group_backend: As in ``DDPStrategy``.
        timeout: As in ``DDPStrategy``.
        start_method: As in ``DDPStrategy``.
        accelerator: As in ``DDPStrategy``; the Trainer sets it.
        parallel_devices: As in ``DDPStrategy``; the Trainer sets it.
        cluster_environment: As in ``DDPStrategy``.
        checkpoint_io: As in ``DDPStrategy``.
        precision_plugin: As in ``DDPStrategy``; the Trainer sets it.
        **others: Refused.

    Raises:
        InvalidOption: If an option is of the wrong type or out of range.
        IncompatibleTrainer: When fit starts, if the module cannot be trained this way; in the first step, if a
            parameter gets no gradient.
        TypeError: For arguments of ``DistributedDataParallel``, which is not used.
    """

    strategy_name = layerwise_name = "layerwise_ddp"
