"""What is held to the contract, and how it is built."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_optim.build import OptimConfig, ResolvedOptimizer, TrainerFacts, constructor_arguments, resolve
from lightning_optim.errors import InvalidOption
from lightning_optim.stepping import seed
from lightning_optim.table import REGISTRY, OptimizerSpec
from lightning_optim.testing._trial import Tokens, Trial

#: Steps of the training that others are compared with.
REFERENCE = 8


@dataclass(frozen=True)
class Subject:
    """An optimizer by name, with the arguments to build it.

    Attributes:
        name: Identifier or dotted path.
        arguments: Those of :func:`lightning_optim.build_optimizer`.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    _outcomes: dict[int, dict[str, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def row(self) -> OptimizerSpec:
        """What the table knows of it."""
        return REGISTRY.find(self.name)

    @property
    def device(self) -> torch.device:
        """The device to try it on: the CPU if it runs there, or else this machine's accelerator."""
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is not None and not self.row.runs_on({"cpu"}) and self.row.runs_on({accelerator.type}):
            return accelerator
        return torch.device("cpu")

    def config(self, **arguments: Any) -> OptimConfig:
        """Returns the request, with further arguments."""
        return OptimConfig(optim=self.name, **{**self.arguments, **arguments})

    def module(self, kind: type[nn.Module] = Tokens, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Returns a new module, the same every time."""
        seed(0)
        return kind().to(self.device, dtype)

    def resolve(self, module: nn.Module, *, trainer: TrainerFacts | None = None, **arguments: Any) -> ResolvedOptimizer:
        """Builds the optimizer of a module, and says how."""
        return resolve(module, self.config(**arguments), trainer=trainer)

    def build(self, module: nn.Module, **arguments: Any) -> Optimizer:
        """Builds the optimizer of a module."""
        return self.resolve(module, **arguments).optimizer

    def trial(
        self,
        kind: type[nn.Module] = Tokens,
        dtype: torch.dtype = torch.float32,
        *,
        trainer: TrainerFacts | None = None,
        **arguments: Any,
    ) -> Trial:
        """Returns a new training, the same every time; what a Trainer's ``trainer`` rules out is refused."""
        module = self.module(kind, dtype)
        return self.training(module, self.resolve(module, trainer=trainer, **arguments).optimizer)

    def training(self, module: nn.Module, optimizer: Optimizer) -> Trial:
        """Returns a training of a module by an optimizer of this row."""
        row = self.row
        return Trial(module, optimizer, closes=row.needs_closure, makes_graphs=row.needs_graph)

    def after(self, steps: int) -> dict[str, Any]:
        """Returns what an uninterrupted training leaves behind after so many steps; it runs once for all promises."""
        if steps not in self._outcomes:
            trial = self.trial()
            for step in range(max(steps, REFERENCE)):
                trial.advance([step])
                self._outcomes[step + 1] = copy.deepcopy(trial.outcome())
        return self._outcomes[steps]

    def constructor(self) -> tuple[type[Optimizer], dict[str, Any]]:
        """Returns the class and the arguments that it is built with."""
        resolved = self.resolve(self.module())
        arguments = constructor_arguments(resolved.spec, resolved.options, resolved.lr, resolved.weight_decay)
        return resolved.spec.load(), arguments


@contextmanager
def subject_of(optim: str | type[Optimizer] | OptimizerSpec, arguments: Mapping[str, Any]) -> Iterator[Subject]:
    """Yields the subject that ``optim`` names; a row is an identifier meanwhile.

    Raises:
        UnknownOptimizer, MissingDependency: If nothing has that name.
        InvalidOption: If it is something else, or a class that has no dotted path.
    """
    if isinstance(optim, OptimizerSpec):
        with REGISTRY.knowing(optim):
            yield Subject(optim.name, arguments)
        return
    if isinstance(optim, type) and issubclass(optim, Optimizer):
        path = f"{optim.__module__}.{optim.__qualname__}"
        if getattr(sys.modules.get(optim.__module__), optim.__qualname__, None) is not optim:
            raise InvalidOption(
                f"{path} cannot be found by this path, which pickles and checkpoints need too. Define the class at the "
                "top level of a module.",
                code="LO103",
            )
        optim = path
    if not isinstance(optim, str):
        raise InvalidOption(
            f"an identifier, a dotted path, a class or a row can be checked, got {optim!r}", code="LO910"
        )
    REGISTRY.find(optim)
    yield Subject(optim, arguments)
