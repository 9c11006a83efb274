"""The plugin in ``examples/`` can be built, installed, listed, checked and trained with."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from tests.processes import ROOT

_USE = """
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_optim import OptimMixin
from lightning_optim.command import main

assert main(["list", "signum*"]) == 0
assert main(["check", "signum"]) == 0


class Module(OptimMixin, L.LightningModule):
    def __init__(self, **optim):
        super().__init__(**optim)
        self.net = nn.Linear(8, 1)
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch) - 1).square().mean()
        self.losses.append(loss.item())
        return loss


weights = []
for name in ("signum", "signum_layerwise"):
    torch.manual_seed(0)
    module = Module(optim=name, lr=1e-2)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    L.Trainer(accelerator="cpu", max_epochs=4, **off).fit(module, DataLoader(torch.randn(64, 8), batch_size=8))
    assert module.losses[-1] < 0.5 * module.losses[0], module.losses
    weights.append(module.net.weight)
assert torch.equal(*weights)
"""


def test_the_plugin_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    # A copy: building leaves files behind.
    shutil.copytree(ROOT / "examples" / "plugin", tmp_path / "plugin")
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    site = environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    # torch and all else come from where the tests run.
    site.joinpath("here.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, "--no-build-isolation", str(tmp_path / "plugin")], check=True, timeout=120)
    used = subprocess.run(
        [str(python), "-c", _USE], check=False, cwd=tmp_path, timeout=200, capture_output=True, text=True
    )
    assert used.returncode == 0, used.stderr
    assert "the sign of the averaged gradient" in used.stdout
    assert "1 of 1 break no promise" in used.stdout
