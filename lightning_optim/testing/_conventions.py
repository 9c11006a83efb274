"""Promises of ``torch.optim.Optimizer`` that frameworks rely on: closures and constructors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.errors import said
from lightning_optim.stepping import seed
from lightning_optim.testing._broken import BrokenPromise, expect, expect_same, expecting
from lightning_optim.testing._subject import Subject


def closure(subject: Subject) -> None:
    """``step(closure)`` runs it once, with gradients, and returns its loss.

    One whose row says that it needs the closure may run it more often.
    """
    closed = subject.trial()
    for step in range(2):
        losses: list[Tensor] = []

        def compute(step: int = step, losses: list[Tensor] = losses) -> Tensor:
            expect(torch.is_grad_enabled(), "gradients to be enabled in the closure", "they are disabled")
            closed.optimizer.zero_grad()
            loss = closed.pull(step)
            closed.backward(loss)
            losses.append(loss.detach())
            return loss

        seed(step)
        with torch.no_grad(), expecting("step(closure) to work"):
            returned = closed.optimizer.step(compute)  # type: ignore[arg-type]
        if subject.row.needs_closure:
            expect(bool(losses), "calls of the closure", "there was none")
        else:
            expect(len(losses) == 1, "one call of the closure", f"there were {len(losses)}")
        given = returned.item() if isinstance(returned, Tensor) else returned
        expect(given == losses[0].item(), "the closure's loss from step(closure)", f"it returned {given!r}")
    closed.optimizer.zero_grad()
    expect_same(closed.weights(), subject.after(2)["weights"], "the same step with a closure as without")


def constructor(subject: Subject) -> None:
    """The constructor takes what those of torch's classes take."""
    kind, arguments = subject.constructor()
    lr = arguments["lr"]
    one, other, third = (nn.Parameter(torch.ones(8, 8, device=subject.device)) for _ in range(3))
    with expecting("an iterator of parameters to be taken"):
        optimizer = kind(iter([one, other]), **arguments)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    expect(len(held) == 2 and held[0] is one and held[1] is other, "the given parameters in its groups", f"{len(held)}")
    expect("lr" in optimizer.defaults, "'lr' in its defaults", f"they are {sorted(optimizer.defaults)}")
    with expecting("(name, parameter) pairs to be taken"):
        kind([("one", one), ("other", other)], **arguments)
    with expecting("dicts as param groups to be taken"):
        optimizer = kind([{"params": [one], "lr": lr / 2}, {"params": [other]}], **arguments)
        optimizer.add_param_group({"params": [third]})
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    close = all(math.isclose(rate, asked, rel_tol=1e-6) for rate, asked in zip(rates, [lr / 2, lr, lr], strict=True))
    expect(close, f"the groups' learning rates {[lr / 2, lr, lr]}", f"they are {rates}")
    for group in optimizer.param_groups:
        absent = sorted(optimizer.defaults.keys() - group.keys())
        expect(not absent, "every default in every group", f"{absent} are missing")
    _refuses_nothing(lambda: kind([], **arguments))
    _takes_tensor(kind, arguments, subject.device)


def _refuses_nothing(build: Callable[[], Any]) -> None:
    try:
        build()
    except ValueError:
        return
    except Exception as error:
        raise BrokenPromise("a ValueError for no parameters", f"{type(error).__name__}: {said(error)}") from error
    raise BrokenPromise("a ValueError for no parameters", "they were taken")


def _takes_tensor(kind: type[Optimizer], arguments: dict[str, Any], device: torch.device) -> None:
    """``lr`` as a tensor gives the same steps and is left alone, or is refused."""
    rate, weights = torch.tensor(arguments["lr"]), []
    for lr in (arguments["lr"], rate):
        weight = nn.Parameter(torch.ones(8, 8, device=device))
        try:
            optimizer = kind([weight], **{**arguments, "lr": lr})
            if callable(getattr(optimizer, "train", None)):
                optimizer.train()  # type: ignore[attr-defined]
            for step in range(2):
                seed(step)
                weight.grad = torch.linspace(-1, 1, 64, device=device).view(8, 8)
                optimizer.step()
        except (ValueError, TypeError):
            if lr is rate:
                return
            raise
        weights.append(weight.detach())
    expect(float(rate) == float(torch.tensor(arguments["lr"])), "lr to be left as it was", f"it is now {rate}")
    gap = float((weights[0] - weights[1]).abs().max())
    expect(gap < 1e-5, "the same steps with lr as a tensor, or a ValueError", f"they differ by {gap:.3g}")
