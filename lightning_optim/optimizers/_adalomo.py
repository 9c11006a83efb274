"""AdaLomo, an Adafactor for optimizer-in-backward."""

from __future__ import annotations

from typing import Any

from lightning_optim.optimizers._adafactor import Adafactor


class AdaLomo(Adafactor):
    """AdaLomo: Adafactor's update without a first moment, scaled by the parameter's root mean square.

    AdaLomo: Low-memory Optimization with Adaptive Learning Rate, https://arxiv.org/abs/2310.10195.

    It registers no hooks: the layerwise engine steps it during backward, which is the paper's point.

    Args:
        params: Parameters or param groups.
        lr: Learning rate, multiplied by the root mean square of each parameter.
        eps: Added to squared gradients; lower bound of the root mean square that the rate is multiplied by.
        clip_threshold: Largest root mean square of an update before the learning rate.
        decay_rate: The second moment keeps ``1 - step**decay_rate`` of its old value.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, eps, clip_threshold, decay_rate, None, weight_decay, scale_parameter=True)
