"""A class that nobody vouches for is asked whether it couples its parameters, before it is stepped during backward.

The classes here have the faults of published ones, which ``make test-collections`` tries themselves.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from lightning_optim import IncompatibleTrainer, Layerwise, build_optimizer
from lightning_optim.layerwise import Probe, probe
from tests.models import ForeignTokens, loader, trainer

HERE = "tests.layerwise.test_probe"


class Descent(Optimizer):
    """Plain gradient descent; what its subclasses do is their fault."""

    steps = 0

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0, limit: float | None = 1.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "limit": limit})
        self.rng = random.Random(1)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        type(self).steps += 1
        self.look()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, self.state[parameter], group)

    def look(self) -> None:
        pass

    def gradients(self) -> list[Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(group["lr"] * gradient)


class ClipsAll(Descent):
    """As timm's Lamb and pytorch_optimizer's AdaGC."""

    def look(self) -> None:
        gradients, limit = self.gradients(), self.defaults["limit"]
        norm = torch.nn.utils.get_total_norm(gradients)
        for gradient in gradients if limit is not None and norm > limit else ():
            gradient.mul_(limit / norm)


class DecaysByTheMean(Descent):
    """As pytorch_optimizer's AdamS, and Adai in all its steps."""

    def look(self) -> None:
        # In a list: a number among the attributes would show by itself.
        self.mean = [torch.cat([gradient.flatten() for gradient in self.gradients()]).square().mean().sqrt()]

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.mul_(1 - group["lr"] * group["weight_decay"] / self.mean[0])
        super().update(parameter, gradient, state, group)


class CountsInItsState(Descent):
    """As pytorch_optimizer's MADGRAD and SPAM."""

    def look(self) -> None:
        self.state["k"] = self.state.get("k", 0) + 1  # type: ignore[index]


class StartsAtRandom(Descent):
    """As pytorch_optimizer's Gravity."""

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "velocity" not in state:
            state["velocity"] = torch.randn_like(parameter)
        state["velocity"].lerp_(gradient, 0.1)
        parameter.sub_(group["lr"] * state["velocity"])


class DecidesAtRandom(Descent):
    """Once in a step, by numbers of its own; as both Kron do."""

    def look(self) -> None:
        self.factor = [1 + self.rng.random()]

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(group["lr"] * gradient * self.factor[0])


class StepsStacks(Descent):
    """Rounds a stack of equal shapes otherwise than each by itself, as batched algorithms do."""

    def look(self) -> None:
        self.several = len(self.gradients()) > 1

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(group["lr"] * gradient * (1 + 3e-7 * self.several))


class KeepsBooks(Descent):
    """As heavyball: how much a group holds, which it does not read, and a counter with its first parameter."""

    def look(self) -> None:
        for group in self.param_groups:
            stepped = [p for p in group["params"] if p.grad is not None]
            group.setdefault("held", sum(p.numel() for p in group["params"]))
            group["count"] = group.get("count", 0) + 1
            if stepped:
                self.state[stepped[0]]["count"] = group["count"]

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(group["lr"] / group["count"] * gradient)


class ReadsItsBooks(KeepsBooks):
    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(group["lr"] / group["held"] * gradient)


class SumsUp(Descent):
    """As pytorch_optimizer's DAdaptLion: an estimate that moves late, in a key that groups do not begin with."""

    def look(self) -> None:
        for group in self.param_groups:
            norms = (float(p.grad.abs().sum()) for p in group["params"] if p.grad is not None)
            group["total"] = group.get("total", 0.0) + sum(norms)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(group["lr"] * gradient * max(1.0, group["total"] / 1e4))


class AddsNoise(Descent):
    """As heavyball's PSGDPRO for small parameters: what it draws hardly matters."""

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(group["lr"] * (gradient + 1e-6 * torch.randn_like(gradient)))


class CountsWithTheFirst(Descent):
    """Keeps the counter of a group with its first parameter alone."""

    def look(self) -> None:
        self.counts = []
        for group in self.param_groups:
            state = self.state[next(p for p in group["params"] if p.grad is not None)]
            state["count"] = state.get("count", 0) + 1
            self.counts.append(state["count"])

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(group["lr"] / self.counts[0] * gradient)


class WaitsForAll(Descent):
    """As heavyball's ADOPT: while one is new, none of its group is stepped."""

    def look(self) -> None:
        stepped = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.waits = any(p not in self.state for p in stepped)
        for parameter in stepped:
            self.state[parameter]["seen"] = 1

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(group["lr"] * gradient * (0.0 if self.waits else 1.0))


class NeedsAClosure(Descent):
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is None:
            raise RuntimeError("a closure is needed")
        return super().step()


def made(kind: type[Descent], **arguments: Any) -> Descent:
    return kind(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).parameters(), **arguments)


