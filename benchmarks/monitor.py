"""Times steps with ``OptimizerMonitor`` against steps without it, at its default interval, in one training.

Every other stretch of 50 steps, in random order within a pair, has the monitor at work, and ends with its log. Times
are CPU seconds of this process, on a GPU wall-clock time::

    python benchmarks/monitor.py --output docs/bench
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import ratios
import torch
from layerwise_variants import Block, Net
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from ratios import Ratio
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import OptimizerMonitor, OptimMixin
from lightning_optim.bench import GPT
from lightning_optim.trainer.callbacks._monitor_numbers import METRICS
from lightning_optim.trainer.callbacks._monitor_steps import OF_EVERY_STEP, Steps

INTERVAL = 50
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "per layer": {"per": "layer"},
    "logged steps only": {"metrics": [name for name in METRICS if name not in OF_EVERY_STEP]},
}


class Plain(OptimMixin, LightningModule):
    """Trains a network that returns its loss."""

    def __init__(self, net: nn.Module, **optim: Any) -> None:
        super().__init__(**optim)
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Returns the loss."""
        loss: Tensor = self.net(batch[0])["loss"]
        return loss


class Inside:
    """The seconds that pass inside the functions it wraps, those that call each other counted once."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds = 0.0
        self._depth = 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function with its time taken."""

        def call(*args: Any, **kwargs: Any) -> Any:
            started = self.clock()
            self._depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += self.clock() - started

        return call


class Stretches(Callback):
    """Has the monitor hooked in for one stretch of each pair, and times both."""

    def __init__(self, monitor: OptimizerMonitor, pairs: int, clock: Callable[[], float]) -> None:
        self.monitor = monitor
        self.clock = clock
        self.inside = Inside(clock)
        for name in ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"):
            setattr(monitor, name, self.inside.timed(getattr(monitor, name)))
        order = random.Random(0)
        # The first pair warms up.
        self.order = [on for _ in range(pairs + 1) for on in order.sample([True, False], 2)]
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.shares: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        on = self.order[batch_idx // INTERVAL]
        if batch_idx % INTERVAL == 0:
            if on:
                self.monitor.on_train_start(trainer, pl_module)
            self.started, self.inside.seconds = self.clock(), 0.0
        if on:
            self.monitor.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.monitor.on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        on = self.order[batch_idx // INTERVAL]
        if on:
            self.monitor.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if (batch_idx + 1) % INTERVAL == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if batch_idx >= 2 * INTERVAL:
                self.seconds[on].append(self.clock() - self.started)
                if on:
                    self.shares.append(self.inside.seconds / self.seconds[on][-1])
            if on:
                self.monitor.teardown(trainer, pl_module, "fit")


def measure(
    module: LightningModule, data: Tensor, monitor: OptimizerMonitor, pairs: int, clock: Callable[[], float]
) -> ratios.Record:
    """Returns the milliseconds of a step without the monitor, the ratio, and the share inside the monitor."""
    stretches = Stretches(monitor, pairs, clock)
    own = {name: getattr(Steps, name) for name in ("see_gradients", "see_step", "_prepare", "_after_step")}
    for name, function in own.items():
        setattr(Steps, name, stretches.inside.timed(function))
    batches = 2 * (pairs + 1) * INTERVAL
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=batches,
            logger=CSVLogger(folder),
            callbacks=[stretches],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        dataset = TensorDataset(data.expand(batches, *data.shape))
        trainer.fit(module, DataLoader(dataset, batch_size=None))
    for name, function in own.items():
        setattr(Steps, name, function)
    with_it, without = stretches.seconds[True], stretches.seconds[False]
    return {
        "milliseconds": round(statistics.median(without) / INTERVAL * 1e3, 3),
        "ratio": ratios.as_kept(Ratio.of(with_it, without)),
        "inside": round(statistics.median(stretches.shares), 5),
    }


def as_text(measured: ratios.Record) -> Iterator[str]:
    """Yields the lines of the table, and what the figures are."""
    yield f"{'model':<18}{'optimizer':<24}{'monitor':<20}{'ms/step':>9}{'x without':>24}{'inside':>9}"
    for one in measured["records"]:
        ratio = Ratio(**one["ratio"])
        yield (
            f"{one['model']:<18}{one['optimizer']:<24}{one['variant']:<20}{one['milliseconds']:>9.2f}"
            f"{f'{ratio.median:.3f} ({ratio.low:.3f} - {ratio.high:.3f})':>24}{one['inside']:>9.2%}"
        )
    yield f"""
ms/step    a step without the monitor
default    all that is logged per group, of which grad_norm_max and nonfinite_steps look at every step's gradients;
           "logged steps only" is without these two
x without  a stretch of {INTERVAL} steps with the monitor, one log included, in units of one without
inside     the share of the time that passes in the monitor's own code, which a busy machine disturbs less
"""
    yield ratios.legend(measured)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="pairs of stretches (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny models, one pair: whether it runs")
    ratios.add_options(parser)
    arguments = parser.parse_args()
    pairs = 1 if arguments.quick else arguments.pairs
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)

    records: list[ratios.Record] = []
    for model in ("deep and narrow", "gpt"):
        for optim in ("adamw_torch", "adamw_torch_layerwise"):
            for variant, options in VARIANTS.items():
                if model == "gpt":
                    sizes = {"layers": 1, "width": 32, "heads": 2} if arguments.quick else {}
                    module: LightningModule = GPT(optim=optim, lr=1e-4, **sizes)
                    data = torch.randint(0, 256, (2, 9) if arguments.quick else (16, 129))
                else:
                    blocks = (Block(96) for _ in range(2 if arguments.quick else 49))
                    module = Plain(Net(nn.Sequential(*blocks), 96), optim=optim, lr=1e-4)
                    data = torch.randn(16, 96)
                names = {"model": model, "optimizer": optim, "variant": variant, "against": "without the monitor"}
                clock = ratios.clock(arguments.wall)
                records.append(names | measure(module, data, OptimizerMonitor(**options), pairs, clock))
    measured = ratios.report(records, arguments.wall)
    print(*as_text(measured), sep="\n")
    ratios.finish(measured, arguments, "monitor")


if __name__ == "__main__":
    main()
