"""What is used of torch_xla that it does not promise. All of it is in torch_xla 2.9."""

from __future__ import annotations

from typing import Any

__all__ = ["adam_step", "tpu_count"]


def adam_step(*tensors: Any, **hyperparameters: Any) -> None:
    """Steps by one XLA operation per parameter, which ``syncfree.AdamW`` does only if it is given a ``found_inf``."""
    from torch_xla.amp.syncfree import _functional

    _functional.adam_step(*tensors, **hyperparameters)


def tpu_count() -> int:
    """Returns how many TPUs there are, without opening them: that must wait for the processes of a launcher."""
    from torch_xla._internal import tpu

    return int(tpu.num_available_devices())
