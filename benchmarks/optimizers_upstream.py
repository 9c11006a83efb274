"""The optimizers that ``optimizers.py`` compares: ours and those of the packages they stand in for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.build import measured_bytes
from lightning_optim.layerwise._engine import Layerwise
from lightning_optim.optimizers._projection import find_bases
from lightning_optim.stepping import alone

LR = 1e-3
NEVER = 10**9  # steps between two projections: the first step, which is not timed, finds the only ones
DISTRIBUTIONS = {"apollo_torch": "apollo-torch", "galore_torch": "galore-torch", "lomo_optim": "lomo-optim"}


@dataclass(frozen=True)
class Load:
    """Square matrices to step, whose gradients stay the same, and the rank to project them to."""

    count: int
    side: int
    rank: int
    gradients: list[Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        gradients = [torch.randn(self.side, self.side, generator=generator) for _ in range(self.count)]
        object.__setattr__(self, "gradients", gradients)

    def __str__(self) -> str:
        matrices = "one matrix" if self.count == 1 else f"{self.count} matrices"
        return f"{matrices} of {self.side}x{self.side}, rank {self.rank}"

    def parameters(self) -> list[nn.Parameter]:
        """Returns new parameters without gradients."""
        return [nn.Parameter(torch.ones_like(gradient)) for gradient in self.gradients]


@dataclass(frozen=True)
class Running:
    """An optimizer at work and what takes a step with it."""

    optimizer: Optimizer
    step: Callable[[], object]

    def state_bytes(self) -> int:
        """Returns the bytes of its state, wherever it keeps it: grokadamw in the groups, lomo-optim in attributes."""
        attributes = {name: value for name, value in vars(self.optimizer).items() if name.startswith("exp_avg")}
        groups = [group.get("state") for group in self.optimizer.param_groups]
        return measured_bytes({"state": _as_dicts([self.optimizer.state, groups, attributes])})


Builder = Callable[[Load], Running]
Make = Callable[[list[nn.Parameter], int], Optimizer]  # of parameters and a rank


@dataclass(frozen=True)
class Pair:
    """One of our optimizers and the upstream one."""

    name: str
    module: str  # of ours
    ours: Builder
    package: str = ""  # that has the upstream one
    upstream: Builder | None = None
    remark: str = ""  # why there is no upstream one
    needs: str = ""  # package without which ours cannot be measured
    backward: bool = False  # whether a step includes the backward

    @property
    def upstream_module(self) -> str:
        """What a user imports; transformers alone imports next to nothing."""
        return "transformers.optimization" if self.package == "transformers" else self.package

    def note(self) -> str:
        """Returns which package ours is compared with, or why it is not."""
        for package in filter(None, (self.needs, self.package)):
            if not find_spec(package):
                return f"left out: pip install {distribution(package)}"
        return distribution(self.package) if self.package else self.remark

    def builders(self) -> Iterator[tuple[str, Builder]]:
        """Yields what can be measured here, as ``"ours"`` and ``"upstream"``."""
        if not self.needs or find_spec(self.needs):
            yield "ours", self.ours
        if self.upstream is not None and find_spec(self.package):
            yield "upstream", self.upstream


def distribution(package: str) -> str:
    """Returns what pip calls a package."""
    return DISTRIBUTIONS.get(package, package)


def pairs() -> list[Pair]:
    """Returns all that are compared."""
    own = "lightning_optim.optimizers."
    galore: dict[str, Any] = {"scale": 0.25, "proj_type": "std"}
    apollo: dict[str, Any] = {"scale": 1.0, "proj_type": "std", "proj": "random", "scale_type": "channel"}
    absolute: dict[str, Any] = {"scale_parameter": False, "relative_step": False}

    return [
        Pair(
            "GaLoreAdamW",
            f"{own}galore",
            after_backward(make(f"{own}galore:GaLoreAdamW", galore)),
            "galore_torch",
            after_backward(make("galore_torch:GaLoreAdamW", galore, no_deprecation_warning=True), give_bases),
        ),
        Pair(
            "GaLoreAdamW8bit",
            "lightning_optim.optimizers.adapters._galore",
            after_backward(make("lightning_optim.optimizers.adapters._galore:GaLoreAdamW8bit", galore)),
            remark="galore-torch's needs CUDA",
            needs="bitsandbytes",
        ),
        Pair(
            "GaLoreAdafactor",
            f"{own}galore_adafactor",
            after_backward(make(f"{own}galore_adafactor:GaLoreAdafactor", galore, **absolute)),
            "galore_torch",
            after_backward(make("galore_torch:GaLoreAdafactor", galore, **absolute), give_bases),
        ),
        Pair(
            "ApolloAdamW",
            f"{own}apollo",
            after_backward(make(f"{own}apollo:ApolloAdamW", apollo)),
            "apollo_torch",
            after_backward(make("apollo_torch:APOLLOAdamW", apollo)),
        ),
        Pair(
            "Adafactor",
            f"{own}adafactor",
            after_backward(make(f"{own}adafactor:Adafactor", **absolute)),
            "transformers",
            after_backward(make("transformers.optimization:Adafactor", **absolute)),
        ),
        Pair(
            "GrokAdamW",
            f"{own}grokadamw",
            after_backward(make(f"{own}grokadamw:GrokAdamW")),
            "grokadamw",
            # Ours does not clip.
            after_backward(make("grokadamw:GrokAdamW", gradient_clipping=0.0)),
        ),
        Pair(
            "AnyPrecisionAdamW",
            f"{own}anyprecision",
            after_backward(make(f"{own}anyprecision:AnyPrecisionAdamW")),
            remark="torchdistx cannot be installed",
        ),
        Pair(
            "LOMO",
            f"{own}lomo",
            in_backward(make(f"{own}lomo:LOMO"), layerwise),
            "lomo_optim",
            in_backward(make_lomo("Lomo"), fused),
            backward=True,
        ),
        Pair(
            "AdaLomo",
            f"{own}adalomo",
            in_backward(make(f"{own}adalomo:AdaLomo"), layerwise),
            "lomo_optim",
            in_backward(make_lomo("AdaLomo", loss_scale=0), fused),  # ours does not scale the loss
            backward=True,
        ),
    ]


# How optimizers are made.


def make(target: str, projection: dict[str, Any] | None = None, **options: Any) -> Make:
    """Makes an optimizer of a ``module:Class`` that is imported when needed.

    Args:
        target: The class.
        projection: Options of a projected group besides the rank; ``None`` if the optimizer does not project.
        **options: Arguments of the class.
    """

    def build(parameters: list[nn.Parameter], rank: int) -> Optimizer:
        module, _, name = target.partition(":")
        projected = {} if projection is None else {"rank": rank, "update_proj_gap": NEVER, **projection}
        optimizer: Optimizer = getattr(import_module(module), name)(
            [{"params": parameters, **projected}], LR, **options
        )
        return optimizer

    return build


def make_lomo(name: str, **options: Any) -> Make:
    """Makes an optimizer of lomo-optim, which takes a model and puts its state on a GPU."""

    def build(parameters: list[nn.Parameter], rank: int) -> Optimizer:
        cls = getattr(import_module("lomo_optim"), name)
        with mock.patch.object(Tensor, "cuda", lambda tensor: tensor):
            optimizer: Optimizer = cls(nn.ParameterList(parameters), LR, **options)
        return optimizer

    return build


def give_bases(optimizer: Optimizer, load: Load) -> None:
    """Gives galore-torch the projections that we find: its own take one exact decomposition per matrix."""
    projector_class = import_module("galore_torch.galore_projector").GaLoreProjector
    (group,) = optimizer.param_groups
    for parameter, gradient in zip(group["params"], load.gradients, strict=True):
        basis = alone(find_bases(gradient, load.rank, "randomized"))["right"]
        projector = projector_class(load.rank, update_proj_gap=NEVER, scale=group["scale"])
        projector.ortho_matrix = basis.mT.contiguous()
        optimizer.state[parameter].update(step=1, projector=projector)  # at step 0 it would find its own


def adamw(backward: bool) -> Builder:
    """Returns what all are held against, with the backward or without."""
    plain = make("torch.optim:AdamW", foreach=True)
    return in_backward(plain, plainly) if backward else after_backward(plain)


# How they step.


def after_backward(build: Make, prepare: Callable[[Optimizer, Load], None] = lambda *_: None) -> Builder:
    """Steps gradients that are there already; ``prepare`` may change the optimizer before its first step."""

    def start(load: Load) -> Running:
        parameters = load.parameters()
        for parameter, gradient in zip(parameters, load.gradients, strict=True):
            parameter.grad = gradient
        optimizer = build(parameters, load.rank)
        prepare(optimizer, load)
        return Running(optimizer, optimizer.step)

    return start


def in_backward(build: Make, attach: Callable[[Optimizer], Callable[[Tensor], object]]) -> Builder:
    """Runs the backward of a loss and steps, with the function that ``attach`` returns."""

    def start(load: Load) -> Running:
        parameters = load.parameters()
        optimizer = build(parameters, load.rank)
        run, loss = attach(optimizer), cast(Any, GivenGradients.apply)
        return Running(optimizer, lambda: run(loss(load.gradients, *parameters)))

    return start


class GivenGradients(torch.autograd.Function):
    """A loss whose gradients are known, so that its backward takes no time of its own."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        return None, *ctx.gradients


def plainly(optimizer: Optimizer) -> Callable[[Tensor], object]:
    """Steps when backward is over."""

    def run(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def layerwise(optimizer: Optimizer) -> Callable[[Tensor], object]:
    """Steps during backward, as our engine does."""
    return Layerwise(optimizer).backward


def fused(optimizer: Any) -> Callable[[Tensor], object]:
    """Steps during backward, as lomo-optim does in its hooks."""
    return partial(optimizer.fused_backward, lr=LR)


def _as_dicts(value: Any) -> Any:
    """Returns nested containers and objects such as projectors as dicts."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    elif not isinstance(value, dict):
        value = getattr(value, "__dict__", None)
    return None if value is None else {key: _as_dicts(item) for key, item in value.items()}
