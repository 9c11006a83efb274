"""The layerwise engine in plain PyTorch and Fabric: ``Layerwise`` and ``Clipping``."""

from __future__ import annotations

import copy
import functools
import gc
import io
import itertools
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_optim import (
    Clipping,
    IncompatibleTrainer,
    InvalidOption,
    Layerwise,
    build_optimizer,
    build_schedule,
)
from lightning_optim.stepping._preparing import prepare_step
from tests.cases import LAYERWISE, case_of
from tests.models import TokenModel, loader
from tests.trainer.test_resume import assert_equal

STEPS = 5
LIMIT = 0.05
Loop = Callable[[nn.Module, Optimizer, list[tuple[Tensor, Tensor]]], None]


def build(name: str = "adamw_torch", **optim_args: Any) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = TokenModel()
    case = case_of(name)
    arguments = {**case.options, **optim_args}
    optimizer = build_optimizer(model, name, lr=case.lr, weight_decay=0.1, optim_args=arguments)
    train_mode(optimizer)
    return model, optimizer


def train_mode(optimizer: Optimizer) -> None:
    """Schedule-free optimizers have one."""
    getattr(optimizer, "train", lambda: None)()


def data(batches: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    return [(tokens, targets) for tokens, targets in loader(batches, batch_size=4)]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def plain_loop(model: nn.Module, optimizer: Optimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
    for batch in batches:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def layerwise_loop(model: nn.Module, optimizer: Optimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
    for batch in batches:
        Layerwise.of(optimizer).backward(loss_of(model, batch))
        assert not any(parameter.grad is not None for parameter in model.parameters())


def outcome(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {"weights": model.state_dict(), "optimizer": optimizer.state_dict()}


@functools.cache
def expected(name: str, steps: int = STEPS) -> dict[str, Any]:
    model, optimizer = build(case_of(name).plain)
    plain_loop(model, optimizer, data(steps))
    return outcome(model, optimizer)


class ByHand:
    """Clips as each kind says, after backward."""

    def __init__(self, kind: str | None) -> None:
        self._kind = kind
        self._previous: Tensor | None = None

    def __call__(self, parameters: list[nn.Parameter]) -> None:
        if self._kind == "value":
            nn.utils.clip_grad_value_(parameters, LIMIT)
        elif self._kind == "norm":
            nn.utils.clip_grad_norm_(parameters, LIMIT)
        elif self._kind == "per_parameter":
            for parameter in parameters:
                nn.utils.clip_grad_norm_([parameter], LIMIT)
        elif self._kind == "previous":
            norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
            nn.utils.clip_grads_with_norm_(parameters, LIMIT, norm if self._previous is None else self._previous)
            self._previous = norm


COMBINATIONS = [
    (kind, accumulate, scales)
    for kind, accumulate, scales in itertools.product(
        (None, "value", "norm", "previous", "per_parameter"), (1, 3), (False, True)
    )
    # Scaled and accumulated gradients are clipped when all are there, by their own norm.
    if not (kind == "previous" and accumulate > 1 and scales)
]


class TestBackward:
    def test_the_scaler_finds_a_fused_optimizer_as_it_was(self) -> None:
        """While it steps in backward it is handed unscaled gradients."""
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], fused=True)
        layerwise = Layerwise(optimizer)
        assert not optimizer._step_supports_amp_scaling
        layerwise.detach()
        assert optimizer._step_supports_amp_scaling

    @pytest.mark.parametrize("name", LAYERWISE)
    def test_equals_the_plain_loop(self, name: str) -> None:
        model, optimizer = build(f"{name}_layerwise")
        layerwise_loop(model, optimizer, data())
        assert_equal(expected(name), outcome(model, optimizer), name)

    @pytest.mark.parametrize(("kind", "accumulate", "scales"), COMBINATIONS)
    @pytest.mark.parametrize("name", ["adamw_torch", "stable_adamw", "schedule_free_sgd"])
    def test_with_clipping_accumulation_and_scaling(
        self, name: str, kind: str | None, accumulate: int, scales: bool
    ) -> None:
        """Five micro-batches: accumulated by 3, the last step is from two."""
        batches = data(5)
        results = []
        for layerwise in (False, True):
            model, optimizer = build(name + "_layerwise" * layerwise)
            scaler = torch.amp.GradScaler("cpu") if scales else None
            clipping, by_hand = Clipping(kind, LIMIT) if kind else None, ByHand(kind)
            for number, batch in enumerate(batches, start=1):
                loss = loss_of(model, batch) / accumulate
                if number % accumulate and number < len(batches):
                    (scaler.scale(loss) if scaler else loss).backward()
                elif layerwise:
                    Layerwise.of(optimizer).backward(loss, clipping=clipping, scaler=scaler)
                else:
                    (scaler.scale(loss) if scaler else loss).backward()
                    if scaler:
                        scaler.unscale_(optimizer)
                    by_hand(list(model.parameters()))
                    scaler.step(optimizer) if scaler else optimizer.step()
                    optimizer.zero_grad()
                if scaler and not (number % accumulate and number < len(batches)):
                    scaler.update()
            results.append(model.state_dict())
        tolerance = 1e-5 if kind in ("norm", "previous") else 0
        torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)

    def test_tells_the_norm(self) -> None:
        model, optimizer = build()
        loss_of(model, data()[0]).backward()
        norm = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        for clipping in (None, Clipping("value", LIMIT), Clipping("norm", LIMIT), Clipping("per_parameter", LIMIT)):
            model, optimizer = build("adamw_torch_layerwise")
            layerwise = Layerwise.of(optimizer)
            layerwise.wants_norm = True
            layerwise.backward(loss_of(model, data()[0]), clipping=clipping)
            torch.testing.assert_close(layerwise.gradient_norm, norm, rtol=1e-6, atol=0)

    def test_tells_the_norm_of_several_dtypes_to_the_bit(self) -> None:
        """torch adds the norms dtype by dtype."""
        layers = [nn.Linear(16, 16).to(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16) * 3]
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        for number in range(5):
            wanted = [torch.randn(p.shape, generator=torch.Generator().manual_seed(number)).to(p) for p in parameters]
            norm = nn.utils.get_total_norm(wanted)
            layerwise = Layerwise(torch.optim.SGD(parameters, lr=0.1), bucket_mb=0)
            losses = [(p * gradient).sum().float() for p, gradient in zip(parameters, wanted, strict=True)]
            layerwise.backward(torch.stack(losses).sum(), clipping=Clipping("norm", 1.0))
            layerwise.detach()
            assert torch.equal(layerwise.gradient_norm, norm)

    def test_skips_only_the_bucket_that_overflowed(self) -> None:
        model, optimizer = build("adamw_torch_layerwise", bucket_mb=0)
        before = copy.deepcopy(model.state_dict())
        handle = model.linear.weight.register_hook(lambda grad: grad * float("inf"))
        scaler = torch.amp.GradScaler("cpu")
        Layerwise.of(optimizer).backward(loss_of(model, data()[0]), scaler=scaler)
        scaler.update()
        assert scaler.get_scale() == 2.0**15
        unchanged = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
        assert unchanged == ["linear.weight"]
        handle.remove()
        Layerwise.of(optimizer).backward(loss_of(model, data()[1]), scaler=scaler)
        scaler.update()
        assert scaler.get_scale() == 2.0**15
        assert not torch.equal(model.linear.weight, before["linear.weight"])


def step_with_closure(model: nn.Module, optimizer: Optimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
    for batch in batches:

        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0


def stepping_with_step(model: nn.Module, optimizer: Optimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
    for batch in batches:
        loss = loss_of(model, batch)
        with Layerwise.of(optimizer).stepping():
            loss.backward()
        assert not any(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()


def fabric_loop(model: nn.Module, optimizer: Optimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    wrapped, outer = fabric.setup(model, optimizer)
    for batch in batches:
        Layerwise.of(outer).backward(loss_of(wrapped, batch), backward=fabric.backward)


def ignorant_fabric_loop(model: nn.Module, optimizer: Optimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    wrapped, outer = fabric.setup(model, optimizer)
    for batch in batches:
        fabric.backward(loss_of(wrapped, batch))
        outer.step()
        outer.zero_grad()


LOOPS = (layerwise_loop, plain_loop, step_with_closure, stepping_with_step, fabric_loop, ignorant_fabric_loop)


class TestLoops:
    @pytest.mark.parametrize("loop", LOOPS)
    @pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "stable_adamw", "schedule_free_adamw"])
    def test_every_loop_is_right(self, name: str, loop: Loop) -> None:
        model, optimizer = build(f"{name}_layerwise")
        loop(model, optimizer, data())
        assert_equal(expected(name), outcome(model, optimizer), name)

    @pytest.mark.parametrize("loop", LOOPS)
    def test_counters_advance_once_per_step(self, loop: Loop) -> None:
        for name, counter in (("schedule_free_radam", "k"), ("stable_adamw", "step")):
            model, optimizer = build(f"{name}_layerwise", bucket_mb=0)
            loop(model, optimizer, data())
            assert [int(group[counter]) for group in optimizer.param_groups] == [STEPS, STEPS]

    @pytest.mark.parametrize("loop", LOOPS)
    def test_step_hooks_run_once_per_step(self, loop: Loop) -> None:
        """Those of the optimizer and those for all optimizers."""
        model, optimizer = build("adamw_torch_layerwise", bucket_mb=0)
        calls: list[str] = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        handles = [
            register_optimizer_step_pre_hook(lambda *_: calls.append("pre, of all")),
            register_optimizer_step_post_hook(lambda *_: calls.append("post, of all")),
        ]
        try:
            loop(model, optimizer, data())
        finally:
            for handle in handles:
                handle.remove()
        assert calls == ["pre, of all", "pre", "post", "post, of all"] * STEPS

    @pytest.mark.parametrize("loop", LOOPS)
    def test_what_prepares_a_step_meets_every_gradient(self, loop: Loop) -> None:
        model, optimizer = build("adamw_torch_layerwise", bucket_mb=0)
        met: list[Tensor] = []

        def prepare(part: Optimizer) -> None:
            met.extend(p for group in part.param_groups for p in group["params"] if p.grad is not None)

        handle = prepare_step(optimizer, prepare)
        loop(model, optimizer, data(1))
        assert set(met) == set(model.parameters())
        handle.remove()
        met.clear()
        loop(model, optimizer, data(1))
        assert met == []

    @pytest.mark.parametrize("loop", LOOPS)
    def test_attributes_that_a_step_changes_reach_the_optimizer(self, loop: Loop) -> None:
        class Counting(torch.optim.SGD):
            steps = 0

            def step(self, closure: Any = None) -> Any:
                self.steps += 1
                return super().step(closure)

        torch.manual_seed(0)
        model = TokenModel()
        optimizer = Counting(model.parameters(), lr=0.1)
        Layerwise(optimizer, 0)
        loop(model, optimizer, data())
        assert optimizer.steps == STEPS

    @pytest.mark.parametrize("attached_first", [True, False])
    @pytest.mark.parametrize("loop", LOOPS)
    def test_schedulers_neither_warn_nor_care(self, loop: Loop, attached_first: bool) -> None:
        results = []
        for layerwise in (False, True):
            model, optimizer = build()
            if layerwise and attached_first:
                Layerwise(optimizer)
            schedule = build_schedule(optimizer, "linear", total_steps=STEPS)
            if layerwise and not attached_first:
                Layerwise(optimizer)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", message=".*torch.jit.*")
                for batch in data():
                    (loop if layerwise else plain_loop)(model, optimizer, [batch])
                    schedule.step()
                if layerwise:
                    Layerwise.of(optimizer).detach()
                plain_loop(model, optimizer, data(1))
                schedule.step()
            results.append(outcome(model, optimizer))
        assert_equal(*results, "schedule")

    def test_a_schedule_of_momentum(self) -> None:
        results = []
        for layerwise in (False, True):
            model, optimizer = build("sgd")
            schedule = OneCycleLR(optimizer, 0.3, total_steps=STEPS + 1)
            if layerwise:
                Layerwise(optimizer, 0)
            for batch in data():
                (layerwise_loop if layerwise else plain_loop)(model, optimizer, [batch])
                schedule.step()
            results.append(outcome(model, optimizer))
        assert_equal(*results, "OneCycleLR")


class Branches(nn.Module):
    """Uses one of its branches, or neither."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 8)
        self.branches = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor, branch: int | None) -> Tensor:
        hidden = self.stem(x) if branch != 1 else x
        return (hidden if branch is None else self.branches[branch](hidden)).square().mean()


class TestChangingParameters:
    @pytest.mark.parametrize("clipping", [None, Clipping("norm", LIMIT), Clipping("per_parameter", LIMIT)], ids=str)
    @pytest.mark.parametrize("name", ["adamw_torch", "stable_adamw", "schedule_free_adamw", "rmsprop_bnb"])
    def test_unused_in_some_steps(self, name: str, clipping: Clipping | None) -> None:
        results = []
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
        for suffix in ("", "_layerwise"):
            model = Branches()
            optimizer = build_optimizer(model, name + suffix, lr=1e-2)
            train_mode(optimizer)
            clip = ByHand(clipping.kind if clipping else None)
            for branch in (0, 1, None, 1, 0):
                if suffix:
                    Layerwise.of(optimizer).backward(model(x, branch), clipping=clipping)
                    continue
                model(x, branch).backward()
                clip([parameter for parameter in model.parameters() if parameter.grad is not None])
                optimizer.step()
                optimizer.zero_grad()
            results.append(outcome(model, optimizer))
        if clipping is None:
            assert_equal(*results, name)
        torch.testing.assert_close(results[0]["weights"], results[1]["weights"], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("loop", LOOPS)
    def test_unfrozen_and_added_later(self, loop: Loop) -> None:
        results = []
        for layerwise in (False, True):
            torch.manual_seed(0)
            model = TokenModel()
            model.linear.requires_grad_(False)
            optimizer = torch.optim.AdamW([*model.linear.parameters(), *model.head.parameters()], lr=1e-2)
            if layerwise:
                Layerwise(optimizer, 0)
            train = loop if layerwise else plain_loop
            for parameter in (*model.embedding.parameters(), *model.norm.parameters()):
                parameter.requires_grad_(False)
            train(model, optimizer, data(2))
            model.linear.requires_grad_(True)
            train(model, optimizer, data(2))
            for parameter in (*model.embedding.parameters(), *model.norm.parameters()):
                parameter.requires_grad_(True)
            optimizer.add_param_group({"params": list(model.embedding.parameters()), "lr": 1e-3})
            optimizer.add_param_group({"params": list(model.norm.parameters()), "weight_decay": 0.0})
            train(model, optimizer, data(2))
            if layerwise:
                Layerwise.of(optimizer).detach()
                assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
            results.append(outcome(model, optimizer))
        assert_equal(*results, "unfrozen")


class TestLiveGradients:
    @pytest.mark.parametrize("widths", [(64, 64, 64, 64, 64), (8, 64, 8, 64, 64, 8, 8, 8)], ids=str)
    @pytest.mark.parametrize("kib", [0, 1, 5, 10, 16, 17, 40])
    def test_at_most_a_bucket_and_the_largest(self, kib: int, widths: tuple[int, ...]) -> None:
        """Without biases between them, so that large gradients follow each other."""
        model = nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)])
        alive: list[int] = []

        def count(_: Tensor) -> None:
            alive.append(sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None))

        # Before the engine's hook, which frees, and after it.
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(count)
        layerwise = Layerwise(torch.optim.SGD(model.parameters(), lr=0.1), kib / 1024)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(count)
        for clipping in (None, Clipping("norm", 1.0)):
            layerwise.backward(model(torch.ones(2, widths[0])).sum(), clipping=clipping)
        largest = max(parameter.nbytes for parameter in model.parameters())
        assert len(alive) == 3 * 2 * len(model)
        assert max(alive) <= kib * 1024 + largest
        assert min(alive) <= kib * 1024


class TestAttaching:
    @pytest.mark.parametrize("scheduled", [False, True])
    def test_detach_gives_everything_back(self, scheduled: bool) -> None:
        model, optimizer = build("adamw_torch_fused")
        if scheduled:
            LambdaLR(optimizer, lambda step: 1.0)
        before = dict(vars(optimizer))
        layerwise = Layerwise(optimizer)
        layerwise_loop(model, optimizer, data())
        layerwise.detach()
        layerwise.detach()
        after = dict(vars(optimizer))
        assert after.pop("_opt_called", True)
        assert {name: value for name, value in before.items() if name != "_opt_called"} == after
        assert Layerwise.of(optimizer) is None
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())

    def test_goes_on_plainly_after_detach_and_again_layerwise(self) -> None:
        model, optimizer = build()
        for loop in (layerwise_loop, plain_loop, layerwise_loop):
            if loop is layerwise_loop:
                Layerwise(optimizer)
            loop(model, optimizer, data(2))
            if loop is layerwise_loop:
                Layerwise.of(optimizer).detach()
        reference, reference_optimizer = build()
        plain_loop(reference, reference_optimizer, data(2) * 3)
        assert_equal(outcome(reference, reference_optimizer), outcome(model, optimizer), "again")

    @pytest.mark.parametrize("moves", [("", "_layerwise"), ("_layerwise", ""), ("_layerwise", "_layerwise")], ids=str)
    @pytest.mark.parametrize("name", LAYERWISE)
    def test_state_dicts_move(self, name: str, moves: tuple[str, str]) -> None:
        weights, state = None, None
        for suffix, batches in zip(moves, (data()[:2], data()[2:]), strict=True):
            model, optimizer = build(name + suffix)
            if state is not None:
                model.load_state_dict(torch.load(weights, weights_only=True))
                optimizer.load_state_dict(torch.load(state, weights_only=True))
            (layerwise_loop if suffix else plain_loop)(model, optimizer, batches)
            weights, state = io.BytesIO(), io.BytesIO()
            torch.save(model.state_dict(), weights)
            torch.save(optimizer.state_dict(), state)
            weights.seek(0)
            state.seek(0)
        assert_equal(expected(name), outcome(model, optimizer), name)

    def test_forgotten_optimizers_are_freed_and_their_hooks_go(self) -> None:
        model = TokenModel()
        forgotten = []
        for _ in range(2):
            optimizer = build_optimizer(model, "adamw_torch_layerwise")
            layerwise_loop(model, optimizer, data(1))
            forgotten.append(weakref.ref(optimizer))
            del optimizer
        gc.collect()
        assert [reference() for reference in forgotten] == [None, None]
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())

    def test_a_state_dict_loaded_while_attached(self) -> None:
        model, optimizer = build("adamw_torch_layerwise")
        layerwise_loop(model, optimizer, data(2))
        saved = copy.deepcopy(outcome(model, optimizer))
        layerwise_loop(model, optimizer, data(2))
        model.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        layerwise_loop(model, optimizer, data()[2:])
        assert_equal(expected("adamw_torch"), outcome(model, optimizer), "loaded")

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
    )
    @pytest.mark.parametrize("name", ["adamw_torch", "schedule_free_adamw", "stable_adamw"])
    def test_copies_step_plainly_and_leave_the_original_alone(self, name: str, copied: Callable[[Any], Any]) -> None:
        model, optimizer = build(f"{name}_layerwise")
        layerwise_loop(model, optimizer, data()[:2])
        twin, twin_optimizer = copied((model, optimizer))
        assert Layerwise.of(twin_optimizer) is None
        assert not any(parameter._post_accumulate_grad_hooks for parameter in twin.parameters())
        plain_loop(twin, twin_optimizer, data()[2:])
        layerwise_loop(model, optimizer, data()[2:])
        assert_equal(expected(name), outcome(model, optimizer), "original")
        assert_equal(expected(name), outcome(twin, twin_optimizer), "copy")

    def test_an_exception_in_backward_drops_what_is_left(self) -> None:
        model, optimizer = build("adamw_torch_layerwise", bucket_mb=1000)
        layerwise = Layerwise.of(optimizer)

        def fail(_: Tensor) -> None:
            raise RuntimeError("broken layer")

        handle = model.linear.weight.register_hook(fail)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match="broken layer"):
            layerwise.backward(loss_of(model, data()[0]))
        with pytest.raises(RuntimeError, match="broken layer"), layerwise.stepping():
            loss_of(model, data()[0]).backward()
        assert not layerwise.is_stepping
        assert not layerwise.has_gradients()
        assert_equal(before, model.state_dict(), "one bucket, which never was full")
        handle.remove()
        layerwise_loop(model, optimizer, data())
        assert_equal(expected("adamw_torch"), outcome(model, optimizer), "afterwards")


class TestRefusals:
    def test_lbfgs(self) -> None:
        with pytest.raises(IncompatibleTrainer, match="LBFGS evaluates the model several times"):
            Layerwise(torch.optim.LBFGS(nn.Linear(2, 2).parameters()))

    def test_twice(self) -> None:
        optimizer = build("adamw_torch_layerwise")[1]
        with pytest.raises(IncompatibleTrainer, match=r"this AdamW is already layerwise: Layerwise.of\(optimizer\)"):
            Layerwise(optimizer)

    @pytest.mark.parametrize("size", [-1, -0.001, float("inf"), float("nan")])
    def test_bucket_size(self, size: float) -> None:
        with pytest.raises(InvalidOption, match=f"bucket_mb={size!r} is not a size: give MiB"):
            Layerwise(build()[1], size)

    @pytest.mark.parametrize(
        ("kind", "limit", "text"),
        [
            ("global", 1.0, r"Clipping\('global', ...\): the kinds are 'value', 'norm', 'previous'"),
            ("norm", 0.0, r"Clipping\('norm', 0.0\): the limit is a number above 0"),
            ("value", -1.0, "the limit is a number above 0"),
            ("value", float("nan"), "the limit is a number above 0"),
        ],
    )
    def test_clipping(self, kind: Any, limit: float, text: str) -> None:
        with pytest.raises(InvalidOption, match=text):
            Clipping(kind, limit)

    @pytest.mark.parametrize("kind", ["norm", "previous"])
    def test_stepping_without_a_norm(self, kind: Any) -> None:
        optimizer = build("adamw_torch_layerwise")[1]
        with (
            pytest.raises(IncompatibleTrainer, match=r"call Layerwise.backward\(loss, clipping=...\)"),
            Layerwise.of(optimizer).stepping(clipping=Clipping(kind, 1.0)),
        ):
            raise AssertionError("not reached")
