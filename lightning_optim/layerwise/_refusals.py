"""What the engine refuses."""

from __future__ import annotations

from lightning_optim.errors import IncompatibleTrainer


def fabric_scales() -> IncompatibleTrainer:
    """Returns the error for Fabric's own loss scaling."""
    return IncompatibleTrainer(
        "Fabric with precision='16-mixed' scales the loss inside fabric.backward, where gradients would be stepped "
        "before they are unscaled. Use precision='bf16-mixed', or step after backward: fabric.backward(loss); "
        "optimizer.step(); optimizer.zero_grad().",
        code="LO612",
    )


def not_here(why: str, arguments: str) -> IncompatibleTrainer:
    """Returns the error for what only ``Layerwise.backward`` can do, not a backward inside ``stepping()``."""
    return IncompatibleTrainer(
        f"{why} Layerwise.backward({arguments}) instead of a backward inside Layerwise.stepping().", code="LO613"
    )


def stepped_too_early() -> IncompatibleTrainer:
    """Returns the error for a parameter whose value backward needs again."""
    return IncompatibleTrainer(
        "backward needs the value of a parameter that has already been stepped: it is also used without a gradient "
        "(weight.detach()), or backward runs twice in one step. Step after backward: use the optimizer without "
        "_layerwise.",
        code="LO614",
    )
