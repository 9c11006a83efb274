"""Layerwise on XLA devices equals plain; with several replicas gradients are averaged in the hooks."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

pytest.importorskip("torch_xla", reason="needs torch_xla: make test-xla")

import torch_xla
from torch.nn import functional as F

from lightning_optim import Clipping, IncompatibleTrainer, Layerwise, build_optimizer
from lightning_optim.trainer.strategies._xla import XLAReplicas
from tests.models import LitTokens, loader
from tests.xla.runs import ALL, SINGLE, apart, fit, small_model, xla_trainer

# Between two ways to divide the same operations into graphs, after some steps of 1e-2; see test_training.py.
CLOSE = 1e-4
COMPARABLE: dict[str, dict[str, Any]] = {"adamw_torch_xla": {"optim_args": {"eps": 1e-5}}}
MODES: dict[str, dict[str, Any]] = {
    "clip_norm": {"gradient_clip_val": 0.05},
    "clip_value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulate": {"accumulate_grad_batches": 4},
    "accumulate clip_norm": {"accumulate_grad_batches": 4, "gradient_clip_val": 0.05},
}


@pytest.mark.parametrize("strategy", [SINGLE, ALL])
@pytest.mark.parametrize("mode", MODES)
def test_equals_plain(mode: str, strategy: str) -> None:
    """Under ``xla_syncfree`` the gradients go through flat buffers that are summed over the replicas, here one."""
    flags = {"module": COMPARABLE["adamw_torch_xla"], "steps": 6, **MODES[mode]}
    plain = fit("adamw_torch_xla", SINGLE, **flags)
    layerwise = fit("adamw_torch_xla_layerwise", strategy, **flags)
    assert apart(layerwise, plain) < CLOSE


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "lomo"])
def test_others_equal_plain(optim: str) -> None:
    plainly = "lightning_optim.optimizers.LOMO" if optim == "lomo" else optim
    lr = {"sgd": 0.3, "adafactor": 1e-2, "lomo": 1.0}[optim]
    plain = fit(plainly, SINGLE, steps=12, lr=lr)
    assert apart(fit(f"{optim}_layerwise", SINGLE, steps=12, lr=lr), plain) < CLOSE


def test_the_strategy_averages_in_the_hooks() -> None:
    """Every gradient passes through the replicas once, and Lightning's own reduction finds nothing to reduce."""
    averaged: list[int] = []
    reduced: list[int] = []

    class Counted(XLAReplicas):
        def average(self, flat: torch.Tensor) -> Any:
            averaged.append(flat.numel())
            return super().average(flat)

    class Watch(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            layerwise = Layerwise.of(trainer.optimizers[0])
            assert type(layerwise.replicas) is XLAReplicas
            assert layerwise.replicas.size == 1
            layerwise.replicas = Counted()

    import torch_xla.core.xla_model as xm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xm, "reduce_gradients", lambda optimizer, *_, **__: reduced.append(1))
        module = fit("sgd_layerwise", ALL, steps=3, callbacks=[Watch()])
        assert not reduced
        fit("sgd", ALL, steps=3)
        assert len(reduced) == 3
    elements = sum(parameter.numel() for parameter in module.parameters())
    # The first step only finds out the order, in a backward of its own, before it steps.
    assert sum(averaged) == 3 * elements


def test_averaging_reaches_the_gradients() -> None:
    """Two replicas with equal gradients, of which this machine has one: half of twice the sum is the gradient."""

    class Twice(XLAReplicas):
        """Says what it would be asked for with a second replica of the same data."""

        size = 2

        def average(self, flat: torch.Tensor) -> Any:
            wait = super().average(flat)  # half of the only one
            flat.add_(flat.clone())
            return wait

    x = torch.ones(4, 32, device="xla")
    models = [small_model(), small_model()]
    for model, replicas in zip(models, (None, Twice()), strict=True):
        optimizer = build_optimizer(model, "sgd", lr=0.1)
        layerwise = Layerwise(optimizer, replicas=replicas)
        if replicas is not None:
            replicas.exchange = lambda order: [list(order), list(order)]  # type: ignore[method-assign]
        for _ in range(3):
            layerwise.backward(F.mse_loss(model(x), torch.ones(4, 8, device="xla")), clipping=Clipping("norm", 0.5))
            torch_xla.sync()
    assert apart(*models) < 1e-6


def test_processes_exchange_their_orders() -> None:
    assert XLAReplicas().exchange([2, 0, 1]) == [[2, 0, 1]]


def test_lightnings_own_strategy_is_refused_with_the_one_to_use() -> None:
    from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy

    run = xla_trainer(SingleDeviceXLAStrategy(torch.device("xla", 0)), max_steps=1)
    with pytest.raises(IncompatibleTrainer, match=r"under the strategy 'single_xla'.*'single_xla_syncfree'"):
        run.fit(LitTokens(optim="sgd_layerwise"), loader())
