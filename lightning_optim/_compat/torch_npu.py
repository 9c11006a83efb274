"""What is used of torch_npu that it does not promise. All of it is in torch_npu 2.13."""

from __future__ import annotations

from torch_npu import optim

__all__ = ["AdamWInParts"]


class AdamWInParts(optim.NpuFusedAdamW):
    """``NpuFusedAdamW``, whose step consists of parts that may be taken, and done otherwise, one by one.

    It takes the first two in its ``zero_grad`` and in its clipping, too: only if they are overridden, whatever is about
    to use the flat buffers finds them as they have to be.
    """

    def _maybe_init_combined_params_and_grads(self) -> None:
        self.combine_parameters()

    def _maybe_init_combined_states(self) -> None:
        self.combine_states()

    def combine_parameters(self) -> None:
        """Moves parameters and gradients into flat buffers, if they are not there yet."""
        super()._maybe_init_combined_params_and_grads()

    def combine_states(self) -> None:
        """Moves states into flat buffers, if they are not there yet."""
        super()._maybe_init_combined_states()

    def step_group(self, number: int) -> None:
        """Steps the flat buffers of one group."""
        self._group_step(number)
