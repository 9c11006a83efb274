"""What torch demands of its own optimizers, of every row: conventions that frameworks and users' loops rely on.

``check_optimizer`` holds what can be said of any class (``tests/testing``). Here is the rest of what torch's suite
demands: hooks, names, dtypes side by side, groups that come later, refusals that leave all as it was.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lightning_optim.errors import InvalidOption
from lightning_optim.stepping import averaging_parts, seed
from lightning_optim.testing._broken import difference
from lightning_optim.testing._subject import Subject
from lightning_optim.testing._trial import Trial
from tests.cases import BY_NAME, KINDS, NAMES, Case

# Known exceptions. Each is tested to be one, so that it goes when upstream mends it.
#: torch's ``load_state_dict`` keeps the given tensors where dtype and device are the parameter's. So do the classes
#: that leave it as it is, among them the AdamW for what is no matrix.
SHARING = {
    "adamw_torch_fused",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "adamw_torch_fp8",
    "muon",
    "normuon",
    "scale",
    "sgd",
    "adagrad",
    "rmsprop",
    "stable_adamw",
    "schedule_free_radam",
    "schedule_free_adamw",
    "schedule_free_sgd",
}
#: Upstream keeps ``kahan_comp: None``, and torch flattens tensors, numbers and dicts only.
NONE_IN_STATE = {"stable_adamw"}
#: The algorithm gives each parameter a beta by its position: ``beta1 * (1 - gamma) ** index``.
BY_POSITION = {"grokadamw"}
#: Steps before the first that moves a parameter: upstream's learning rate is 0 until the variance can be rectified.
SILENT = {"schedule_free_radam": 7}
#: Upstream divides the gradients in place.
WRITING_GRADIENTS = {"schedule_free_adamw"}
#: At a learning rate of 0: averages of iterates, and an average of updates that were multiplied by their rates.
MOVING_ON = {"adafactor", "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"}

every_row = pytest.mark.parametrize("name", NAMES)
every_class = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    # torchao would compile for every shape.
    with torch.compiler.set_stance("force_eager"):
        yield


class Small(nn.Module):
    """A matrix large enough for blocks of states, a norm's vector and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)


def subject(case: Case, **arguments: Any) -> Subject:
    """Its plain form, with the options of the tests."""
    options = {key: value for key, value in case.options.items() if key != "min_8bit_size"}
    return Subject(case.plain, {"lr": case.lr, "optim_args": options, **arguments})


def trial(name: str, **arguments: Any) -> Trial:
    return subject(BY_NAME[name], **arguments).trial(Small)


def bare(name: str, parameters: Any, **arguments: Any) -> Optimizer:
    """The class itself, without what ``build_optimizer`` adds."""
    kind, given = subject(BY_NAME[name]).constructor()
    optimizer = kind(parameters, **{**given, **arguments})
    for part in averaging_parts(optimizer):
        part.train()
    return optimizer


