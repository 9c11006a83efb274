"""Rules for what is stepped during backward; they hold before the first batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lightning_optim.table import AFTER_BACKWARD, REGISTRY


@dataclass(frozen=True)
class Stepping:
    """An optimizer that is to be stepped during backward, and what surrounds it.

    Attributes:
        name: What the user typed to get it: ``"optim='adamw_torch_layerwise'"`` or ``"strategy='layerwise'"``.
        strategy: The rules' name for the Trainer's strategy, or the path of an unknown class.
        automatic: Whether Lightning's automatic optimization is on.
        clips_norm: Whether ``gradient_clip_val`` is set and clips by norm.
        parts_clip: How parts clip their own gradients: ``"norm"``, ``"value"``.
        norm_clipping: How to clip by norm, if given.
        norm_budget_mb: How many MiB of gradients may wait for their norm, if given.
        own_clipping: Whether the module overrides ``configure_gradient_clipping``.
        retains_graph: Whether ``LightningModule.backward`` can be called with ``retain_graph=True``.
        overflow: What an overflow under loss scaling skips, if given.
        scales: Whether a ``GradScaler`` is used.
        sparse: Name of a parameter whose gradient is sparse, or empty.
    """

    name: str
    strategy: str
    automatic: bool = True
    clips_norm: bool = False
    parts_clip: frozenset[str] = frozenset()
    norm_clipping: str | None = None
    norm_budget_mb: float | None = None
    own_clipping: bool = False
    retains_graph: bool = True
    overflow: str | None = None
    scales: bool = False
    sparse: str = ""

    @property
    def plainly(self) -> str:
        """What to type so that the optimizer is stepped after backward."""
        if not self.name.startswith("optim="):
            return f"a Trainer without {self.name}"
        base = self.name.replace("_layerwise'", "'")
        if base != self.name:
            return base
        # A row that always steps in backward is stepped after it when named by its class's path.
        row = REGISTRY.find(self.name.removeprefix("optim=").strip("'"))
        return f"optim={row.implementation!r}"

    @property
    def otherwise(self) -> str:
        """What to type instead of a strategy that averages gradients in hooks."""
        if self.strategy != "layerwise_ddp":
            return self.plainly
        plainly = f" and {self.plainly}" if self.name.startswith("optim=") else ""
        return f"Trainer(strategy='ddp'){plainly}"


# The strategies that step every optimizer during backward.
STEPPING_STRATEGIES = frozenset({"layerwise", "layerwise_ddp", "layerwise_fsdp2"})
# Those that leave gradients to an optimizer's backward hooks, and those that average gradients in the hooks.
_LEAVE_GRADIENTS = STEPPING_STRATEGIES | {"single_device", "single_xla_syncfree", "xla_syncfree"}
_AVERAGE_IN_HOOKS = frozenset({"layerwise_ddp", "xla_syncfree"})
_INSTEAD = {
    "ddp": "layerwise_ddp",
    "fused_ddp": "layerwise_ddp",
    "npu_ddp": "layerwise_ddp",
    "fsdp": "layerwise_fsdp2",
    "deepspeed": "layerwise_fsdp2",
    "fsdp2": "layerwise_fsdp2",
    "ModelParallelStrategy": "layerwise_fsdp2",
    "single_xla": "single_xla_syncfree",
    "xla": "xla_syncfree",
}


def _strategy_leaves_gradients_to_hooks(stepping: Stepping) -> str | None:
    if stepping.strategy in _LEAVE_GRADIENTS:
        return None
    instead = _INSTEAD.get(stepping.strategy)
    flag = f"strategy={instead!r}" if instead else "strategy='layerwise' (one device) or 'layerwise_ddp' (several)"
    apart = "" if stepping.strategy == "single_xla" else ", and processes would drift apart"
    return (
        f"{stepping.name} under the strategy {stepping.strategy!r}: {AFTER_BACKWARD}{apart}. Use "
        f"Trainer({flag}), or {stepping.plainly}."
    )


def _clipping_of_ones_own(stepping: Stepping) -> str | None:
    if not stepping.own_clipping:
        return None
    return (
        f"{stepping.name} together with a configure_gradient_clipping of the module's own: Lightning calls it after "
        "backward, when the gradients are stepped and gone. Remove it and set Trainer(gradient_clip_val=...), or use "
        f"{stepping.plainly}."
    )


def _manual_needs_one_process(stepping: Stepping) -> str | None:
    if stepping.automatic or stepping.strategy not in _AVERAGE_IN_HOOKS:
        return None
    return (
        f"strategy={stepping.strategy!r} with manual optimization: which backward is the one to average and to step "
        f"is not known. Use automatic optimization, or {stepping.otherwise}."
    )


def _measuring_needs_the_graph(stepping: Stepping) -> str | None:
    exact = (stepping.clips_norm and stepping.norm_clipping != "per_parameter") or "norm" in stepping.parts_clip
    measures = exact or stepping.overflow == "skip_step" or stepping.strategy in _AVERAGE_IN_HOOKS
    if stepping.retains_graph or not stepping.automatic or not measures:
        return None
    return (
        f"{stepping.name}: its first backward only measures, and the module's own backward() does not take "
        "retain_graph. Write `def backward(self, loss, *args, **kwargs): loss.backward(*args, **kwargs)`."
    )


def _norm_clipping_needs_clipping(stepping: Stepping) -> str | None:
    if stepping.norm_clipping is None or stepping.clips_norm:
        return None
    return (
        f"norm_clipping={stepping.norm_clipping!r} without Trainer(gradient_clip_val=..., "
        "gradient_clip_algorithm='norm') would be ignored. Set it, or leave norm_clipping out."
    )


def _previous_norm_is_of_all(stepping: Stepping) -> str | None:
    if stepping.norm_clipping != "previous" or not stepping.parts_clip:
        return None
    return (
        "norm_clipping='previous' with a clip of param_groups: only the norm of all gradients is kept for the next "
        "step. Use norm_clipping='exact' or 'per_parameter', or leave clip out."
    )


def _norm_budget_needs_a_measurement(stepping: Stepping) -> str | None:
    exact = (stepping.clips_norm and stepping.norm_clipping in (None, "exact")) or "norm" in stepping.parts_clip
    if stepping.norm_budget_mb is None or exact or stepping.overflow == "skip_step":
        return None
    return (
        f"norm_budget_mb={stepping.norm_budget_mb:g} would be ignored: only exact clipping by norm, "
        "Trainer(gradient_clip_val=...), and overflow='skip_step' need to know all gradients before they are stepped. "
        "Set one of them, or leave norm_budget_mb out."
    )


def _overflow_needs_a_scaler(stepping: Stepping) -> str | None:
    if stepping.overflow is None:
        return None
    if not stepping.scales:
        return (
            f"overflow={stepping.overflow!r} without a GradScaler would be ignored: only Trainer(precision='16-mixed') "
            "scales the loss. Set it, or leave overflow out."
        )
    if stepping.overflow == "skip_step" and not stepping.automatic:
        return (
            "overflow='skip_step' with manual optimization: the backward that measures first is not known. Use "
            f"automatic optimization, leave overflow out, or use {stepping.plainly}."
        )
    return None


def _sparse_gradients_are_not_averaged(stepping: Stepping) -> str | None:
    if not stepping.sparse or stepping.strategy not in _AVERAGE_IN_HOOKS:
        return None
    return (
        f"strategy={stepping.strategy!r} averages dense gradients, and {stepping.sparse!r} belongs to an embedding "
        f"with sparse=True. Create it with sparse=False, or use {stepping.otherwise}."
    )


#: By code: see lightning_optim/refusals.
LAYERWISE_RULES: Mapping[str, Callable[[Stepping], str | None]] = {
    "LO601": _strategy_leaves_gradients_to_hooks,
    "LO602": _clipping_of_ones_own,
    "LO603": _manual_needs_one_process,
    "LO604": _measuring_needs_the_graph,
    "LO605": _norm_clipping_needs_clipping,
    "LO606": _previous_norm_is_of_all,
    "LO607": _norm_budget_needs_a_measurement,
    "LO608": _overflow_needs_a_scaler,
    "LO609": _sparse_gradients_are_not_averaged,
}


def gradient_is_gone(stepping: Stepping, hook: str, parameter: str) -> str:
    """Returns the warning about a hook that looked for a gradient after its parameter was stepped."""
    return (
        f"{hook} looks at the gradient of {parameter!r} and finds None: with {stepping.name} parameters are stepped "
        "during backward and their gradients freed. Log the norm of all with log_grad_norm=True (in optim_args or in "
        f"the strategy), look at single gradients with parameter.register_hook, or use {stepping.plainly}. If {hook} "
        "needs none, gradient_readers='ignore' (in the same places) turns this off."
    )
