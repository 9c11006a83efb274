"""One fit: real training by the Trainer, or a few steps of it to see what memory it takes."""

from __future__ import annotations

import gc
import logging
import math
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_optim.bench._watching import MemoryWatch, Recorder
from lightning_optim.bench._workload import Workload
from lightning_optim.build import OptimConfig
from lightning_optim.choose import lightning_says
from lightning_optim.errors import InvalidOption
from lightning_optim.trainer import OptimCallback, OptimMixin

#: Taken where the module logs no validation loss: the mean over the last tenth of the steps.
TRAINING_LOSS = "training loss"
_LAST = 0.1
_VALIDATION_LOSS = "val_loss"
_MEMORY_STEPS = 3


@dataclass(frozen=True)
class Judgement:
    """What a trial is judged by at its end.

    Attributes:
        metric: A name that the module logs; ``None`` takes ``val_loss`` if it logs that, else the training loss.
        maximize: Whether more is better.
    """

    metric: str | None = None
    maximize: bool = False


def train(
    workload: Workload,
    config: OptimConfig,
    seed: int,
    steps: int,
    judgement: Judgement,
    on_step: Callable[[], None],
) -> dict[str, Any]:
    """Trains from scratch to the end of the schedule, validates, and returns what came out as plain values.

    Raises:
        InvalidOption: If the module does not log the metric.
    """
    recorder = Recorder(on_step)
    start = time.perf_counter()
    failure = None
    try:
        trainer = _fit(workload, config, seed, steps, recorder, validate=True)
    except torch.OutOfMemoryError:
        return {"failure": "out of memory", "value": None}
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # Weights that are no numbers any more cannot be decomposed.
        return {"failure": "diverged", "value": None}
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    losses = recorder.losses()
    metric = judgement.metric or (_VALIDATION_LOSS if _VALIDATION_LOSS in metrics else TRAINING_LOSS)
    if metric == TRAINING_LOSS and losses:
        value = statistics.fmean(losses[-max(1, int(_LAST * len(losses))) :])
    elif metric in metrics:
        value = metrics[metric]
    else:
        known = ", ".join(sorted(metrics)) or "nothing"
        raise InvalidOption(
            f"the module logs no {metric!r} by the end of training and validation; it logs: {known}. Name one of "
            "these: --metric NAME",
            code="LO529",
        )
    if not math.isfinite(value):
        failure = "diverged"
    seconds = recorder.step_seconds()
    per_second = recorder.batches_per_step() / seconds
    return {
        "failure": failure,
        "metric": metric,
        "value": None if failure else value,
        "curve": [(step, loss if math.isfinite(loss) else None) for step, loss in recorder.curve()],
        "step_seconds": seconds,
        "samples_per_second": None if recorder.samples is None else recorder.samples * per_second,
        "tokens_per_second": None if recorder.tokens is None else recorder.tokens * per_second,
        "seconds": time.perf_counter() - start,
    }


def measure_memory(workload: Workload, config: OptimConfig) -> dict[str, Any]:
    """Takes a few steps and returns the bytes they needed as plain values."""
    watch = MemoryWatch(compiles=config.spec.compiles, in_backward=config.spec.layerwise)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        _fit(workload, config, 0, _MEMORY_STEPS, watch, validate=False)
    except torch.OutOfMemoryError:
        return {"failure": "out of memory", "peak_bytes": None, "state_bytes": None, "method": watch.method}
    return {"failure": None, "peak_bytes": watch.peak, "state_bytes": watch.state, "method": watch.method}


def _fit(workload: Workload, config: OptimConfig, seed: int, steps: int, callback: Callback, validate: bool) -> Trainer:
    seed_everything(seed, verbose=False)
    module, data, arguments = workload.make()
    callbacks = [*arguments.pop("callbacks", ()), callback]
    _give_optimizer(module, config, callbacks)
    batches = steps * arguments.get("accumulate_grad_batches", 1)
    if not validate:
        arguments["limit_val_batches"] = 0
    trainer = Trainer(
        **arguments,
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=batches,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=callbacks,
    )
    try:
        trainer.fit(module, datamodule=data)
    except SystemExit:
        if not trainer.interrupted:
            raise
        # Lightning ends the process at Ctrl-C, and ignores the next; what is finished has still to be told.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from None
    return trainer


def _give_optimizer(module: LightningModule, config: OptimConfig, callbacks: list[Callback]) -> None:
    """Has the module trained as ``config`` says, in the way that its class allows."""
    if isinstance(module, OptimMixin):
        module.optim_config = config
        return
    callback = OptimCallback(**asdict(config))
    if not is_overridden("configure_optimizers", module):
        # Lightning refuses such a module before it runs callbacks.
        callback.install(module)
    callbacks.insert(0, callback)


def _once(show: Callable[..., None]) -> Callable[..., None]:
    """Shows each text once: every fit changes the filters somewhere, and Python forgets then what it has shown."""
    shown: set[str] = set()

    def show_new(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            show(message, *args, **kwargs)

    return show_new


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what Lightning and we say at every start of a fit; a warning that is new is shown once."""
    with lightning_says(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        warnings.showwarning = _once(warnings.showwarning)
        yield
