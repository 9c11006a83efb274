"""States of other trainings: they go on as they would have there, or are refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes.optim
import galore_torch
import optimi
import pytest
import schedulefree
import torch
import torchao.optim
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor as HuggingFacesAdafactor

from lightning_optim import InvalidOption, build_optimizer, migrate_state_dict
from tests.hugging_face import Arguments, trainer_of

Build = Callable[..., Optimizer]


class Model(nn.Module):
    """Has weights of one shape, in an order that is not that of our groups, and a vector that Hugging Face decays."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 64)
        self.first = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.second = nn.Linear(64, 64)
        self.scale = nn.Parameter(torch.ones(64))


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def step(module: nn.Module, optimizer: Any, numbers: Iterable[int]) -> None:
    if hasattr(optimizer, "train"):
        optimizer.train()
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in module.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient if parameter.requires_grad else None
        optimizer.step()


@dataclass(frozen=True)
class Foreign:
    """An optimizer of elsewhere.

    Attributes:
        name: The identifier that goes on with its state.
        made: Makes it.
        options: Ours that are the same.
        tolerance: Of the weights after more steps; 0 where the arithmetic is the same.
    """

    name: str
    made: Build
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 0.0


PLAIN_ADAFACTOR = {"scale_parameter": False, "relative_step": False}
FOREIGN = {
    "torch.AdamW": Foreign("adamw_torch", torch.optim.AdamW),
    "torch.AdamW, fused": Foreign("adamw_torch_fused", lambda *a, **k: torch.optim.AdamW(*a, **k, fused=True)),
    "torch.AdamW, layerwise": Foreign("adamw_torch_layerwise", torch.optim.AdamW),
    "torch.SGD": Foreign("sgd", lambda *a, **k: torch.optim.SGD(*a, **k, momentum=0.9), {"momentum": 0.9}),
    "torch.Adagrad": Foreign("adagrad", torch.optim.Adagrad),
    "torch.RMSprop": Foreign("rmsprop", torch.optim.RMSprop),
    "torch.NAdam": Foreign("torch.optim.NAdam", torch.optim.NAdam),
    "bitsandbytes.AdamW": Foreign("paged_adamw_32bit", bitsandbytes.optim.AdamW),
    "bitsandbytes.AdamW8bit": Foreign("adamw_8bit", bitsandbytes.optim.AdamW8bit),
    "bitsandbytes.Lion8bit": Foreign("lion_8bit", bitsandbytes.optim.Lion8bit),
    "bitsandbytes.AdEMAMix": Foreign("ademamix", bitsandbytes.optim.AdEMAMix),
    "schedulefree.AdamW": Foreign("schedule_free_adamw", schedulefree.AdamWScheduleFree),
    "schedulefree.SGD": Foreign("schedule_free_sgd", schedulefree.SGDScheduleFree),
    "optimi.StableAdamW": Foreign("stable_adamw", optimi.StableAdamW, {"triton": False}),
    "transformers.Adafactor": Foreign(
        "adafactor", lambda *a, **k: HuggingFacesAdafactor(*a, **k, **PLAIN_ADAFACTOR), tolerance=1e-6
    ),
}


def whole_model(module: nn.Module) -> Any:
    return [*module.parameters()]


def turned_groups(module: nn.Module) -> Any:
    """Groups by another rule, and in another order."""
    parameters = [*module.parameters()][::-1]
    return [{"params": parameters[:2]}, {"params": []}, {"params": parameters[2:]}]


def ours(foreign: Foreign, module: nn.Module) -> Optimizer:
    return build_optimizer(module, foreign.name, lr=1e-3, weight_decay=0.0, optim_args=foreign.options)