def step(optimizer: Optimizer, number: int, factor: float = 1.0) -> None:
    """Steps with given gradients, which depend on the parameter's shape and the number only."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            generator = torch.Generator().manual_seed(number)
            parameter.grad = (torch.randn(parameter.shape, generator=generator) * factor).to(parameter.dtype)
    seed(number, optimizer)
    optimizer.step()


def parameters(*dtypes: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(32, 16).to(dtype)) for dtype in dtypes or (torch.float32,) * 2]


@every_class
def test_hooks_of_a_step_run_once_around_it(name: str) -> None:
    run = trial(name)
    seen: list[Any] = []
    handles = [
        run.optimizer.register_step_pre_hook(lambda *given: seen.append(("before", given[0], run.weights()))),
        run.optimizer.register_step_post_hook(lambda *given: seen.append(("after", given[0], run.weights()))),
        register_optimizer_step_pre_hook(lambda *given: seen.append(("before all", given[0], run.weights()))),
        register_optimizer_step_post_hook(lambda *given: seen.append(("after all", given[0], run.weights()))),
    ]
    start = run.weights()
    try:
        run.advance([0])
    finally:
        for handle in handles:
            handle.remove()
    order = [when for when, optimizer, _ in seen if optimizer is run.optimizer]
    assert order == ["before all", "before", "after", "after all"]
    for when, optimizer, weights in seen:
        if optimizer is not run.optimizer:
            # A part of it, whose step is one, too, for hooks of all optimizers.
            continue
        assert not difference(weights, start if "before" in when else run.weights()), when
    seen.clear()
    run.advance([1])
    assert not seen


@every_class
def test_hooks_of_a_state_dict_see_it_and_replace_it(name: str) -> None:
    run, other = trial(name), trial(name)
    run.advance([0])
    seen: list[str] = []
    optimizer = run.optimizer
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "note": len(saved["state"])})
    saved = optimizer.state_dict()
    assert saved.pop("note") == len(saved["state"])

    def translate(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        seen.append("before loading")
        return {key.removeprefix("old_"): value for key, value in given.items()}

    other.optimizer.register_load_state_dict_pre_hook(translate, prepend=True)
    other.optimizer.register_load_state_dict_post_hook(
        lambda loaded: seen.append(f"after loading {len(loaded.state_dict()['state'])}")
    )
    other.optimizer.load_state_dict({f"old_{key}": value for key, value in saved.items()})
    assert seen == ["before saving", "before loading", f"after loading {len(saved['state'])}"]
    assert not difference(other.optimizer.state_dict(), saved)


@every_class
def test_loading_leaves_the_given_state_as_it_is(name: str) -> None:
    """Also its groups, when those of the optimizer are changed afterwards."""
    run, other = trial(name), trial(name)
    run.advance(range(2))
    saved = copy.deepcopy(run.optimizer.state_dict())
    before = copy.deepcopy(saved)
    other.optimizer.load_state_dict(saved)
    assert not difference(saved, before)
    assert not difference(other.optimizer.state_dict(), before)
    for group in other.optimizer.param_groups:
        group["lr"] = 0.125
    assert not difference(saved["param_groups"], before["param_groups"])


@every_class
def test_loading_copies_tensors(name: str) -> None:
    """A state dict may be loaded into two optimizers."""
    run, other = trial(name), trial(name)
    run.advance(range(2))
    saved = copy.deepcopy(run.optimizer.state_dict())
    other.optimizer.load_state_dict(saved)
    places = {tensor.data_ptr() for tensor in _tensors(saved["state"]) if tensor.numel()}
    shared = any(tensor.data_ptr() in places for tensor in _tensors(other.optimizer.state_dict()["state"]))
    assert shared == (name in SHARING)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)


@every_class
def test_a_state_of_other_groups_is_refused_and_changes_nothing(name: str) -> None:
    run = trial(name)
    run.advance([0])
    before = copy.deepcopy(run.outcome())
    saved = copy.deepcopy(before["state_dict"])
    saved["param_groups"][0]["params"] = saved["param_groups"][0]["params"][:-1]
    with pytest.raises(ValueError, match=r"."):
        run.optimizer.load_state_dict(saved)
    saved["param_groups"] = [*saved["param_groups"], *saved["param_groups"]]
    with pytest.raises(ValueError, match=r"."):
        run.optimizer.load_state_dict(saved)
    assert not difference(run.outcome(), before)


@pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning")
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@every_class
def test_distributed_checkpoints_continue_bit_for_bit(name: str, flat: bool, tmp_path: Path) -> None:
    run, other = trial(name), trial(name)
    run.advance(range(3))
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    if flat and name in NONE_IN_STATE:
        with pytest.raises(NotImplementedError, match="NoneType"):
            get_optimizer_state_dict(run.module, run.optimizer, options=options)
        return
    saved = get_optimizer_state_dict(run.module, run.optimizer, options=options)
    assert all("." in key for key in saved) == flat
    state_dict_saver.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
    read = {"optimizer": get_optimizer_state_dict(other.module, other.optimizer, options=options)}
    state_dict_loader.load(read, checkpoint_id=tmp_path, no_dist=True)
    other.module.load_state_dict(run.module.state_dict())
    if flat and BY_NAME[name].upstream.startswith("bitsandbytes"):
        # torch puts together only what has the name of a state's entry, and bitsandbytes' are nested in another.
        with pytest.raises(InvalidOption, match="flatten_optimizer_state_dict=False"):
            set_optimizer_state_dict(other.module, other.optimizer, read["optimizer"], options=options)
        return
    set_optimizer_state_dict(other.module, other.optimizer, read["optimizer"], options=options)
    for each in (run, other):
        each.advance(range(3, 6))
    assert not difference(other.weights(), run.weights())


@every_class
def test_names_of_parameters_are_kept(name: str) -> None:
    """They are in the groups and the state dict, change no step, and may be absent on either side of a load."""
    plain, named = (bare(name, [("w", w), ("v", v)] if pairs else [w, v]) for pairs, (w, v) in _pairs())
    for optimizer in (plain, named):
        step(optimizer, 0)
    assert named.param_groups[0]["param_names"] == ["w", "v"]
    assert named.state_dict()["param_groups"][0]["param_names"] == ["w", "v"]
    assert not difference(_weights(named), _weights(plain))
    saved = copy.deepcopy(named.state_dict())
    without = copy.deepcopy(plain.state_dict())
    plain.load_state_dict(saved)
    named.load_state_dict(without)
    for optimizer in (plain, named):
        step(optimizer, 1)
    assert not difference(_weights(named), _weights(plain))


def _pairs() -> list[tuple[bool, list[nn.Parameter]]]:
    return [(pairs, parameters()) for pairs in (False, True)]


def _weights(optimizer: Optimizer) -> list[Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


@every_row
def test_parameters_of_several_dtypes_are_stepped_as_each_alone(name: str) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    together = parameters(*dtypes)
    optimizer = bare(name, together)
    single = [bare(name, [parameter]) for parameter in parameters(*dtypes)]
    for number in range(3):
        for each in (optimizer, *single):
            step(each, number)
    for dtype, one, other in zip(dtypes, _weights(optimizer), (_weights(each)[0] for each in single), strict=True):
        assert one.dtype is dtype
        if not BY_NAME[name].row.coupled and name not in BY_POSITION:
            torch.testing.assert_close(one, other, rtol=0, atol=0 if dtype is not torch.bfloat16 else 1e-2)


@every_class
def test_a_group_that_comes_later_starts_anew_and_the_others_go_on(name: str) -> None:
    first, second = parameters()
    alone, late = parameters()
    optimizer, other, fresh = bare(name, [first]), bare(name, [alone]), bare(name, [late])
    step(optimizer, 0)
    step(other, 0)
    optimizer.add_param_group({"params": second})
    assert optimizer.param_groups[1].keys() == fresh.param_groups[0].keys()
    start = second.detach().clone()
    for number in range(1, 1 + SILENT.get(name, 2)):
        for each in (optimizer, other, fresh):
            step(each, number)
    assert not torch.equal(second, start)
    if not BY_NAME[name].row.coupled:
        assert torch.equal(first, alone)


@every_class
def test_parameters_that_cannot_be_are_refused_and_change_nothing(name: str) -> None:
    first, second = parameters()
    optimizer = bare(name, [first])
    step(optimizer, 0)
    before = copy.deepcopy(optimizer.state_dict())
    kept = list(optimizer.param_groups)
    for wrong, error in (
        ({"params": [first]}, ValueError),
        ({"params": [second * 2]}, ValueError),
        ({"params": {second}}, TypeError),
        ({"params": [1.0]}, TypeError),
        ([second], TypeError),
    ):
        with pytest.raises(error):
            optimizer.add_param_group(wrong)  # type: ignore[arg-type]
        assert len(optimizer.param_groups) == 1
        assert optimizer.param_groups[0] is kept[0]
    assert not difference(optimizer.state_dict(), before)
    with pytest.raises(ValueError, match=r"."):
        bare(name, [{"params": [first]}, {"params": [first]}])
    with pytest.raises(TypeError):
        bare(name, second)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            bare(name, [first, first])
        except ValueError:
            return
    assert any("duplicate" in str(warning.message) for warning in caught)


@every_class
@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_are_removed_or_zeroed(name: str, to_none: bool) -> None:
    run = trial(name)
    run.backward(run.pull(0))
    run.optimizer.zero_grad(set_to_none=to_none)
    for parameter in run.parameters.values():
        assert (parameter.grad is None) == to_none
        assert parameter.grad is None or not parameter.grad.any()
    run.optimizer.step()
    run.advance([1])
    assert all(weight.isfinite().all() for weight in run.weights().values())


@every_row
def test_gradients_of_zero_move_nothing(name: str) -> None:
    optimizer = bare(name, parameters(), weight_decay=0.0)
    before = _weights(optimizer)
    for number in range(2):
        step(optimizer, number, factor=0.0)
    assert not difference(_weights(optimizer), before)
    step(optimizer, 2)
    assert all(weight.isfinite().all() for weight in _weights(optimizer))


@every_class
def test_steps_are_in_place_and_leave_gradients_alone(name: str) -> None:
    """What else holds a parameter's memory, as tied weights and views do, sees the step."""
    run = trial(name)
    places = [(p, p.data_ptr()) for p in run.parameters.values()]
    run.backward(run.pull(0))
    gradients = [(p.grad, p.grad.clone()) for p in run.parameters.values() if p.grad is not None]
    assert len(gradients) == len(places)
    run.optimizer.step()
    for parameter, place in places:
        assert parameter.data_ptr() == place
        assert parameter.is_leaf
        assert parameter.requires_grad
    for (gradient, _), (parameter, _) in zip(gradients, places, strict=True):
        assert parameter.grad is gradient
    changed = any(not torch.equal(gradient, before) for gradient, before in gradients)
    assert changed == (name in WRITING_GRADIENTS)


