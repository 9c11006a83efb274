"""Promises about states: a training that goes on elsewhere goes on as if it had not been interrupted."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lightning_optim.build import measured_bytes
from lightning_optim.testing._broken import NotSaid, expect, expect_same, expecting
from lightning_optim.testing._subject import REFERENCE, Subject
from lightning_optim.testing._trial import Trial

_BEFORE = 4


def resume(subject: Subject) -> None:
    """A state dict loaded into a new optimizer continues bit for bit."""
    interrupted, resumed = subject.trial(), subject.trial()
    interrupted.advance(range(_BEFORE))
    saved = _saved(interrupted, weights_only=False)
    resumed.module.load_state_dict(saved["weights"])
    with expecting("its own state to load into a new optimizer"):
        resumed.optimizer.load_state_dict(saved["optimizer"])
    expect_same(resumed.outcome(), interrupted.outcome(), "the saved state after loading")
    resumed.advance(range(_BEFORE, REFERENCE))
    expect_same(resumed.outcome(), subject.after(REFERENCE), "an exact continuation")


def weights_only(subject: Subject) -> None:
    """The state is tensors and plain values, read with ``weights_only=True``."""
    trial = subject.trial()
    trial.advance(range(2))
    stray = _stray(_saved(trial, weights_only=True)["optimizer"], "state_dict")
    expect(not stray, "tensors and plain values in the state", stray)


def _saved(trial: Trial, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save({"weights": trial.module.state_dict(), "optimizer": trial.optimizer.state_dict()}, file)
    file.seek(0)
    with expecting(f"torch.load(weights_only={weights_only}) to read the state"):
        return torch.load(file, weights_only=weights_only)


def _stray(value: Any, where: str) -> str:
    """Returns what is neither an ordinary tensor nor a plain value, or an empty text."""
    if isinstance(value, dict):
        return next(filter(None, (_stray(item, f"{where}[{key!r}]") for key, item in value.items())), "")
    if isinstance(value, (list, tuple)):
        return next(filter(None, (_stray(item, f"{where}[{i}]") for i, item in enumerate(value))), "")
    plain = type(value) in (Tensor, torch.nn.Parameter, int, float, bool, str, type(None))
    return "" if plain else f"{where} is a {type(value).__name__}"


def deepcopy(subject: Subject) -> None:
    """A deep copy of module and optimizer trains on by itself."""
    _copies(subject, copy.deepcopy, "copy.deepcopy((module, optimizer)) to work")


def pickled(subject: Subject) -> None:
    """Module and optimizer go through pickle and train on."""
    _copies(subject, lambda pair: pickle.loads(pickle.dumps(pair)), "pickle to take (module, optimizer)")


def _copies(subject: Subject, through: Callable[[Any], Any], expected: str) -> None:
    trial = subject.trial()
    trial.advance(range(_BEFORE))
    with expecting(expected):
        copied = subject.training(*through((trial.module, trial.optimizer)))
    expect_same(copied.outcome(), trial.outcome(), "a copy that equals the original")
    with expecting("a copy that can be stepped"):
        copied.advance(range(_BEFORE, REFERENCE))
    expect_same(trial.outcome(), subject.after(_BEFORE), "an original that stays while its copy is stepped")
    expect_same(copied.outcome(), subject.after(REFERENCE), "a copy that trains on as the original does")


def distributed_checkpoint(subject: Subject) -> None:
    """A state continues bit for bit after ``torch.distributed.checkpoint``."""
    interrupted, resumed = subject.trial(), subject.trial()
    interrupted.advance(range(_BEFORE))
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder, expecting("a round trip of the state"):
        # About a single process, and about the directory.
        warnings.simplefilter("ignore")
        saved = get_optimizer_state_dict(interrupted.module, interrupted.optimizer)
        state_dict_saver.save({"optimizer": saved}, checkpoint_id=folder, no_dist=True)
        read = {"optimizer": get_optimizer_state_dict(resumed.module, resumed.optimizer)}
        state_dict_loader.load(read, checkpoint_id=folder, no_dist=True)
        resumed.module.load_state_dict(interrupted.module.state_dict())
        set_optimizer_state_dict(resumed.module, resumed.optimizer, read["optimizer"])
    resumed.advance(range(_BEFORE, REFERENCE))
    expect_same(resumed.weights(), subject.after(REFERENCE)["weights"], "an exact continuation")


def state_bytes(subject: Subject) -> None:
    """The state takes the bytes that the row counts."""
    module = subject.module()
    resolved = subject.resolve(module)
    if resolved.state_bytes is None:
        raise NotSaid("the row does not describe the state")
    trial = subject.training(module, resolved.optimizer)
    trial.advance(range(1))
    quantization = resolved.spec.state.quantization if resolved.spec.state else None
    measured = measured_bytes(trial.optimizer.state_dict(), quantization.tables if quantization else ())
    expect(measured == resolved.state_bytes, f"{resolved.state_bytes} bytes of state", f"it takes {measured}")
