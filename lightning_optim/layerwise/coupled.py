"""Optimizers whose parameters cannot be stepped one after the other."""

from __future__ import annotations

from torch.optim import LBFGS, Optimizer

from lightning_optim.errors import IncompatibleTrainer


def refuse_coupled(optimizer: Optimizer) -> None:
    """Raises :class:`IncompatibleTrainer` for an optimizer that is known to step all its parameters together."""
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise IncompatibleTrainer(
            "LBFGS evaluates the model several times for one step over all parameters and cannot be stepped layer by "
            "layer. Use it plainly, or another optimizer."
        )
    if getattr(optimizer, "is_fused_optimizer", False):
        raise IncompatibleTrainer(
            f"{name} of torch_npu moves parameters, gradients and states into flat buffers and steps those as a whole. "
            "Use it plainly, or optim='adamw_torch_fused_layerwise'."
        )
    wrapped = next((value for value in vars(optimizer).values() if isinstance(value, Optimizer)), None)
    if wrapped is not None:
        raise IncompatibleTrainer(
            f"{name} wraps another optimizer ({type(wrapped).__name__}), which steps all parameters at once. Step it "
            "plainly, or use the wrapped one."
        )
    manager = getattr(optimizer, "mng", None)
    if type(optimizer).__module__.startswith("bitsandbytes.") and getattr(manager, "module_weight_config_triple", None):
        raise IncompatibleTrainer(
            f"bitsandbytes' {name} with overrides in its GlobalOptimManager (StableEmbedding makes some), which count "
            "parameters by position: buckets would get each other's. Use the identifier, for instance "
            "optim='adamw_8bit_layerwise', which keeps embeddings in 32 bits by itself."
        )
