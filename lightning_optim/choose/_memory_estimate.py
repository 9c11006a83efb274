"""What an estimate says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step on one device, from the second step on.

    Attributes:
        optim: The identifier that was asked for.
        built: The identifier that is built; another one if ``optim`` stands for several.
        model: What is trained.
        precision: The Trainer's precision.
        accelerator: What it is trained on.
        strategy: ``"auto"`` for one device that steps after backward.
        devices: Number of devices, each of which holds this much.
        parameters: All parameters; sharded, those of a device.
        buffers: All buffers.
        state: The optimizer's state.
        gradients: Most bytes of gradients; stepped layer by layer, those of a bucket and what arrives.
        communication: Buffers in which gradients are averaged; of sharded parameters most bytes of those that are
            gathered and of gradients that are reduced.
        activations: Most bytes of what forward keeps for backward, backward's own tensors and the batch; ``None`` if no
            batch was given.
        temporaries: Most bytes that stepping takes while it runs; ``None`` if nobody knows, and then it counts as none.
        pageable: Bytes of the state that go to the host's memory where the device is full.
        peak: Most bytes alive at once.
        moment: When that is: in ``"forward"``, ``"backward"`` or ``"step"``; layer by layer, a step is in backward.
        at_peak: What is alive then, by the names above.
    """

    optim: str
    built: str
    model: str
    precision: str
    accelerator: str
    strategy: str
    devices: int
    parameters: int
    buffers: int
    state: int
    gradients: int
    communication: int
    activations: int | None
    temporaries: int | None
    pageable: int
    peak: int
    moment: str
    at_peak: Mapping[str, int]

    @property
    def resident(self) -> int:
        """The peak without what can be paged out."""
        return self.peak - self.pageable

    def as_dict(self) -> dict[str, Any]:
        """Returns the attributes as plain values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"at_peak": dict(self.at_peak)}
