"""The arguments of a request, with their types, defaults and help texts.

A new one is a field of :class:`Arguments` and a line in a ``TypedDict`` below it: type checkers cannot derive one from
the other. :func:`takes_arguments` and the command line read the fields. Only ``OptimMixin.__init__`` repeats them:
Lightning looks up every parameter of a module's signature among the local variables of its frame.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypedDict, TypeVar, get_type_hints

from lightning_optim.groups import TargetModules

T = TypeVar("T")


def _argument(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Arguments:
    """The arguments of a request, not yet checked."""

    optim: str = _argument("adamw_torch", "Identifier, alias or dotted path; ``lightning-optim list`` shows them.")
    lr: float | None = _argument(None, "Learning rate; ``None`` takes the row's default.")
    weight_decay: float | None = _argument(
        None,
        "Weight decay of the parameters that decay (not biases, norms and others with fewer than two dimensions); "
        "``None`` takes the row's default.",
    )
    optim_args: Mapping[str, Any] | str | None = _argument(
        None, 'The row\'s options, a mapping or ``"name=value,..."``; ``lightning-optim info NAME`` shows them.'
    )
    optim_target_modules: TargetModules = _argument(
        None,
        'Modules whose weights are projected, for optimizers that project: ``"all-linear"``, a regular expression over '
        'names, or a list of parts of names; ``None`` means ``"all-linear"``.',
    )
    param_groups: Mapping[str, Mapping[str, Any]] | None = _argument(
        None, "Hyperparameters by regular expression over parameter names; the first match wins."
    )
    layer_decay: float | None = _argument(None, "The learning rate is multiplied by this once per layer below the top.")
    layer_pattern: str | None = _argument(
        None, "Regular expression whose one group is a layer's number; ``None`` finds the layers."
    )
    lr_scheduler: str | None = _argument(
        None,
        'Name of the learning-rate schedule; ``None`` for none, ``"module"`` for the one that the module\'s own '
        "``configure_optimizers`` makes, at its learning rate unless ``lr`` is given.",
    )
    lr_scheduler_args: Mapping[str, Any] | str | None = _argument(
        None, 'Options of the schedule, a mapping or ``"name=value,..."``.'
    )
    warmup_steps: int | float = _argument(0, "Optimizer steps of warm-up, or a fraction of the training below 1.")
    optim_fallback: bool = _argument(
        False,
        "Whether the nearest identifier that can run here takes the place of one that cannot, with a warning; "
        "``optim`` is saved as it was given.",
    )
    override_on_resume: Sequence[str] | str | None = _argument(
        None,
        "Names of arguments and options whose values win over those of the checkpoint that training goes on from, such "
        'as ``["lr", "weight_decay", "betas", "lr_scheduler"]``; all others come from there.',
    )


class OptimizerArguments(TypedDict, total=False):
    """What a named optimizer takes."""

    lr: float | None
    weight_decay: float | None
    optim_args: Mapping[str, Any] | str | None
    optim_target_modules: TargetModules
    param_groups: Mapping[str, Mapping[str, Any]] | None
    layer_decay: float | None
    layer_pattern: str | None
    warmup_steps: int | float
    optim_fallback: bool
    override_on_resume: Sequence[str] | str | None


class Companions(OptimizerArguments, total=False):
    """What a named optimizer takes where its schedule is made as well."""

    lr_scheduler: str | None
    lr_scheduler_args: Mapping[str, Any] | str | None


class OptimArguments(Companions, total=False):
    """What ``**optim`` collects. With it type checkers find a misspelt name or a wrong type where a module is made.

    Example::

        class LitModel(OptimMixin, L.LightningModule):
            def __init__(self, width: int = 256, **optim: Unpack[OptimArguments]) -> None:
                super().__init__(**optim)

    :class:`~lightning_optim.OptimMixin` explains the arguments.
    """

    optim: str


class Argument(NamedTuple):
    """An argument of a request; ``help`` is one sentence of reStructuredText."""

    name: str
    type: Any
    default: Any
    help: str


_TYPES = get_type_hints(Arguments)
ARGUMENTS: Mapping[str, Argument] = {
    one.name: Argument(one.name, _TYPES[one.name], one.default, one.metadata["help"]) for one in fields(Arguments)
}


def takes_arguments(kind: type | None = None) -> Callable[[T], T]:
    """Makes the arguments that a function collects visible at run time: to ``inspect``, ``help``, jsonargparse, Sphinx.

    Args:
        kind: The ``TypedDict`` of the function's ``**``, which the arguments replace in its signature and its docstring
            (for ``__init__``, the class's). ``None`` for a class whose signature already has them: only its docstring
            gets them, before ``**kwargs``.
    """

    def decorate(target: T) -> T:
        subject: Any = target
        names = ARGUMENTS if kind is None else kind.__annotations__
        taken = [argument for name, argument in ARGUMENTS.items() if name in names]
        if kind is not None:
            _sign(vars(subject)["__init__"] if isinstance(subject, type) else subject, taken)
        if subject.__doc__:
            subject.__doc__ = _document(subject.__doc__, taken, replace=kind is not None)
        return target

    return decorate


def _sign(function: Any, taken: Sequence[Argument]) -> None:
    signature = inspect.signature(function)
    *own, _ = signature.parameters.values()
    added = [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type)
        for one in taken
    ]
    function.__signature__ = signature.replace(parameters=[*own, *added])


def _document(text: str, taken: Sequence[Argument], replace: bool) -> str:
    collector = re.search(r"^( +)\*\*\w+:.*\n", text, re.MULTILINE)
    assert collector, "a line for the arguments that are collected"
    entries = "".join(f"{collector[1]}{one.name}: {one.help}\n" for one in taken)
    return text[: collector.start()] + entries + text[collector.end() if replace else collector.start() :]