@every_class
def test_a_learning_rate_of_a_group_is_the_next_step_s(name: str) -> None:
    """Assigned as a number between two steps; with 0 nothing moves."""
    run = trial(name)
    run.advance(range(SILENT.get(name, 2)))
    rates = [float(group["lr"]) for group in run.optimizer.param_groups]
    before = run.weights()
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    run.advance([2])
    assert bool(difference(run.weights(), before)) == (name in MOVING_ON)
    before = run.weights()
    for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    run.advance([3])
    assert difference(run.weights(), before)
    assert all(weight.isfinite().all() for weight in run.weights().values())


@pytest.mark.parametrize("name", [name for name in NAMES if BY_NAME[name].row.decays])
def test_weight_decay_of_a_group_is_the_next_step_s(name: str) -> None:
    ends = []
    for decay in (0.0, 0.0, 0.5):
        optimizer = bare(name, parameters(), weight_decay=0.0)
        for number in range(SILENT.get(name, 1)):
            step(optimizer, number)
        for group in optimizer.param_groups:
            group["weight_decay"] = decay
        step(optimizer, 7)
        ends.append(_weights(optimizer))
    assert not difference(ends[0], ends[1])
    assert difference(ends[0], ends[2])


@every_class
def test_the_state_is_kept_by_parameters(name: str) -> None:
    run = trial(name)
    run.advance(range(2))
    held = {parameter for group in run.optimizer.param_groups for parameter in group["params"]}
    assert held == set(run.parameters.values())
    assert set(run.optimizer.state) <= held
    assert all(isinstance(state, dict) for state in run.optimizer.state.values())
    saved = run.optimizer.state_dict()
    assert saved["state"].keys() <= set(range(len(held)))
    assert [i for group in saved["param_groups"] for i in group["params"]] == list(range(len(held)))


