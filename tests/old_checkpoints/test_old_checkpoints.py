"""Checkpoints and pickles of earlier versions go on as they would have then."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import OptimConfig, OptimMixin
from lightning_optim.optimizers import GaLoreAdamW
from tests.old_checkpoints.write import REQUESTS, fit, made

#: One for each version that was released.
FOLDERS = sorted(path for path in Path(__file__).parent.iterdir() if (path / "module.pt").is_file())
by_version = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def test_every_released_version_has_a_folder() -> None:
    changelog = (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## (\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert sorted(released) == [folder.name for folder in FOLDERS]


@by_version
@pytest.mark.parametrize("name", REQUESTS)
def test_training_goes_on(folder: Path, name: str) -> None:
    model = made(name)
    fit(model, 10, folder / f"{name}.ckpt")
    expected = torch.load(folder / f"{name}.weights", weights_only=True)
    assert model.state_dict().keys() == expected.keys()
    # The arithmetic of another processor rounds otherwise.
    for key, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[key], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is not public and has moved:DeprecationWarning")
@by_version
def test_a_pickled_module_trains(folder: Path) -> None:
    model: Any = torch.load(folder / "module.pt", weights_only=False)
    assert isinstance(model, OptimMixin)
    assert model.optim_config == OptimConfig("adamw_8bit", lr=1e-2, weight_decay=0.1, optim_args={"min_8bit_size": 256})
    fit(model, 5)
    assert model.losses[-1] < model.losses[0]


@pytest.mark.filterwarnings("ignore:.*is not public and has moved:DeprecationWarning")
@by_version
def test_a_pickled_optimizer_steps(folder: Path) -> None:
    optimizer = torch.load(folder / "optimizer.pt", weights_only=False)
    assert type(optimizer) is GaLoreAdamW
    before = [parameter.clone() for group in optimizer.param_groups for parameter in group["params"]]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("config", "OptimConfig", "build._config"),
        ("optimizers.galore", "GaLoreAdamW", "optimizers._galore"),
        ("optimizers.foreign", "MARKS", "stepping._state_marks"),
        ("adapters.schedulefree", "AdamWScheduleFree", "optimizers.adapters._schedulefree"),
        ("catalog.layerwise", "SUFFIX", "table._layerwise"),
        ("catalog", "ROWS", "table.rows"),
        ("callbacks.optim", "OptimCallback", "trainer._optim_callback"),
        ("strategies.fused", "FusedStrategy", "trainer.strategies._fused"),
    ],
)
def test_old_paths_lead_to_the_same_objects(old: str, name: str, new: str) -> None:
    sys.modules.pop(f"lightning_optim.{old}", None)
    with pytest.warns(DeprecationWarning, match="has moved; import public names from lightning_optim"):
        module = importlib.import_module(f"lightning_optim.{old}")
    assert getattr(module, name) is getattr(importlib.import_module(f"lightning_optim.{new}"), name)


@pytest.mark.parametrize("path", ["nothing", "optimizers.nothing", "build.nothing", "nothing._nothing"])
def test_what_never_was_is_not_found(path: str) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"lightning_optim.{path}")
