"""What a user does with an installed package, in an environment without the repository: see .ci/test-installed.

``installed.py bare FILE`` runs where no optional package is installed, and writes the commands that the refusals name
to FILE; ``installed.py complete`` runs after these commands. ``fit`` is the fresh process of the others.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim
from lightning_optim import REGISTRY, OptimMixin, build_optimizer
from lightning_optim.errors import MissingDependency
from lightning_optim.testing import check_optimizer

# What runs on a CPU. The others' packages need another device or another torch.
PACKAGES = ("bitsandbytes", "schedulefree", "torch-optimi", "torchao")


class Model(OptimMixin, L.LightningModule):
    """Two matrices."""

    def __init__(self, optim: str) -> None:
        super().__init__(optim=optim, lr=1e-2, lr_scheduler="cosine", warmup_steps=2)
        self.net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])


def fit(optim: str, resume: str) -> None:
    """Trains three epochs, or what is left of them after the checkpoint ``resume``, and saves the weights."""
    torch.set_num_threads(1)
    L.seed_everything(1)
    x = torch.randn(32, 8)
    data = DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=8)
    each = ModelCheckpoint(".", f"{optim}-{{step}}", save_top_k=0 if resume else -1)
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", logger=False, callbacks=each)
    model = Model(optim)
    before = model.net[0].weight.clone()
    trainer.fit(model, data, ckpt_path=resume or None, weights_only=True)
    assert trainer.global_step == 12
    assert not torch.equal(before, model.net[0].weight)
    torch.save(model.state_dict(), "resumed.pt" if resume else "whole.pt")


def resumes(optim: str) -> None:
    """A training that goes on in a fresh process ends with the weights of one that was not interrupted."""
    for resume in ("", f"{optim}-step=4.ckpt"):
        _run(sys.executable, __file__, "fit", optim, resume)
    whole, resumed = torch.load("whole.pt"), torch.load("resumed.pt")
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items()), f"{optim} differs after the resume"
    print(f"  {optim} resumes")


def commands(status: int) -> None:
    """The command that was installed beside Python; ``doctor`` ends with ``status``."""
    tool = str(Path(sys.executable).parent / "lightning-optim")
    assert "adamw_torch_fused" in _run(tool, "list", "adamw_torch*")
    assert "bitsandbytes" in _run(tool, "info", "lion_8bit")
    assert lightning_optim.__version__ in _run(tool, "doctor", status=status)
    assert "unknown-optimizer" in _run(tool, "explain")
    example = json.loads(_run(tool, "info", "adamw_torch", "--json"))["example"]["python"]
    _run(sys.executable, "-c", example)
    print("  lightning-optim list, info, doctor, explain and what they show run")


def refusals(target: Path) -> None:
    """Every identifier whose package is not here is refused with the command that installs it."""
    found: dict[str, str] = {}
    refused = [name for name in REGISTRY if not _allowed(name, found)]
    assert set(PACKAGES) <= set(found), found
    print(f"  {len(refused)} identifiers refused for want of {', '.join(sorted(found))}")
    try:
        from lightning_optim import OptimCLI  # noqa: F401
    except MissingDependency as error:
        found["cli"] = error.text[error.text.index("pip install") :]
    target.write_text("".join(f"{found[key]}\n" for key in (*PACKAGES, "cli")))


def _allowed(name: str, found: dict[str, str]) -> bool:
    """Returns whether no package of ``name`` is absent, and adds the command for each that is to ``found``."""
    absent = [one for one in REGISTRY[name].requirements if one.installed_version() is None]
    if not absent:
        return True
    try:
        build_optimizer(nn.Linear(2, 2), name)
    except MissingDependency as error:
        text = str(error)
    else:
        raise AssertionError(f"{name} was built without {absent}")
    for one in absent:
        assert f"the package {one.distribution!r} is not installed: {one.install_command}" in text, text
        found[one.distribution] = one.install_command
    return False


def readme() -> None:
    """The first example of the README, which the archive carries as its description."""
    text = importlib.metadata.metadata("lightning-optim").get_payload()
    example = re.search(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert example
    Path("readme.py").write_text(example[1])
    _run(sys.executable, "readme.py")
    print("  the README's example trains")


def _run(*words: str, status: int = 0) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


def main(mode: str, *arguments: str) -> None:
    if mode == "fit":
        return fit(*arguments)
    where = Path(lightning_optim.__file__)
    assert where.is_relative_to(sys.prefix), where
    assert where.with_name("py.typed").exists()
    print(f"{mode}: lightning-optim {lightning_optim.__version__} in {where.parent.parent}")
    if mode == "bare":
        # What is said of a machine where packages are absent.
        commands(status=1)
        refusals(Path(arguments[0]))
        names = ("adamw_torch_layerwise", "muon")
        resumes("adamw_torch_layerwise")
    else:
        from lightning_optim import OptimCLI  # noqa: F401

        commands(status=0)
        for name in REGISTRY.plain:
            absent = {one.distribution for one in REGISTRY[name].requirements if one.installed_version() is None}
            assert not absent & set(PACKAGES), f"{name}: {absent}"
        names = ("adamw_8bit", "schedule_free_adamw", "stable_adamw", "adamw_torch_8bit")
        resumes("adamw_8bit_layerwise")
        readme()
    for name in names:
        check_optimizer(name)
        print(f"  {name} keeps what is promised")
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