@every_row
def test_it_is_printed_with_its_groups(name: str) -> None:
    run = trial(name)
    text = repr(run.optimizer)
    assert type(run.optimizer).__name__ in text
    for number, group in enumerate(run.optimizer.param_groups):
        assert f"Parameter Group {number}" in text
        assert f"lr: {group['lr']}" in text
    assert "params:" not in text


@every_class
@pytest.mark.parametrize("rate", [-1.0, float("nan")])
def test_a_learning_rate_below_zero_is_refused(name: str, rate: float) -> None:
    with pytest.raises(ValueError, match=r"lr|learning.rate"):
        trial(name, lr=rate)


@every_class
def test_the_default_dtype_plays_no_part(name: str) -> None:
    ends = []
    for default in (torch.float32, torch.float64):
        optimizer = bare(name, parameters(torch.float32, torch.float32))
        torch.set_default_dtype(default)
        try:
            for number in range(3):
                for parameter in optimizer.param_groups[0]["params"]:
                    generator = torch.Generator().manual_seed(number)
                    parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                seed(number, optimizer)
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        ends.append(_weights(optimizer))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-6)


@every_class
def test_flags_that_a_group_shows_are_followed(name: str) -> None:
    """``maximize`` steps against the gradient; ``foreach`` and ``fused`` and ``capturable`` give the same step."""
    optimizer = bare(name, parameters())
    flags = optimizer.param_groups[0].keys() & {"maximize", "foreach", "differentiable"}
    step(optimizer, 0, factor=-1.0 if "maximize" in flags else 1.0)
    for flag, factor in (("maximize", 1.0), ("foreach", 1.0), ("differentiable", 1.0)):
        if flag not in flags:
            continue
        other = bare(name, parameters())
        other.param_groups[0][flag] = True
        if flag != "maximize":
            factor = -1.0 if "maximize" in flags else 1.0
            other.param_groups[0]["fused"] = None
        if flag == "differentiable":
            other.param_groups[0]["foreach"] = False
        step(other, 0, factor=factor)
        torch.testing.assert_close(_weights(other), _weights(optimizer), rtol=0, atol=1e-6)


@every_class
def test_a_state_goes_through_a_file_into_a_class_of_its_own(name: str) -> None:
    """Without ``build_optimizer`` on either side."""
    first, second = bare(name, parameters()), bare(name, parameters())
    for number in range(2):
        step(first, number)
    file = io.BytesIO()
    torch.save([_weights(first), first.state_dict()], file)
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    second.load_state_dict(saved)
    with torch.no_grad():
        for parameter, weight in zip(second.param_groups[0]["params"], weights, strict=True):
            parameter.copy_(weight)
    for each in (first, second):
        step(each, 2)
    assert not difference(_weights(second), _weights(first))
