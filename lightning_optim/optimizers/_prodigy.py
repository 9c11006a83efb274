"""Prodigy: Adam that estimates its learning rate from how far the weights have come.

Prodigy: An Expeditiously Adaptive Parameter-Free Learner, https://arxiv.org/abs/2306.06101.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_optim._compat import kernels
from lightning_optim.errors import InvalidOption
from lightning_optim.optimizers._base import (
    OwnOptimizer,
    gradients,
    hyperparameters,
    to_compute_dtype,
    write_back,
    zeros_for,
)

# What all groups share: the estimate, the first and the largest one, and the numerator of the next.
_SHARED = ("d", "d0", "d_max", "d_numerator")


class Prodigy(OwnOptimizer):
    """Prodigy: the learning rate is ``lr`` times an estimate ``d`` of the distance to the solution.

    ``d`` starts at ``d0`` and grows: it compares how far the weights have come, along the gradients, with the sum of
    the gradients. It is one number for all parameters, so none can be stepped without the others. The groups hold it,
    and so does a checkpoint.

    The learning rate of a group is a factor of its own, also in what the group contributes to ``d``; with one rate for
    all it is the package prodigyopt's algorithm. With a rate of 0 a group does not contribute.

    Args:
        params: Parameters or param groups, real, dense and not sharded.
        lr: Factor on the estimate.
        betas: Decay rates of the first and second moment.
        beta3: Decay rate of the sums that the estimate is made of; ``None`` is the root of ``betas[1]``.
        eps: Added to the denominator, times the estimate.
        weight_decay: Decoupled weight decay.
        use_bias_correction: Whether to correct the moments' start at zero.
        safeguard_warmup: Whether to leave ``lr`` out of the estimate's denominator, against a warm-up's small rates.
        d0: First estimate.
        d_coef: Factor on each new estimate, to be preferred to ``lr``.
        growth_rate: The estimate grows at most by this factor in a step; ``None`` for no bound.
        slice_p: Every how many elements are looked at for the estimate; more than 1 saves memory.

    Raises:
        InvalidOption: If a value is out of range.
        InvalidParamGroups: If a parameter is complex or sharded, or its gradient sparse.
    """

    unsharded: ClassVar[str] = (
        "its estimate of the step size takes sums over all parameters, and processes would each make another"
    )

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float | None = None,
        slice_p: int = 1,
    ) -> None:
        super().__init__(params, {**hyperparameters(locals()), "d": d0, "d_max": d0, "d_numerator": 0.0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        # The estimate is the optimizer's, whenever a group comes.
        first, last = self.param_groups[0], self.param_groups[-1]
        last.update({name: first[name] for name in _SHARED})

    def used_rate(self, group: dict[str, Any]) -> float:
        return float(group["lr"] * group["d"])

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for name in ("d0", "d_coef"):
            if not group[name] > 0:
                raise InvalidOption(f"{name}={group[name]!r} of Prodigy is out of range: 0 < value", code="LO204")
        if group["beta3"] is not None and not 0 <= group["beta3"] < 1:
            raise InvalidOption(f"beta3={group['beta3']!r} of Prodigy is out of range: 0 <= value < 1", code="LO204")
        if group["growth_rate"] is not None and not group["growth_rate"] >= 1:
            raise InvalidOption(
                f"growth_rate={group['growth_rate']!r} of Prodigy is out of range: 1 <= value, or None", code="LO204"
            )
        if not (isinstance(group["slice_p"], Integral) and int(group["slice_p"]) >= 1):
            raise InvalidOption(f"slice_p={group['slice_p']!r} of Prodigy is not a whole number >= 1", code="LO204")

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        (start,) = _slices(to_compute_dtype([parameter]), group["slice_p"])
        moments = {name: zeros_for(parameter) for name in ("exp_avg", "exp_avg_sq")}
        return {**moments, "s": torch.zeros_like(start), "p0": start.clone()}

    def _step(self) -> None:
        self._found: list[Tensor] = []
        super()._step()
        found, self._found = self._found, []
        if found:
            self._estimate(found)

    def _update(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        exp_avgs, exp_avg_sqs = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        (beta1, beta2), estimate = group["betas"], group["d"]
        rate = estimate * float(group["lr"])
        if group["use_bias_correction"]:
            rate *= math.sqrt(1 - beta2**step) / (1 - beta1**step)
        values, given = to_compute_dtype(parameters), gradients(parameters)
        if rate:
            # Before the weights move.
            self._found.append(self._measured(values, given, states, rate, group))
        kernels.foreach_mul_(exp_avgs, beta1)
        kernels.foreach_add_(exp_avgs, given, alpha=estimate * (1 - beta1))
        kernels.foreach_mul_(exp_avg_sqs, beta2)
        kernels.foreach_addcmul_(exp_avg_sqs, given, given, estimate**2 * (1 - beta2))
        roots = kernels.foreach_sqrt(exp_avg_sqs)
        kernels.foreach_add_(roots, estimate * group["eps"])
        if group["weight_decay"]:
            kernels.foreach_mul_(values, 1 - rate * group["weight_decay"])
        kernels.foreach_addcdiv_(values, exp_avgs, roots, -rate)
        write_back(parameters, values)

    def _measured(
        self,
        values: Sequence[Tensor],
        given: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        rate: float,
        group: Mapping[str, Any],
    ) -> Tensor:
        """Returns what parameters add to the estimate's numerator and denominator."""
        # Relative to the first estimate, whose square would be too small a number.
        scale, every = group["d"] / group["d0"], group["slice_p"]
        sums, slices = [state["s"] for state in states], _slices(given, every)
        come = kernels.foreach_add([state["p0"] for state in states], _slices(values, every), alpha=-1)
        along = torch.stack([torch.dot(*pair) for pair in zip(slices, come, strict=True)]).sum()
        kernels.foreach_mul_(sums, _beta3(group))
        kernels.foreach_add_(sums, slices, alpha=scale * (group["d"] if group["safeguard_warmup"] else rate))
        size = torch.stack([torch.linalg.vector_norm(each, 1) for each in sums]).sum()
        return torch.stack([along * (scale * rate), size])

    def _estimate(self, found: Sequence[Tensor]) -> None:
        """Makes the next step's estimate."""
        first = self.param_groups[0]
        # Awaited once per device, after all of it was given to the device.
        parts: dict[torch.device, list[Tensor]] = {}
        for each in found:
            parts.setdefault(each.device, []).append(each)
        on_host = [torch.stack(each).to("cpu", torch.float64) for each in parts.values()]
        numerator, denominator = torch.cat(on_host).sum(0).tolist()
        if not denominator:
            return
        numerator += _beta3(first) * first["d_numerator"]
        made = first["d_coef"] * numerator / denominator
        now = max(first["d"], made) if first["d"] == first["d0"] else first["d"]
        largest = max(first["d_max"], made)
        growth = math.inf if first["growth_rate"] is None else first["growth_rate"]
        for group in self.param_groups:
            group.update(d=min(largest, now * growth), d_max=largest, d_numerator=numerator)


def slice_length(elements: int, every: int) -> int:
    """Returns how many elements of a parameter are looked at for the estimate."""
    return -(-elements // int(every))


def _slices(tensors: Iterable[Tensor], every: int) -> list[Tensor]:
    return [tensor.view(-1)[::every] for tensor in tensors]


def _beta3(group: Mapping[str, Any]) -> float:
    return math.sqrt(group["betas"][1]) if group["beta3"] is None else float(group["beta3"])
