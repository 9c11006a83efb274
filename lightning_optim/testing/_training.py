"""Promises about training: it learns, follows a schedule, and steps what it is given."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LambdaLR, LinearLR

from lightning_optim.build import TrainerFacts
from lightning_optim.testing._broken import expect, expect_same, expecting
from lightning_optim.testing._subject import REFERENCE, Subject
from lightning_optim.testing._trial import Trial

_PART = r"linear[.]weight"
# RAdam does not move in its first five steps.
STEPS = 7


def trains(subject: Subject) -> None:
    """The loss falls within 20 steps."""
    trial = subject.trial()
    before = trial.evaluate()
    trial.learn(20)
    after = trial.evaluate()
    _finite(trial)
    expect(after < before, "a lower loss after 20 steps", f"it went from {before:.4f} to {after:.4f}")


def schedule(subject: Subject) -> None:
    """Under a falling learning rate the loss falls, and steps become smaller."""
    if subject.row.averages_weights:
        subject.config(lr_scheduler="linear")
    trial = subject.trial()
    before = trial.evaluate()
    trial.learn(12, LinearLR(trial.optimizer, 1.0, 0.1, 12))
    after = trial.evaluate()
    expect(after < before, "a lower loss under a linear schedule", f"it went from {before:.4f} to {after:.4f}")
    falling = subject.trial()
    drop = LambdaLR(falling.optimizer, lambda step: 1.0 if step < 3 else 0.1)
    falling.advance(range(REFERENCE - 1), schedule=drop)
    last = falling.weights()
    falling.advance([REFERENCE - 1])
    steady = _way(subject.after(REFERENCE - 1)["weights"], subject.after(REFERENCE)["weights"])
    fallen = _way(last, falling.weights())
    expect(
        fallen < 0.9 * steady,
        "smaller steps after a schedule divided the learning rate by 10",
        f"the step is {fallen / steady if steady else float('nan'):.2f} times as large as without the schedule",
    )


def groups(subject: Subject) -> None:
    """Every param group is stepped, by its own learning rate."""
    trial = subject.trial()
    start, lr = trial.weights(), trial.optimizer.param_groups[0]["lr"]
    slow = subject.trial(
        param_groups={_PART: {"lr": (float(lr) if isinstance(lr, (int, float, Tensor)) else 1e-3) / 10}}
    )
    slow.advance(range(STEPS))
    all_moved(start, slow)
    ways = [_way(start, after, "linear.weight") for after in (subject.after(STEPS)["weights"], slow.weights())]
    expect(
        ways[1] < 0.9 * ways[0],
        "smaller steps in a group with a tenth of the learning rate",
        f"they are {ways[1] / ways[0] if ways[0] else float('nan'):.2f} times as large",
    )


def missing_gradients(subject: Subject) -> None:
    """A parameter without a gradient stays as it is until it has one."""
    trial = subject.trial()
    start = trial.weights()
    trial.advance(range(1), lambda index, step: True)
    expect_same(trial.weights(), start, "no movement without any gradient")
    trial.advance(range(STEPS), lambda index, step: index % 2 == 0)
    after = trial.weights()
    for index, name in enumerate(start):
        stayed = torch.equal(start[name], after[name])
        if index % 2 == 0:
            expect(stayed, "no movement without a gradient", f"{name} moved")
        else:
            expect(not stayed or _may_stay(after[name]), "a step where there is a gradient", f"{name} stayed")
    trial.advance(range(STEPS, 2 * STEPS))
    all_moved(after, trial)


def accumulation(subject: Subject) -> None:
    """A gradient that arrives in four shares is stepped once, as the whole is."""
    trial = subject.trial(trainer=TrainerFacts(accumulates=4))
    trial.advance(range(3), micro_batches=4)
    expect_same(trial.outcome(), subject.after(3), "the same step from four backward passes as from one")


def fp16_scaling(subject: Subject) -> None:
    """Scaled losses give the same steps, and an overflow is skipped."""
    scaled = subject.trial(trainer=TrainerFacts(scales=True))
    scaler = GradScaler(subject.device.type, init_scale=1024.0)
    with expecting("steps under a GradScaler"):
        scaled.advance(range(3), scaler=scaler)
    expect_same(scaled.outcome(), subject.after(3), "the same steps from losses scaled by 1024")
    scaled.advance(range(3, 4), scaler=scaler, scale=float("inf"))
    expect_same(scaled.outcome(), subject.after(3), "an overflow to change nothing")
    expect(scaler.get_scale() == 512.0, "a scale of 512 after an overflow", f"it is {scaler.get_scale():g}")


def _way(before: Mapping[str, Tensor], after: Mapping[str, Tensor], only: str | None = None) -> float:
    names = [only] if only else list(before)
    return math.sqrt(sum(float((after[name] - before[name]).double().square().sum()) for name in names))


def _finite(trial: Trial) -> None:
    for name, weight in trial.weights().items():
        expect(bool(torch.isfinite(weight).all()), "finite parameters", f"{name} is not")


def all_moved(before: Mapping[str, Tensor], trial: Trial) -> None:
    _finite(trial)
    for name, weight in trial.weights().items():
        expect(weight.dtype is before[name].dtype, "parameters that keep their dtype", f"{name} is {weight.dtype}")
        moved = _may_stay(weight) or not torch.equal(weight, before[name])
        expect(moved, "a step of every parameter", f"{name}, of shape {tuple(weight.shape)}, stayed as it was")


def _may_stay(weight: Tensor) -> bool:
    """Whether it is empty, or a vector around 1, as those of norms are, where bfloat16 has no room for small steps."""
    return not weight.numel() or (weight.dtype is torch.bfloat16 and weight.ndim < 2)
