"""Methods that we replace on objects of other packages are called there: on the object, not on its class."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from torch.optim import SGD, Optimizer

from tests.models import ForeignTokens, fp16_mixed, loader, trainer

#: Every method that is replaced on an object, and what of ours does not work if it is called on the class.
#: ``test_imports.py`` finds them.
REPLACED = {
    "add_param_group": "the policy for groups that finetuning callbacks add (trainer/callbacks/_thawed.py)",
    "backward": "optimizers that differentiate gradients (trainer/callbacks/_graph.py)",
    "clip_gradients": "the clipping of layerwise optimizers (trainer/callbacks/_layerwise.py)",
    "configure_model": "modules that do not say how they are sharded (trainer/strategies/_blocks.py)",
    "configure_optimizers": "OptimCallback (trainer/_optim_callback.py)",
    "load_checkpoint": "checkpoints of one device for sharded parameters (trainer/strategies/_whole_file.py)",
    "load_state_dict": "exact resume of optimizers that run no hooks (build/_resume.py)",
    "main_params": "parts that clip their own gradients (trainer/callbacks/_own_clips.py)",
    "profile": "the warning for hooks that read gradients (trainer/callbacks/_gradient_readers.py)",
    "save_checkpoint": "distributed checkpoints that are never half written (trainer/strategies/_whole_folder.py)",
    "step": "every layerwise optimizer (layerwise/_engine.py, layerwise/_split_step.py)",
}


class Counts(ForeignTokens):
    """Has calls of a method counted, and handed on."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.calls = name, 0

    def replace(self, owner: Any) -> None:
        own = getattr(owner, self.name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return own(*args, **kwargs)

        setattr(owner, self.name, counted)

    def configure_optimizers(self) -> Optimizer:
        optimizer = SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)
        if hasattr(optimizer, self.name):
            # As ours are made.
            self.replace(optimizer)
        return optimizer


class Replaces(Callback):
    """Replaces a method of the Trainer's parts when a run begins."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if self.owner:
            pl_module.replace(pl_module if self.owner == "lightning_module" else getattr(trainer, self.owner))


class Thaws(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model.head)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.head, optimizer)


@pytest.mark.parametrize(
    ("name", "owner", "flags"),
    [
        ("add_param_group", "", {"callbacks": Thaws}),
        ("backward", "lightning_module", {}),
        ("clip_gradients", "precision_plugin", {}),
        ("clip_gradients", "precision_plugin", {"plugins": fp16_mixed}),
        ("configure_model", "lightning_module", {}),
        ("configure_optimizers", "lightning_module", {}),
        ("load_checkpoint", "strategy", {}),
        ("load_state_dict", "", {}),
        ("main_params", "precision_plugin", {}),
        ("main_params", "precision_plugin", {"plugins": fp16_mixed}),
        ("profile", "profiler", {}),
        ("save_checkpoint", "strategy", {}),
        ("step", "", {}),
        ("step", "", {"plugins": fp16_mixed}),
    ],
)
def test_lightning_calls_what_took_the_place_of_a_method(
    name: str, owner: str, flags: dict[str, Callable[[], Any]], tmp_path: Path
) -> None:
    def fit(epochs: int, ckpt_path: Path | None = None) -> Counts:
        module, made = Counts(name), {flag: [make()] for flag, make in flags.items()}
        made["callbacks"] = [Replaces(owner), *made.get("callbacks", [])]
        run = trainer(gradient_clip_val=1.0, max_epochs=epochs, **made)
        run.fit(module, loader(1), ckpt_path=ckpt_path)
        if ckpt_path is None:
            run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
        return module

    called = fit(2)
    if name in ("load_checkpoint", "load_state_dict"):
        assert called.calls == 0
        called = fit(3, tmp_path / "a.ckpt")
    assert called.calls > 0, (
        f"lightning {importlib.metadata.version('lightning')} does not call what took the place of {name} on an "
        f"object; it is needed for {REPLACED[name]}"
    )


def test_a_scaler_calls_what_took_the_place_of_step() -> None:
    weight = torch.ones(1, requires_grad=True)
    optimizer, calls = SGD([weight], lr=0.1), []
    optimizer.step = lambda *_, **__: calls.append("step")  # type: ignore[method-assign, assignment]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    assert calls == ["step"], f"torch {torch.__version__} does not call step on an object: {REPLACED['step']}"
