"""Without torch_xla, whatever needs it says what to type; see tests/xla for the rest."""

from __future__ import annotations

import importlib.util

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry

import lightning_optim
from lightning_optim import MissingDependency, PJRTAccelerator, XLASyncFreePrecision, build_optimizer
from lightning_optim.build import rules
from lightning_optim.trainer.accelerators import register

ABSENT = importlib.util.find_spec("torch_xla") is None
COMMAND = r"the package 'torch_xla' is not installed: pip install 'torch==2.9.0' 'torch_xla==2.9.0'"


@pytest.mark.skipif(not ABSENT, reason="torch_xla is installed")
@pytest.mark.parametrize("flag", ["single_xla_syncfree", "xla_syncfree"])
def test_the_strategies_say_what_to_type(flag: str) -> None:
    for accelerator in ("auto", "cpu"):
        with pytest.raises(MissingDependency, match=f"strategy='{flag}' cannot run here: {COMMAND}"):
            L.Trainer(strategy=flag, accelerator=accelerator)


@pytest.mark.skipif(not ABSENT, reason="torch_xla is installed")
def test_the_accelerator_says_what_to_type() -> None:
    with pytest.raises(MissingDependency, match=rf"Trainer\(accelerator='pjrt'\) cannot run here: {COMMAND}"):
        L.Trainer(accelerator="pjrt")
    assert not PJRTAccelerator.is_available()


@pytest.mark.skipif(not ABSENT, reason="torch_xla is installed")
def test_the_identifier_and_the_precision_say_what_to_type() -> None:
    with pytest.raises(MissingDependency, match=f"optim='adamw_torch_xla' cannot run here: {COMMAND}"):
        build_optimizer(torch.nn.Linear(2, 2), "adamw_torch_xla")
    with pytest.raises(MissingDependency, match=f"precision='bf16-mixed' on an XLA device cannot run here: {COMMAND}"):
        XLASyncFreePrecision("bf16-mixed")


def test_registering_twice_is_harmless() -> None:
    register()
    lightning_optim.trainer.strategies.register()
    assert AcceleratorRegistry["pjrt"]["accelerator"] is PJRTAccelerator


@pytest.mark.parametrize(("own", "ours"), [("single_xla", "single_xla_syncfree"), ("xla", "xla_syncfree")])
def test_layerwise_under_lightnings_strategies_names_ours(own: str, ours: str) -> None:
    rules.check_layerwise(rules.Stepping("optim='sgd_layerwise'", ours))
    with pytest.raises(lightning_optim.IncompatibleTrainer, match=rf"Use Trainer\(strategy='{ours}'\), or optim='sgd'"):
        rules.check_layerwise(rules.Stepping("optim='sgd_layerwise'", own))


def test_what_averages_in_hooks_is_under_the_same_rules_on_xla() -> None:
    for what, text in (({"automatic": False}, "with manual optimization"), ({"sparse": "weight"}, "averages dense")):
        with pytest.raises(lightning_optim.IncompatibleTrainer, match=rf"strategy='xla_syncfree'.*{text}.*optim='sgd'"):
            rules.check_layerwise(rules.Stepping("optim='sgd_layerwise'", "xla_syncfree", **what))
        rules.check_layerwise(rules.Stepping("optim='sgd_layerwise'", "single_xla_syncfree", **what))
