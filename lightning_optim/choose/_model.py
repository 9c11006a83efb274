"""What memory is estimated of: a module, or a shape before there is one; and the batch that goes with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.choose._shapes import SHAPES, Shape, Transformer, find_shape
from lightning_optim.errors import InvalidOption

Model = nn.Module | Shape | str


def as_module(model: Model, activation_checkpointing: bool) -> nn.Module:
    """Returns the module, of a shape the plain transformer that has it, without memory.

    Raises:
        InvalidOption: If it is none of these, or checkpointing is asked of a module.
    """
    if isinstance(model, str):
        model = find_shape(model)
    if isinstance(model, Shape):
        with torch.device("meta"):
            return Transformer(model, activation_checkpointing=activation_checkpointing)
    if not isinstance(model, nn.Module):
        raise InvalidOption(
            f"memory is estimated of a module, a Shape or the name of one such as 'llama-7b', not of "
            f"{type(model).__name__}",
            code="LO901",
        )
    if activation_checkpointing and not isinstance(model, Transformer):
        raise InvalidOption(
            f"activation_checkpointing=True is for shapes. In {type(model).__name__} torch.utils.checkpoint.checkpoint "
            "does it, around the forward of each block, and the estimate sees it",
            code="LO901",
        )
    return model


def as_batch(batch: Any, module: nn.Module) -> Any:
    """Returns the batch; of a shape, numbers of sequences and tokens (of images) become a tensor without memory.

    Raises:
        InvalidOption: If the numbers do not fit the shape.
    """
    if not isinstance(module, Transformer) or batch is None or isinstance(batch, Tensor):
        return batch
    numbers = (batch,) if isinstance(batch, int) else tuple(batch) if isinstance(batch, (tuple, list)) else ()
    images = module.shape.kind == "vit"
    if not all(isinstance(number, int) and number > 0 for number in numbers) or len(numbers) != (1 if images else 2):
        wanted = "the number of images, batch=8" if images else "sequences and tokens, batch=(8, 2048)"
        raise InvalidOption(
            f"batch={batch!r} for the shape {module.shape.kind!r}: give {wanted}, or None", code="LO901"
        )
    if images:
        return torch.empty(numbers[0], 3, 224, 224, device="meta")
    if module.shape.kind != "llama" and numbers[1] > module.shape.length:
        raise InvalidOption(
            f"batch={batch!r} has more tokens than the {module.shape.length} positions of the shape", code="LO901"
        )
    return torch.empty(numbers, dtype=torch.int64, device="meta")


def name_of(model: Model) -> str:
    """Returns how to call it."""
    if isinstance(model, str):
        return model
    if isinstance(model, Shape):
        own = f"{model.kind} {model.hidden}x{model.layers}"
        return next((name for name, shape in SHAPES.items() if shape == model), own)
    return type(model).__name__
