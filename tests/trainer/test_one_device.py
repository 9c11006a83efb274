"""The strategies for one device: what they refuse when the Trainer is made, and their arguments."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import Strategy

from lightning_optim import FusedStrategy, IncompatibleTrainer, LayerwiseStrategy, NPUStrategy
from tests.models import trainer

ONE_DEVICE = (FusedStrategy, LayerwiseStrategy, NPUStrategy)


@pytest.mark.parametrize("strategy", ["fused", "layerwise"])
def test_several_devices_and_several_nodes_are_refused(strategy: str) -> None:
    """Every node would train a model of its own."""
    for flags, what in (({"devices": 2}, "2 devices"), ({"devices": 1, "num_nodes": 3}, "3 nodes")):
        flag = next(reversed(flags))
        with pytest.raises(IncompatibleTrainer) as error:
            trainer(strategy=strategy, **flags)
        assert f"strategy='{strategy}' steps on one device, and the Trainer has {what}. " in str(error.value)
        assert error.value.text.endswith(f"Use Trainer(strategy='{strategy}_ddp'), or {flag}=1.")


@pytest.mark.parametrize("strategy", ONE_DEVICE)
def test_an_xla_device_is_refused_with_the_strategy_for_it(strategy: type[Strategy]) -> None:
    """Lightning's own error names no flag."""
    devices = [torch.device("xla", index) for index in range(2)]
    for given, flag in ((devices[:1], "single_xla_syncfree"), (devices, "xla_syncfree")):
        with pytest.raises(IncompatibleTrainer, match=rf"not train on XLA devices. Use Trainer\(strategy='{flag}'\)"):
            strategy().parallel_devices = given


def test_one_node_is_what_the_trainer_knows() -> None:
    run: L.Trainer = trainer(strategy="fused", devices=1)
    assert run.num_nodes == 1


@pytest.mark.parametrize("strategy", ONE_DEVICE)
def test_a_command_line_finds_the_arguments(strategy: type[Strategy]) -> None:
    parser = LightningArgumentParser()
    parser.add_class_arguments(strategy, "strategy")
    options = {"bucket_mb", "norm_clipping", "log_grad_norm", "overflow", "gradient_readers", "norm_budget_mb"}
    own = options if strategy is LayerwiseStrategy else set()
    found = vars(parser.get_defaults().strategy)
    assert set(found) == {"device", "accelerator", "checkpoint_io", "precision_plugin"} | own
    help_text = parser.format_help()
    assert "Where to train; " in help_text
