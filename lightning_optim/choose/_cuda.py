"""What CUDA computes otherwise than a CPU, where that changes what is kept for backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Of torch's list "CUDA Ops that can autocast to float32" (docs.pytorch.org/docs/stable/amp.html), what models call.
_IN_FLOAT32 = frozenset(
    {
        *(getattr(functional, name) for name in ("softmax", "log_softmax", "softmin", "softplus", "normalize")),
        *(getattr(functional, name) for name in ("layer_norm", "group_norm", "cosine_similarity")),
        *(getattr(functional, name) for name in ("cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss")),
        *(getattr(functional, name) for name in ("kl_div", "poisson_nll_loss", "binary_cross_entropy_with_logits")),
        *(getattr(torch, name) for name in ("exp", "log", "pow", "rsqrt", "cumsum", "sum", "prod", "norm")),
        *(getattr(Tensor, name) for name in ("exp", "log", "pow", "rsqrt", "cumsum", "sum", "prod", "norm")),
        *(getattr(Tensor, name) for name in ("softmax", "log_softmax")),
    }
)


class LikeCuda(TorchFunctionMode):
    """Has tensors on a CPU keep for backward what tensors on CUDA would.

    Dropout keeps a mask of one byte per element, attention with dropout none at all (a CPU has no kernel for it), and
    autocast computes losses, softmax and norms in float32.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        special = _INSTEAD.get(function)
        if special is not None:
            return special(*args, **kwargs)
        if function in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = tuple(_float32(value) for value in args)
        return function(*args, **kwargs)


def _float32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not 0 < p < 1:
        return torch.dropout(input, p, training)
    dropped, _ = torch.native_dropout(input, p, train=True)
    return input.copy_(dropped) if inplace and not input.requires_grad else dropped


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if len(args) > 1:
        args = (args[0], 0.0, *args[2:])
    kwargs.pop("dropout_p", None)
    return functional.scaled_dot_product_attention(query, key, value, *args, **kwargs)


_INSTEAD: Mapping[Any, Callable[..., Tensor]] = MappingProxyType(
    {functional.dropout: _dropout, torch.dropout: _dropout, functional.scaled_dot_product_attention: _attention}
)
