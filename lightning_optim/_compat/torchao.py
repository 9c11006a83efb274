"""What is used of torchao that it does not promise."""

from __future__ import annotations

import torchao.optim.adam

__all__ = ["AdamBase"]

# The class of its optimizers' steps, of which AdamW8bit and AdamW4bit differ in the class of the states.
AdamBase = torchao.optim.adam._AdamBase
