"""Holds an optimizer to the contract, one promise after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from typing_extensions import Unpack

from lightning_optim.build import OptimizerArguments, takes_arguments
from lightning_optim.errors import IncompatibleTrainer, InvalidOption, InvalidParamGroups, UnknownOptimizer, said
from lightning_optim.stepping import undisturbed
from lightning_optim.table import OptimizerSpec
from lightning_optim.testing import _conventions, _layerwise, _parameters, _states, _training
from lightning_optim.testing._broken import BrokenPromise, NotSaid
from lightning_optim.testing._subject import Subject, subject_of

Hold = Callable[[Subject], str | None]

#: The promises by name, in the order in which they are held; each raises :class:`BrokenPromise` if it does not hold.
PROMISES: dict[str, Hold] = {
    "trains": _training.trains,
    "schedule": _training.schedule,
    "groups": _training.groups,
    "missing_gradients": _training.missing_gradients,
    "shapes": _parameters.shapes,
    "bf16_weights": _parameters.bf16_weights,
    "fp16_scaling": _training.fp16_scaling,
    "accumulation": _training.accumulation,
    "resume": _states.resume,
    "weights_only": _states.weights_only,
    "deepcopy": _states.deepcopy,
    "pickle": _states.pickled,
    "distributed_checkpoint": _states.distributed_checkpoint,
    "layerwise": _layerwise.layerwise,
    "state_bytes": _states.state_bytes,
    "closure": _conventions.closure,
    "constructor": _conventions.constructor,
}

_REFUSALS = (IncompatibleTrainer, InvalidOption, InvalidParamGroups, UnknownOptimizer)
Status = Literal["kept", "broken", "refused", "unsaid"]


@dataclass(frozen=True)
class Result:
    """What became of one promise.

    Attributes:
        promise: Its name in :data:`PROMISES`.
        status: ``"kept"``, ``"broken"``, ``"refused"`` if the optimizer's row rules it out before a step, or
            ``"unsaid"`` if the row says nothing to compare with.
        text: What was expected and what happened, the refusal, or a remark.
    """

    promise: str
    status: Status
    text: str = ""


@takes_arguments(OptimizerArguments)
def check_optimizer(optim: str | type[Optimizer] | OptimizerSpec, **arguments: Unpack[OptimizerArguments]) -> None:
    """Holds an optimizer to the contract, on small modules on this machine; returns if every promise is kept.

    What its row refuses, with a reason, is no broken promise.

    Args:
        optim: Identifier, dotted path, class or a row that need not be registered.
        **arguments: Those of :func:`lightning_optim.build_optimizer`.

    Raises:
        BrokenPromise: For the first promise that does not hold; the text says which, what was expected and what
            happened.
        UnknownOptimizer, MissingDependency, InvalidOption, IncompatibleTrainer: If it cannot be built at all.

    Example:
        >>> import torch
        >>> from lightning_optim.testing import check_optimizer
        >>> check_optimizer(torch.optim.NAdam, weight_decay=0.1)
    """
    for _ in held(optim, arguments, _raise):
        pass


@takes_arguments(OptimizerArguments)
def check_results(
    optim: str | type[Optimizer] | OptimizerSpec, **arguments: Unpack[OptimizerArguments]
) -> dict[str, Result]:
    """Returns what becomes of every promise, by its name; see :func:`check_optimizer`.

    Args:
        optim: Identifier, dotted path, class or a row that need not be registered.
        **arguments: Those of :func:`lightning_optim.build_optimizer`.

    Raises:
        UnknownOptimizer, MissingDependency, InvalidOption, IncompatibleTrainer: If it cannot be built at all.
    """
    return {result.promise: result for result in held(optim, arguments)}


def held(
    optim: str | type[Optimizer] | OptimizerSpec,
    arguments: OptimizerArguments,
    broken: Callable[[BrokenPromise], None] = lambda error: None,
    promises: Iterable[str] = tuple(PROMISES),
) -> Iterator[Result]:
    """Yields what becomes of each promise; ``broken`` is told of those that do not hold."""
    with subject_of(optim, arguments) as subject, undisturbed():
        subject.build(subject.module())
        for name in promises:
            result, error = _hold(name, subject)
            if error is not None:
                broken(error)
            yield result


def _hold(name: str, subject: Subject) -> tuple[Result, BrokenPromise | None]:
    try:
        return Result(name, "kept", PROMISES[name](subject) or ""), None
    except BrokenPromise as error:
        found = BrokenPromise(error.expected, error.happened, subject.name, name)
        found.__cause__ = error.__cause__ or error
    except NotSaid as error:
        return Result(name, "unsaid", str(error)), None
    except _REFUSALS as error:
        return Result(name, "refused", said(error)), None
    except Exception as error:  # whatever a class does
        found = BrokenPromise("no error", f"{type(error).__name__}: {said(error)}", subject.name, name)
        found.__cause__ = error
    return Result(name, "broken", f"expected {found.expected}; {found.happened}"), found


def _raise(error: BrokenPromise) -> None:
    raise error