@pytest.mark.parametrize("kind", [Descent, StepsStacks])
def test_what_steps_each_parameter_on_its_own_passes(kind: type[Descent]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Layerwise(made(kind))
    assert probe(made(kind)).verdict == "alone"


COUPLED = [
    (ClipsAll, {}, "moves otherwise when others are stepped with it"),
    (DecaysByTheMean, {"weight_decay": 0.1}, "moves otherwise when others are stepped with it"),
    (CountsInItsState, {}, "the state holds 'k' for all parameters together, which every part would advance"),
    (SumsUp, {}, "SumsUp computed different values of 'total' for the parts of one step"),
    (ReadsItsBooks, {}, "moves otherwise when others are stepped with it"),
    (CountsWithTheFirst, {}, "the state of a parameter holds what others need, too, which parts do not find"),
    (WaitsForAll, {}, "moves otherwise when others have their first gradient later"),
]


@pytest.mark.parametrize(("kind", "arguments", "reason"), COUPLED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_couples_is_refused_by_every_way_in(kind: type[Descent], arguments: dict[str, Any], reason: str) -> None:
    class Theirs(ForeignTokens):
        def configure_optimizers(self) -> Optimizer:
            return kind(self.parameters(), **arguments)

    ways = (
        lambda: Layerwise(made(kind, **arguments)),
        lambda: build_optimizer(nn.Linear(4, 4), f"{HERE}.{kind.__name__}_layerwise", **arguments),
        lambda: trainer(max_steps=1, strategy="layerwise").fit(Theirs(), loader()),
    )
    for way in ways:
        with pytest.raises(IncompatibleTrainer) as error:
            way()
        text = error.value.text
        assert text.startswith(f"{kind.__name__} cannot be stepped layer by layer")
        assert reason in text
        assert text.endswith("Use it plainly.")


def test_books_that_no_number_depends_on_are_kept_by_parts() -> None:
    assert probe(made(KeepsBooks)) == Probe("alone", private=frozenset({"held"}))

    def train(layerwise: int, other: int) -> tuple[Descent, list[Tensor]]:
        """Takes three steps in one form, and three in the other, which has read the first's state dict."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        optimizer = KeepsBooks(model.parameters())
        for form in (layerwise, other):
            resumed = KeepsBooks(model.parameters())
            resumed.load_state_dict(optimizer.state_dict())
            optimizer = resumed
            engine = Layerwise(optimizer) if form else None
            for step in range(3):
                generator = torch.Generator().manual_seed(step)
                loss = model(torch.randn(8, 4, generator=generator)).square().mean()
                if engine is not None:
                    engine.backward(loss)
                else:
                    loss.backward()
                    optimizer.step()
                optimizer.zero_grad()
        return optimizer, [parameter.detach() for parameter in model.parameters()]

    _, plain = train(0, 0)
    for forms in ((0, 1), (1, 0), (1, 1)):
        optimizer, weights = train(*forms)
        assert all(map(torch.equal, weights, plain)), forms
        assert optimizer.param_groups[0]["count"] == 6
        # Of the whole, or of none.
        assert optimizer.param_groups[0].get("held") == (None if forms == (1, 1) else 4 * 8 + 8 + 8 * 4 + 4)


@pytest.mark.parametrize(("kind", "arguments"), [(ClipsAll, {"limit": None}), (DecaysByTheMean, {})])
def test_the_options_decide(kind: type[Descent], arguments: dict[str, Any]) -> None:
    Layerwise(made(kind, **arguments))


def test_a_learning_rate_that_begins_at_zero_hides_nothing() -> None:
    with pytest.raises(IncompatibleTrainer, match="ClipsAll cannot be stepped"):
        Layerwise(made(ClipsAll, lr=0.0))


def test_a_small_weight_decay_hides_nothing() -> None:
    """Ranger21's decay of 1e-4 depends on all parameters."""
    assert probe(made(DecaysByTheMean, weight_decay=1e-6)).verdict == "coupled"


@pytest.mark.parametrize("kind", [StartsAtRandom, DecidesAtRandom, AddsNoise])
def test_random_numbers_are_told_from_coupling_and_said_once(kind: type[Descent]) -> None:
    assert probe(made(kind)).verdict == "random"
    with pytest.warns(UserWarning, match=f"{kind.__name__} draws random numbers while it steps"):
        Layerwise(made(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Layerwise(made(kind))


def test_it_asks_once_for_the_same_settings_in_a_process() -> None:
    class Asked(Descent):
        pass

    for arguments, asked in (({}, True), ({}, False), ({"lr": 0.5}, False), ({"weight_decay": 0.1}, True)):
        before = Asked.steps
        Layerwise(made(Asked, **arguments))
        assert (Asked.steps > before) == asked


def test_what_cannot_be_asked_is_not_refused() -> None:
    found = probe(made(NeedsAClosure))
    assert (found.verdict, found.reason) == ("unknown", "RuntimeError: a closure is needed")
    Layerwise(made(NeedsAClosure))
    with FakeTensorMode():
        assert probe(made(ClipsAll)).verdict == "unknown"


def test_the_optimizer_and_the_program_are_left_alone() -> None:
    optimizer = made(DecidesAtRandom)
    drawn = optimizer.rng.getstate(), random.getstate(), torch.random.get_rng_state()
    groups, parameters = repr(optimizer.param_groups), [p.clone() for p in optimizer.param_groups[0]["params"]]
    probe(optimizer)
    assert drawn[:2] == (optimizer.rng.getstate(), random.getstate())
    assert torch.equal(drawn[2], torch.random.get_rng_state())
    assert (repr(optimizer.param_groups), dict(optimizer.state)) == (groups, {})
    assert all(map(torch.equal, parameters, optimizer.param_groups[0]["params"]))
    assert "factor" not in vars(optimizer)
