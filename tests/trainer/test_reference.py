"""The same numbers (contract C2): a Lightning run equals a hand-written loop with the upstream class, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import get_scheduler

from lightning_optim import InvalidOption, build_optimizer
from lightning_optim.stepping import Composite
from tests.cases import BY_NAME, NAMES, Case
from tests.models import LitTokens, TokenModel, loader, trainer

STEPS, WARMUP, WEIGHT_DECAY = 20, 4, 0.1


def upstream_groups(case: Case, model: TokenModel) -> list[dict[str, Any]]:
    decayed = [model.embedding.weight, model.linear.weight, model.head.weight]
    others = [model.linear.bias, model.norm.weight, model.norm.bias, model.head.bias]
    without = {"params": others, "weight_decay": 0.0}
    if not case.projects:
        return [{"params": decayed, "weight_decay": WEIGHT_DECAY}, without]
    bits = {"optim_bits": 32} if "8bit" in case.name else {}
    return [
        {"params": decayed[1:], "weight_decay": WEIGHT_DECAY},
        {"params": decayed[:1], "weight_decay": WEIGHT_DECAY, "rank": None, **bits},
        {**without, "rank": None},
    ]


def in_two(case: Case, model: TokenModel) -> Optimizer:
    """An optimizer for matrices, and torch's AdamW for all others, with its own rate or the same, as two optimizers."""
    vectors = [model.linear.bias, model.norm.weight, model.norm.bias, model.head.bias]
    others = [{"params": vectors, "weight_decay": 0.0}]
    layers = model.linear, model.embedding, model.head
    hidden, embedding, head = ({"params": [layer.weight], "weight_decay": WEIGHT_DECAY} for layer in layers)
    own = [hidden]
    if case.row.takes == "hidden matrices":
        others += [embedding, head]
    else:
        own += [{**embedding, "outputs": "columns"}, {**head, "momentum": 0.9}]
    lr = case.lr if "lr_scale" in case.options or case.name == "scale" else 1e-3
    return Composite({"own": upstream(case, own), "others": torch.optim.AdamW(others, lr=lr, fused=True)})


def upstream(case: Case, groups: list[dict[str, Any]]) -> Optimizer:
    own_warmup = {"warmup_steps": WARMUP} if case.name in ("schedule_free_adamw", "schedule_free_sgd") else {}
    return case.load()(groups, lr=case.lr, **case.arguments, **case.options, **own_warmup)


def hand_written(case: Case, model: TokenModel) -> list[float]:
    whole = case.row.takes == "all"
    optimizer = upstream(case, upstream_groups(case, model)) if whole else in_two(case, model)
    scheduler = None
    if case.schedule:
        scheduler = get_scheduler(case.schedule, optimizer, num_warmup_steps=WARMUP, num_training_steps=STEPS)
    if case.averages:
        optimizer.train()
    losses = []
    batches = [batch for _ in range(2) for batch in loader()]
    for tokens, targets in batches[:STEPS]:
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.item())
    if case.averages:
        optimizer.eval()
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_lightning_run_equals_the_upstream_loop(name: str) -> None:
    case = BY_NAME[name]
    warmup = 0 if name == "schedule_free_radam" else WARMUP
    lit = LitTokens(
        optim=name,
        lr=case.lr,
        weight_decay=WEIGHT_DECAY,
        optim_args=case.options,
        lr_scheduler=case.schedule,
        warmup_steps=warmup,
    )
    reference = TokenModel()
    reference.load_state_dict(lit.model.state_dict())
    trainer(max_steps=STEPS).fit(lit, loader())
    losses = hand_written(case, reference)
    assert lit.losses == losses
    for (key, ours), theirs in zip(lit.model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), f"{key}: {(ours - theirs).abs().max()}"


class Lookup(nn.Module):
    """An embedding and a matrix that are both large enough to be quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 64)
        self.linear = nn.Linear(64, 64, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.embedding(tokens)).square().mean()


@pytest.mark.parametrize(
    ("name", "full_precision"),
    [
        ("adamw_bnb_8bit", {"optim_bits": 32}),
        ("lion_8bit", {"optim_bits": 32}),
        ("ademamix_8bit", {"optim_bits": 32}),
        ("rmsprop_bnb_8bit", {"optim_bits": 32}),
        ("adamw_torch_8bit", {"block_size": 10**9}),
        ("adamw_torch_4bit", {"block_size": 10**9}),
        ("adamw_torch_fp8", {"block_size": 10**9}),
    ],
)
@pytest.mark.parametrize("quantize", [False, True])
def test_embeddings_keep_32_bits_unless_asked(name: str, full_precision: dict[str, Any], quantize: bool) -> None:
    """Equal to two upstream optimizers, one of them with 32-bit states for the embedding; no process-wide manager."""
    case = BY_NAME[name]
    ours, theirs = Lookup(), Lookup()
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, name, lr=1e-2, weight_decay=0.0, optim_args={"quantize_embeddings": quantize})
    arguments = {"lr": 1e-2, "weight_decay": 0.0, **case.arguments}
    references = [
        case.load()([theirs.embedding.weight], **{**arguments, **({} if quantize else full_precision)}),
        case.load()([theirs.linear.weight], **arguments),
    ]
    for step in range(5):
        tokens = torch.arange(step, 128, 3)
        for model, optimizers in ((ours, [optimizer]), (theirs, references)):
            loss = model(tokens)
            model.zero_grad()
            loss.backward()
            for each in optimizers:
                each.step()
    assert torch.equal(ours.embedding.weight, theirs.embedding.weight)
    assert torch.equal(ours.linear.weight, theirs.linear.weight)


def test_bitsandbytes_overrides_of_other_optimizers_do_not_leak_in() -> None:
    """Upstream asks for overrides by (group, index) in the whole process; ours asks for the parameter."""
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    manager.index2config[0, 0] = {"optim_bits": 32}
    try:
        model = nn.Linear(64, 64, bias=False)
        optimizer = build_optimizer(model, "adamw_bnb_8bit")
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        assert optimizer.state[model.weight]["state1"].dtype is torch.uint8
    finally:
        del manager.index2config[0, 0]


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "lion_8bit_layerwise"])
@pytest.mark.parametrize("how", ["override_config", "register_module_override"])
def test_bitsandbytes_overrides_of_a_parameter_are_honoured(name: str, how: str) -> None:
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    if how == "override_config":
        manager.override_config(model[1].weight, "optim_bits", 32)
    else:
        manager.register_module_override(model[1], "weight", {"optim_bits": 32})
    try:
        optimizer = build_optimizer(model, name)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        dtypes = [optimizer.state[layer.weight]["state1"].dtype for layer in model]
        assert dtypes == [torch.uint8, torch.float32, torch.uint8]
    finally:
        manager.initialize()


def test_other_bitsandbytes_overrides_are_refused_before_anything_moves() -> None:
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    model = nn.Linear(64, 64, bias=False)
    before = model.weight.detach().clone()
    manager.override_config(model.weight, key_value_dict={"optim_bits": 32, "lr": 0.5})
    try:
        optimizer = build_optimizer(model, "adamw_8bit")
        model.weight.grad = torch.ones_like(model.weight)
        with pytest.raises(InvalidOption, match=r"GlobalOptimManager overrides lr .*param_groups="):
            optimizer.step()
        assert torch.equal(model.weight, before)
    finally:
        manager.initialize()
