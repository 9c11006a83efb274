"""What is used of torchao that it does not promise."""

from __future__ import annotations

import torch
import torchao.optim.adam
from torch import Tensor

__all__ = ["AdamBase"]


class AdamBase(torchao.optim.adam._AdamBase):
    """The class of its optimizers' steps, of which AdamW8bit, AdamW4bit and AdamWFp8 differ in the class of the states.

    It asks :meth:`quantizes` of each parameter: without that, embeddings would be quantized, too.
    """

    def quantizes(self, parameter: Tensor) -> bool:
        """Whether the moments of a parameter may be stored in few bits."""
        return True

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        if not self.quantizes(p):
            return torch.zeros_like(p, dtype=torch.float32)
        buffer: Tensor = super()._new_buffer(p, signed)
        return buffer
