"""Clipping, also of gradients that are never all alive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_optim._compat import kernels
from lightning_optim._compat.torch import group_by_device_and_dtype
from lightning_optim.errors import InvalidOption, listing

Kind = Literal["value", "norm", "previous", "per_parameter"]


@dataclass(frozen=True)
class Clipping:
    """How gradients are clipped before a step.

    Attributes:
        kind: ``"value"`` clamps every element; ``"norm"`` scales all gradients so that their total 2-norm is at most
            ``limit``, which takes a backward that only measures before the one that steps; ``"previous"`` scales them
            by the previous step's total norm (the first step measures); ``"per_parameter"`` scales each parameter's
            gradient by its own norm.
        limit: The largest value or norm.

    Raises:
        InvalidOption: If the kind is unknown or the limit is not positive.
    """

    kind: Kind
    limit: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InvalidOption(f"Clipping({self.kind!r}, ...): the kinds are {listing(get_args(Kind))}", code="LO207")
        if not self.limit > 0:
            raise InvalidOption(f"Clipping({self.kind!r}, {self.limit!r}): the limit is a number above 0", code="LO204")

    def clip(self, parameters: Iterable[Tensor]) -> None:
        """Clips all gradients of parameters in place; whatever the kind, by the norm of this step."""
        alive = [parameter for parameter in parameters if parameter.grad is not None]
        if alive:
            norms = [] if self.kind == "value" else norms_of(alive)
            self.apply(alive, norms, total_norm(norms))

    def apply(self, bucket: Sequence[Tensor], norms: Sequence[Tensor], total: Tensor | None) -> None:
        """Clips the gradients of a bucket in place.

        Args:
            bucket: Parameters with gradients.
            norms: The 2-norm of each gradient, 0-dim; for ``"per_parameter"``.
            total: The total norm to scale by, 0-dim; for ``"norm"`` and ``"previous"``.
        """
        if self.kind == "value":
            torch.nn.utils.clip_grad_value_(bucket, self.limit)
        elif self.kind == "per_parameter":
            _clip_each(bucket, norms, self.limit)
        else:
            assert total is not None
            torch.nn.utils.clip_grads_with_norm_(bucket, self.limit, total)


def _clip_each(bucket: Sequence[Tensor], norms: Sequence[Tensor], limit: float) -> None:
    """Scales each gradient by its own norm, as ``torch.nn.utils.clip_grads_with_norm_`` does one parameter."""
    if len({(type(norm), norm.dtype, norm.device) for norm in norms}) > 1 or type(norms[0]) is not Tensor:
        for parameter, norm in zip(bucket, norms, strict=True):
            torch.nn.utils.clip_grads_with_norm_([parameter], limit, full_tensor(norm))
        return
    # Its arithmetic for all norms at once: ten operations for a small gradient take longer than its step.
    factors = torch.clamp(limit / (torch.stack(list(norms)) + 1e-6), max=1.0)
    for parameter, factor in zip(bucket, factors.unbind(), strict=True):
        assert parameter.grad is not None
        parameter.grad.mul_(factor)


def norms_of(bucket: Iterable[Tensor]) -> list[Tensor]:
    """Returns the 2-norm of each parameter's gradient as 0-dim tensors; of sharded gradients as 0-dim DTensors."""
    gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
    if all(type(gradient) is Tensor for gradient in gradients):
        # What torch.nn.utils.get_total_norm calls.
        return list(kernels.foreach_norm(gradients)) if gradients else []
    return [torch.linalg.vector_norm(gradient) for gradient in gradients]


def total_norm(norms: Sequence[Tensor]) -> Tensor:
    """Returns the total norm, 0-dim, from the single ones; adds in ``torch.nn.utils.get_total_norm``'s order."""
    if not norms:
        return torch.zeros(())
    device = norms[0].device
    ordered = [norm.to(device) for alike in group_by_device_and_dtype(norms) for norm in alike]
    return full_tensor(torch.linalg.vector_norm(torch.stack(ordered)))


def full_tensor(norm: Tensor) -> Tensor:
    """Returns the norm over all shards, a plain tensor."""
    full: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return full