@pytest.mark.parametrize("groups", [whole_model, turned_groups])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_state_goes_on_here(kind: str, groups: Callable[[nn.Module], Any]) -> None:
    foreign, there = FOREIGN[kind], model()
    # GlobalOptimManager of Hugging Face and of our row: embeddings in 32 bits.
    theirs = foreign.made(groups(there), lr=1e-3, weight_decay=0.0)
    if kind.startswith("torchao") or "8bit" in kind:
        bitsandbytes.optim.GlobalOptimManager.get_instance().register_module_override(
            there.embedding, "weight", {"optim_bits": 32}
        )
    step(there, theirs, range(3))
    # A checkpoint; in schedule-free's README, of evaluation mode.
    if hasattr(theirs, "eval"):
        theirs.eval()  # type: ignore[operator]
    saved, here = copy.deepcopy(theirs.state_dict()), copy.deepcopy(there)
    before = copy.deepcopy(saved["param_groups"])
    optimizer = ours(foreign, here)
    with pytest.raises(InvalidOption, match=r"migrate_state_dict|unknown format"):
        optimizer.load_state_dict(copy.deepcopy(saved))
    optimizer.load_state_dict(migrate_state_dict(saved, optimizer, groups(here)))
    assert saved["param_groups"] == before
    step(there, theirs, range(3, 6))
    step(here, optimizer, range(3, 6))
    for (name, expected), parameter in zip(there.named_parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, atol=foreign.tolerance, rtol=0, msg=name)


def test_torchao_goes_on_here() -> None:
    there = model()
    theirs = torchao.optim.AdamW8bit([*there.parameters()], lr=1e-3)
    here = copy.deepcopy(there)
    optimizer = build_optimizer(here, "adamw_torch_8bit", lr=1e-3)
    saved = theirs.state_dict()
    # To step it means to compile for half a minute: a state as it makes one.
    for number, parameter in enumerate(there.parameters()):
        moments = {name: theirs._new_buffer(parameter, name == "exp_avg") for name in ("exp_avg", "exp_avg_sq")}
        saved["state"][number] = {"step": torch.tensor(3.0), **moments}
    optimizer.load_state_dict(migrate_state_dict(saved, optimizer, here.parameters()))
    for parameter, (number, state) in zip(here.parameters(), saved["state"].items(), strict=True):
        assert type(optimizer.state[parameter]["exp_avg"]) is type(state["exp_avg"]), number
        assert float(optimizer.state[parameter]["step"]) == 3


@pytest.mark.parametrize(
    ("proj_type", "shape"), [("std", (48, 32)), ("std", (32, 48)), ("std", (32, 32)), ("reverse_std", (32, 48))]
)
def test_galore_goes_on_here(proj_type: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    there = nn.Sequential(nn.Linear(*shape), nn.LayerNorm(shape[1]))
    low = {"rank": 4, "update_proj_gap": 4, "scale": 0.25, "proj_type": proj_type}
    groups = [{"params": [there[0].weight], **low}, {"params": [there[0].bias, *there[1].parameters()]}]
    theirs = galore_torch.GaLoreAdamW(groups, lr=1e-2)
    step(there, theirs, range(3))
    here = copy.deepcopy(there)
    optimizer = build_optimizer(
        here,
        "galore_adamw",
        lr=1e-2,
        optim_args={**low, "projection": "svd", "match_galore_torch": True},
        optim_target_modules="all-linear",
    )
    with pytest.raises(InvalidOption, match="unknown format; optim='galore_adamw' reads"):
        optimizer.load_state_dict(theirs.state_dict())
    given = [here[0].weight, here[0].bias, *here[1].parameters()]
    optimizer.load_state_dict(migrate_state_dict(theirs.state_dict(), optimizer, given))
    # The next search for a subspace is among them.
    step(there, theirs, range(3, 7))
    step(here, optimizer, range(3, 7))
    for expected, parameter in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "optim", ["adamw_torch", "adamw_torch_fused", "schedule_free_adamw", "stable_adamw", "adafactor"]
)
def test_optimizer_pt_of_transformers(optim: str, tmp_path: Any) -> None:
    """The real Trainer's optimizer and groups: it decays the vector ``scale``, which we do not."""
    there = model()
    # Adapters alone are trainable, as in a peft run: then its second group may be empty.
    for frozen in (False, True):
        if frozen:
            for name, parameter in there.named_parameters():
                parameter.requires_grad_(name.startswith(("first.weight", "second.weight")))
        arguments = Arguments(output_dir=str(tmp_path), optim=optim, learning_rate=1e-3, use_cpu=True, report_to="none")
        theirs: Any = trainer_of(there, arguments).create_optimizer()
        assert len(theirs.param_groups) == 2
        assert bool(theirs.param_groups[1]["params"]) is not frozen
        step(there, theirs, range(3))
        if hasattr(theirs, "eval"):
            theirs.eval()
        torch.save(theirs.state_dict(), tmp_path / "optimizer.pt")
        saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
        here = copy.deepcopy(there)
        options = {"betas": (0.9, 0.999), "eps": 1e-8} if optim != "adafactor" else {}
        optimizer = build_optimizer(here, optim, lr=1e-3, weight_decay=0.0, optim_args=options)
        decay = transformers.Trainer.get_decay_parameter_names(trainer_of(here, arguments), here)
        trained = [name for name, parameter in here.named_parameters() if parameter.requires_grad]
        groups = [{"params": [name for name in trained if (name in decay) is first]} for first in (True, False)]
        optimizer.load_state_dict(migrate_state_dict(saved, optimizer, groups))
        step(there, theirs, range(3, 6))
        step(here, optimizer, range(3, 6))
        for (name, expected), parameter in zip(there.named_parameters(), here.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=0, msg=name)


