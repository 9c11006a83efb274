"""What is known of classes that no row describes: what they need besides gradients, and what no name can build."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_optim.errors import UnknownOptimizer
from lightning_optim.table._spec import MatrixFlag, OptimizerSpec

_USE_MUON = {"flag": MatrixFlag("use_muon", "adamw_lr", "adamw_wd")}

# Fields of the row by package and class; what derives from the class inherits them.
_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "torch.LBFGS": {
        "needs_closure": True,
        "one_group": True,
        "coupled": "LBFGS evaluates the model several times for one step over all parameters",
    },
    "torch.Muon": {"only_matrices": True},
    "pytorch_optimizer.AliG": {
        "needs_closure": True,
        "default_lr": 1.0,
        "warmup": "none",
        "note": "it computes its step from the loss, up to max_lr in optim_args; lr and schedules change nothing",
    },
    "pytorch_optimizer.BSAM": {"needs_closure": True},
    "pytorch_optimizer.SAM": {"needs_closure": True},
    "pytorch_optimizer.DeMo": {"needs_process_group": True},
    "pytorch_optimizer.DistributedMuon": {"needs_process_group": True, **_USE_MUON},
    "pytorch_optimizer.AdaHessian": {"needs_graph": True},
    "pytorch_optimizer.SophiaH": {"needs_graph": True},
    "timm.Adahessian": {"needs_graph": True},
    "pytorch_optimizer.SpectralSphere": {"only_matrices": True},
    **{f"pytorch_optimizer.{name}": _USE_MUON for name in ("AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon")},
}
# Classes that an adapter of the same name mends, and the adapters' files: those that are switched between training and
# evaluation, and others. What derives from them may do otherwise.
_SWITCHED: Mapping[str, str] = {
    f"pytorch_optimizer.{name}": "_pytorch_optimizer"
    for name in ("ScheduleFreeAdamW", "ScheduleFreeRAdam", "ScheduleFreeSGD", "SPlus")
}
_MENDED: Mapping[str, str] = {
    **_SWITCHED,
    **dict.fromkeys(("pytorch_optimizer.BSAM", "pytorch_optimizer.SAM"), "_pytorch_optimizer_sam"),
}
# Of these, those whose constructor is another than the class's.
_REBUILT = ("pytorch_optimizer.SAM",)
# Arguments that are another optimizer, or its class.
_WRAPPED = ("base_optimizer", "optimizer", "wrapped_optimizer")


def known_fields(kind: type[Optimizer], path: str, parameters: Iterable[str]) -> dict[str, Any]:
    """Returns the fields of a class's row that are known, besides those that its constructor says.

    Args:
        kind: The class.
        path: Its dotted path.
        parameters: The names of its constructor's arguments.
    """
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        found |= _FIELDS.get(_key(base), {})
    if _key(kind) in _MENDED:
        found |= {"target": _adapter(kind), "wraps": path}
    if _key(kind) in _SWITCHED:
        found |= {"averages_weights": True, "warmup": "optimizer" if "warmup_steps" in parameters else "none"}
    return found


def constructed(kind: type[Optimizer]) -> type[Optimizer]:
    """Returns the class whose constructor is called for a class, which its adapter may have replaced."""
    return pkgutil.resolve_name(_adapter(kind)) if _key(kind) in _REBUILT else kind


def refuse_unfit(name: str, kind: type[Optimizer], rows: Iterable[OptimizerSpec]) -> None:
    """Refuses classes that cannot be built from parameters and options.

    Raises:
        UnknownOptimizer: If it takes a model or another optimizer, or is switched between training and evaluation in
            a way that is not known.
    """
    parameters = inspect.signature(kind).parameters
    first = next(iter(parameters.values()), None)
    if first is not None and (first.name == "model" or first.annotation in (nn.Module, "nn.Module")):
        own = kind.__name__.lower()
        same = [row.name for row in rows if row.implementation.rpartition(".")[2].lower() == own]
        instead = f"Use optim={same[0]!r}" if same else f"Build it yourself: {kind.__name__}(module, ...)"
        raise UnknownOptimizer(
            f"optim={name!r} takes the model where optimizers take parameters. {instead}.", code="LO105"
        )
    wrapped = next((key for key in _WRAPPED if key in parameters and _key(kind) not in _MENDED), None)
    if wrapped is not None:
        raise UnknownOptimizer(
            f"optim={name!r} wraps another optimizer ({wrapped!r}), which a name and options do not build. Build it "
            "yourself, in a configure_optimizers of your own; under manual optimization if its step needs gradients "
            "from before the closure, as SAM's.",
            code="LO105",
        )
    switched = callable(getattr(kind, "train", None)) and callable(getattr(kind, "eval", None))
    if switched and _key(kind) not in _SWITCHED:
        raise UnknownOptimizer(
            f"optim={name!r} has to be switched between training and evaluation, which is known how to do without loss "
            "for some classes only. Use optim='schedule_free_adamw', 'schedule_free_radam' or 'schedule_free_sgd', or "
            "'pytorch_optimizer:splus'.",
            code="LO106",
        )


def _adapter(kind: type[Optimizer]) -> str:
    return f"lightning_optim.optimizers.adapters.{_MENDED[_key(kind)]}:{kind.__name__}"


def _key(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
