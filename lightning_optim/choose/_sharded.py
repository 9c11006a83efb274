"""A training step on sharded parameters (FSDP2): torch's own ``fully_shard``, in a group of processes that are absent.

What is alive depends on when FSDP2 gathers parameters, reduces gradients and frees both, so that nothing is replayed:
each way of stepping runs by itself, as one of the processes sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_optim._compat.fake import tensors_in
from lightning_optim._compat.shards import give_mesh
from lightning_optim.choose._fake_run import FakeTraining, on_gradient
from lightning_optim.choose._replay import Noting, Replay, Stepping, Unwatched
from lightning_optim.choose._shapes import Transformer
from lightning_optim.choose._tracker import MemoryTracker, Moment
from lightning_optim.errors import IncompatibleTrainer
from lightning_optim.stepping import is_sharded, without_reduction
from lightning_optim.trainer import shard_blocks, shards_itself

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ShardedTraining(FakeTraining):
    """A module without memory whose parameters are sharded over a mesh, the batch of one process, ready to run.

    Args:
        mesh: The processes.
        shard: Which modules of one that does not say how are sharded by themselves, as of the strategy.
        *training: As of :class:`FakeTraining`.

    Raises:
        IncompatibleTrainer: If nobody says how the module is sharded.
        InvalidOption: If ``shard`` matches nothing, or the module says how.
    """

    def __init__(self, mesh: DeviceMesh, shard: str | None, *training: Any) -> None:
        self._mesh, self._shard = mesh, shard
        super().__init__(*training)

    def _configure(self) -> None:
        name = type(self.module).__name__
        if isinstance(self.module, Transformer):
            _shard([*self.module.blocks, self.module], self._mesh)
            return
        if not isinstance(self.module, LightningModule):
            raise IncompatibleTrainer(
                f"{name} does not say how it is sharded. Estimate a LightningModule that has numbered blocks or calls "
                "fully_shard(layer, mesh=self.device_mesh['data_parallel']) in configure_model, or one of the shapes",
                code="LO904",
            )
        give_mesh(self.module, self._mesh)
        if shards_itself(self.module, self._shard):
            super()._configure()
        else:
            shard_blocks(self.module, self._shard, self.precision.autocast)
        if not any(map(is_sharded, self.module.parameters())):
            raise IncompatibleTrainer(
                f"{name} is not sharded: no parameter is a DTensor after configure_model. Call "
                "fully_shard(layer, mesh=self.device_mesh['data_parallel']) there for each layer, then for the whole",
                code="LO904",
            )


def run_sharded(training: FakeTraining, stepping: Stepping) -> Replay:
    """Runs the module's step on shards as it is stepped.

    Raises:
        IncompatibleTrainer: If the module optimizes manually, or its step depends on values.
        InvalidOption: If no loss comes out.
    """
    return training.run(lambda tracker: _Run(training, stepping, tracker).record())


class _Run:
    """Forward, backward and the steps in it, as the tracker sees them."""

    def __init__(self, training: FakeTraining, stepping: Stepping, tracker: MemoryTracker) -> None:
        self._training, self._stepping, self._tracker = training, stepping, tracker
        self._trainable = [parameter for parameter in training.parameters if parameter.requires_grad]
        self._arrived: dict[Tensor, None] = {}
        self._steps: list[tuple[tuple[Tensor, ...], Moment]] = []

    def record(self) -> Replay:
        self._tracker.restart()
        hooks = [on_gradient(parameter, self._arrives) for parameter in self._trainable]
        try:
            if self._stepping.layerwise:
                self._layerwise()
            else:
                for _ in range(min(self._stepping.accumulate, 2)):
                    # FSDP2 reduces each micro-batch.
                    self._forward().backward()  # type: ignore[no-untyped-call]
                self._note(list(self._arrived))
        finally:
            for hook in hooks:
                hook.remove()
        peaks, most = self._tracker.peaks, self._tracker.most
        passes = [peaks[phase] for phase in ("forward", "backward")]
        if not self._stepping.layerwise and self._stepping.accumulate == 1:
            # Lightning drops those of the step before when forward is over.
            passes.append(Moment("forward", {**peaks["forward"].live, "gradients": most["gradients"]}))
        return Replay(passes, self._steps, most["gradients"], most["other"], most["communication"])

    def _layerwise(self) -> None:
        stepping = self._stepping
        engine = Unwatched(Noting(self._trainable, self._note), stepping.bucket_mb)
        try:
            # More micro-batches take no more than the second.
            for _ in range(min(stepping.accumulate - 1, 2)):
                loss = self._forward()
                with without_reduction(self._training.module):
                    loss.backward()  # type: ignore[no-untyped-call]
                del loss
                engine.accumulated = True
                # What is left are whole gradients that no parameter shows.
                self._tracker.rename("other", "gradients")
            engine.backward(self._forward(), clipping=stepping.clipping)
        finally:
            engine.detach()

    def _forward(self) -> Tensor:
        self._tracker.phase = "forward"
        loss = self._training.loss()
        self._tracker.phase = "backward"
        return loss

    def _arrives(self, parameter: Tensor) -> None:
        self._arrived[parameter] = None
        self._tracker.add(tensors_in(parameter.grad), "gradients")

    def _note(self, parameters: Sequence[Tensor]) -> None:
        now = self._tracker.now()
        self._steps.append((tuple(parameters), Moment("step", now.live)))


def _shard(modules: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard

    for module in modules:
        fully_shard(module, mesh=mesh["data_parallel"])