def adamw() -> tuple[Model, dict[str, Any]]:
    module = model()
    theirs = torch.optim.AdamW(module.parameters())
    step(module, theirs, range(2))
    return module, theirs.state_dict()


def test_names_say_it_without_more() -> None:
    module = model()
    theirs = torch.optim.AdamW([*module.named_parameters()][::-1])
    step(module, theirs, range(2))
    optimizer = build_optimizer(module, "adamw_torch")
    optimizer.load_state_dict(migrate_state_dict(theirs.state_dict(), optimizer))
    for name, parameter in module.named_parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], theirs.state[parameter]["exp_avg"]), name


def test_our_own_states_move_to_other_groups() -> None:
    module = model()
    one = build_optimizer(module, "adafactor", lr=1e-3)
    step(module, one, range(2))
    other = build_optimizer(module, "adafactor", lr=1e-3, param_groups={"second.*": {"lr": 1e-4}})
    with pytest.raises(InvalidOption, match="belongs to other groups"):
        other.load_state_dict(one.state_dict())
    other.load_state_dict(migrate_state_dict(one.state_dict(), other))
    for parameter in module.parameters():
        assert other.state[parameter].keys() == one.state[parameter].keys()
    assert {group["lr"] for group in other.param_groups} == {1e-3, 1e-4}


def test_what_does_not_fit_is_refused() -> None:
    module, saved = adamw()
    optimizer = build_optimizer(module, "adamw_torch")
    parameters: list[Tensor] = [*module.parameters()]

    def refused(match: str, state: Any, optimizer: Optimizer, given: Any) -> None:
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(InvalidOption, match=match):
            migrate_state_dict(state, optimizer, given)
        assert optimizer.state_dict()["param_groups"] == before["param_groups"]

    refused("does not say whose state is whose. Pass .*model.parameters", saved, optimizer, None)
    refused("parameters has 7 parameters, and the state dict 8 parameters", saved, optimizer, parameters[1:])
    refused(r"parameters has 2 \+ 6 .* the state dict 8", saved, optimizer, turned_groups(module)[::2])
    turned = [*parameters[:1], *parameters[2:], parameters[1]]
    refused("would get 'exp_avg' of shape", saved, optimizer, turned[::-1])
    with_other = [*parameters[:-1], nn.Parameter(torch.ones(64))]
    refused(r"one of shape \(64,\), that no group of optim='adamw_torch' holds", saved, optimizer, with_other)
    fewer = {"state": {}, "param_groups": [{**saved["param_groups"][0], "params": [0]}]}
    refused("did not have '.*', which optim='adamw_torch' steps", fewer, optimizer, parameters[:1])
    refused(
        "no way leads from .*exp_avg.* to that of optim='adafactor'|would get",
        saved,
        build_optimizer(module, "adafactor"),
        parameters,
    )
    refused("was not built by build_optimizer", saved, torch.optim.AdamW(parameters), parameters)
    lion = build_optimizer(module, "lion_32bit")
    with pytest.raises(InvalidOption, match="another optimizer's"):
        lion.load_state_dict(migrate_state_dict(saved, lion, parameters))


def test_counters_of_groups_that_differ_are_refused() -> None:
    module = model()
    first, *rest = module.parameters()
    theirs = schedulefree.AdamWScheduleFree([{"params": [first]}, {"params": rest}])
    step(module, theirs, range(2))
    saved = theirs.state_dict()
    saved["param_groups"][0]["k"] = 7
    optimizer = build_optimizer(module, "schedule_free_adamw")
    with pytest.raises(InvalidOption, match="have counted 'k' differently, 7 and another"):
        migrate_state_dict(saved, optimizer, [first, *rest])
