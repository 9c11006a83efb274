"""Pairs of optimizers as one: requests and fits that tests in one process and in two share, and the loop by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import get_scheduler

from tests.cases import BY_NAME, Case
from tests.models import LitTokens, TokenModel, fp16_mixed, loader, trainer
from tests.processes import EVERY

# Two epochs of nine batches, two a step: the last step of an epoch has one.
STEPS, BATCHES, ACCUMULATED = 10, 9, 2
DECAY, WARMUP = 0.1, 2
PATTERN = "model[.](embedding|head)[.].*"
# The main optimizer, and that of embedding and head; each provider beside others, in both places.
PAIRS = (
    ("sgd", "adamw_torch"),
    ("adamw_torch", "sgd"),
    ("adamw_torch_fused", "rmsprop"),
    ("soap", "adamw_torch_fused"),
    ("muon", "lion_8bit"),
    ("galore_adamw", "adamw_8bit"),
    ("galore_adamw_8bit", "lion_8bit"),
    ("lion_32bit", "adafactor"),
    ("apollo_adamw", "adamw_torch_8bit"),
    ("adamw_torch_4bit", "adagrad"),
    ("schedule_free_adamw", "sgd"),
    ("ademamix_8bit", "schedule_free_sgd"),
    ("schedule_free_radam", "schedule_free_adamw"),
    ("adafactor", "stable_adamw"),
    ("grokadamw", "adamw_anyprecision"),
    ("rmsprop_bnb_8bit", "galore_adafactor"),
    ("prodigy", "lamb"),
)
# What torchao compiles takes seconds in each process; its rows are stepped like any other.
ON_TWO_RANKS = tuple(pair for pair in PAIRS if not any(BY_NAME[name].upstream.startswith("torchao") for name in pair))
if not EVERY:
    _mains = ("sgd", "soap", "muon", "galore_adamw_8bit", "prodigy")
    ON_TWO_RANKS = tuple(pair for pair in ON_TWO_RANKS if pair[0] in _mains)
CLIPPING = {
    "value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "norm": {"gradient_clip_val": 0.3, "gradient_clip_algorithm": "norm"},
}
# The step in which, under a scaler, the gradient of one parameter overflows, on the last rank.
_OVERFLOWS = 2


def steps_in_backward(main: str, other: str) -> bool:
    """Returns whether a pair can."""
    return not (BY_NAME[main].row.coupled or BY_NAME[other].row.coupled)


def request(main: str, other: str, form: str = "", scaled: bool = False, **changes: Any) -> dict[str, Any]:
    """Returns the arguments of a module whose embedding and head are another optimizer's, with its own schedule."""
    case, part = BY_NAME[main], BY_NAME[other]
    own = {"optim": other, "lr": part.lr, "weight_decay": DECAY, **part.options}
    if part.schedule:
        own |= {"lr_scheduler": "cosine", "warmup_steps": WARMUP}
    elif part.row.warmup == "optimizer":
        own |= {"warmup_steps": WARMUP}
    asked = {
        "optim": main + form,
        "lr": case.lr,
        "weight_decay": DECAY,
        "optim_args": {**case.options, **({"overflow": "skip_step"} if scaled and form else {})},
        "param_groups": {PATTERN: own},
        "lr_scheduler": case.schedule,
        "warmup_steps": WARMUP if case.row.warmup == "optimizer" else 0,
    }
    return {**asked, **changes}


class Overflowing(LitTokens):
    """The gradient of the head's bias overflows once, on the last rank."""

    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        self.model.head.bias.register_hook(self._overflow)

    def _overflow(self, gradient: Tensor) -> Tensor:
        is_last = self.trainer.global_rank == self.trainer.world_size - 1
        return gradient * float("inf") if is_last and self.trainer.global_step == _OVERFLOWS else gradient


def fit(
    asked: dict[str, Any],
    clipping: str = "value",
    directory: Path | None = None,
    resume: Path | None = None,
    scaled: bool = False,
    rank: int = 0,
    callbacks: Sequence[Callback] = (),
    **flags: Any,
) -> LitTokens:
    """Trains two epochs; ``directory`` gets a checkpoint of step 5; each rank has batches of its own."""
    torch.manual_seed(0)
    model = (Overflowing if scaled else LitTokens)(**asked)
    saver = [ModelCheckpoint(directory, filename="{step}", every_n_train_steps=5, save_top_k=-1)] if directory else []
    run = trainer(
        **{"max_steps": STEPS, "accumulate_grad_batches": ACCUMULATED, **CLIPPING[clipping], **flags},
        plugins=[fp16_mixed()] if scaled else None,
        callbacks=[*saver, *callbacks],
        enable_checkpointing=bool(saver),
    )
    run.fit(model, loader(BATCHES, seed=rank), ckpt_path=resume)
    return model


def state_of(model: LitTokens) -> dict[str, Any]:
    """Returns the weights and the optimizer's state at the end."""
    assert model.trainer.global_step == STEPS
    return {"weights": dict(model.state_dict()), "optimizer": model.trainer.optimizers[0].state_dict()}


def by_hand(
    main: str, other: str, clipping: str = "value", ranks: int = 1, scaled: bool = False
) -> tuple[dict[str, Tensor], float]:
    """Trains as ``fit`` does on so many ranks, in one process with two optimizers of the upstream classes.

    Returns:
        The weights, and the scale of the loss at the end.
    """
    torch.manual_seed(0)
    model = LitTokens().model
    built = _optimizers(BY_NAME[main], BY_NAME[other], model)
    optimizers = [each for each, _, _ in built]
    schedules = [get_scheduler(name, each, steps, STEPS) for each, name, steps in built if name]
    averaging: list[Any] = [each for each in optimizers if hasattr(each, "train")]
    for averaged in averaging:
        averaged.train()
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    parameters = [p for each in optimizers for group in each.param_groups for p in group["params"]]
    batches = [[*loader(BATCHES, seed=rank)] for rank in range(ranks)]
    for step, first in enumerate([*range(0, BATCHES, ACCUMULATED)] * 2):
        totals = [torch.zeros_like(p) for p in parameters]
        for own in batches:
            for tokens, targets in own[first : first + ACCUMULATED]:
                with torch.autocast("cpu", torch.float16, enabled=scaled):
                    loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())
                scaler.scale(loss / ACCUMULATED).backward()
            if scaled and step == _OVERFLOWS and own is batches[-1]:
                model.head.bias.grad *= float("inf")
            for total, parameter in zip(totals, parameters, strict=True):
                total += parameter.grad / ranks
                parameter.grad = None
        for total, parameter in zip(totals, parameters, strict=True):
            parameter.grad = total
        _step(optimizers, parameters, scaler, clipping)
        for schedule in schedules:
            schedule.step()
        model.zero_grad()
    for averaged in averaging:
        averaged.eval()
    return {f"model.{name}": value for name, value in model.state_dict().items()}, scaler.get_scale()


def _step(optimizers: list[Optimizer], parameters: list[Tensor], scaler: torch.amp.GradScaler, clipping: str) -> None:
    """Steps both or, if a gradient overflowed, neither."""
    for each in optimizers if scaler.is_enabled() else ():
        scaler.unscale_(each)
    finite = all(parameter.grad.isfinite().all() for parameter in parameters)
    clip = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[clipping]
    clip(parameters, CLIPPING[clipping]["gradient_clip_val"])
    for each in optimizers if finite else ():
        each.step()
    if scaler.is_enabled():
        scaler.update()


def _optimizers(one: Case, two: Case, model: TokenModel) -> list[tuple[Optimizer, str | None, int]]:
    """Returns the optimizers, each with its schedule and the steps for which that warms up.

    There is a third for the vectors, if the main one takes hidden matrices only.
    """
    hidden = [_group(one, [model.linear.weight], DECAY, "linear")]
    vectors = [_group(one, [model.linear.bias, *model.norm.parameters()], 0.0)]
    ends = [
        _group(two, [model.embedding.weight], DECAY, "embedding"),
        _group(two, [model.head.weight], DECAY, "linear"),
        _group(two, [model.head.bias], 0.0),
    ]
    last = (_upstream(two, ends), two.schedule and "cosine", WARMUP)
    if one.row.takes == "all":
        return [(_upstream(one, hidden + vectors), one.schedule, 0), last]
    return [(_upstream(one, hidden), one.schedule, 0), (torch.optim.AdamW(vectors, fused=True), one.schedule, 0), last]


def _upstream(case: Case, groups: list[dict[str, Any]]) -> Optimizer:
    own_warmup = {"warmup_steps": WARMUP} if case.row.warmup == "optimizer" else {}
    return case.load()(groups, lr=case.lr, **case.arguments, **case.options, **own_warmup)


def _group(case: Case, parameters: list[Tensor], weight_decay: float, kind: str = "") -> dict[str, Any]:
    """Returns a param group as one would write it for this class."""
    own: dict[str, Any] = {"params": parameters, "weight_decay": weight_decay}
    if case.projects and kind != "linear":
        own["rank"] = None
    if case.row.bits:
        own["optim_bits"] = 32 if kind == "embedding" else case.row.bits
    return own
