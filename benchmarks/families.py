"""Compares plain and layerwise steps under Lightning, one table per family of optimizers, side by side in one process.

All variants of an optimizer are fits that run at the same time and take turns, a few steps each, in random order;
ratios are taken within rounds. Times are CPU seconds of this process, on a GPU wall-clock time::

    python benchmarks/families.py --output docs/bench             # what docs/layerwise.md shows
    python benchmarks/families.py --compare docs/bench/families.json
    python benchmarks/families.py --all                           # every optimizer that runs here, fewer variants
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import ratios
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from ratios import Ratio
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import REGISTRY, OptimMixin
from lightning_optim.bench import GPT
from lightning_optim.table import ROWS

# A layerwise optimizer is watched in its first three steps, and hooks that read gradients in the first two.
WARM_UP = 4
REPRESENTATIVES = (
    *("adamw_torch", "adamw_torch_fused", "sgd"),
    *("adamw_8bit", "lion_32bit"),
    *("galore_adamw", "adafactor", "grokadamw"),
)
FAMILIES = {"torch": "torch", "bitsandbytes": "bitsandbytes", "lightning_optim": "our own"}
# So that a matrix of 45 x 45 is projected, too.
OPTIONS: dict[str, dict[str, Any]] = {
    name: {"optim_target_modules": "all-linear", "optim_args": {"rank": 8}}
    for name in ("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw")
}


class Deep(OptimMixin, LightningModule):
    """48 narrow layers, 96 tensors: steps so small that what a bucket and a hook cost shows most."""

    def __init__(self, layers: int = 48, **optim: Any) -> None:
        super().__init__(**optim)
        self.layers = nn.ModuleList(nn.Linear(45, 45) for _ in range(layers))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Returns the mean square of the output."""
        (x,) = batch
        for layer in self.layers:
            x = x + nn.functional.gelu(layer(x))
        return x.square().mean()


@dataclass(frozen=True)
class Model:
    """A model to train on one batch over and over."""

    name: str
    build: Callable[..., LightningModule]
    batch: Tensor
    rounds: int
    stretch: int  # steps per turn, the first of which warms the caches up

    def __str__(self) -> str:
        parameters = [parameter.numel() for parameter in self.build(optim="sgd", lr=1.0).parameters()]
        return f"{self.name}, {len(parameters)} tensors, {sum(parameters):,} elements"


@dataclass(frozen=True)
class Variant:
    """A way to step, and the one that it is held against."""

    name: str
    against: str
    suffix: str = "_layerwise"
    options: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)


BY_VALUE = {"gradient_clip_algorithm": "value", "gradient_clip_val": 0.5}
BY_NORM = {"gradient_clip_algorithm": "norm", "gradient_clip_val": 0.5}
PLAIN = Variant("plain", "plain", "")
LAYERWISE = Variant("layerwise", "plain")
VARIANTS = (
    PLAIN,
    LAYERWISE,
    *(Variant(f"bucket_mb={size:g}", "plain", options={"bucket_mb": size}) for size in (1.0, 0.25, 0.0625, 0.0)),
    Variant("plain, clipped by value", "plain", "", trainer=BY_VALUE),
    Variant("clipped by value", "plain, clipped by value", trainer=BY_VALUE),
    Variant("plain, clipped by norm", "plain", "", trainer=BY_NORM),
    *(
        Variant(f"clipped by norm, {name}", "plain, clipped by norm", options=options, trainer=BY_NORM)
        for name, options in {
            "exact": {},
            "norm_budget_mb=64": {"norm_budget_mb": 64},
            "previous": {"norm_clipping": "previous"},
            "per_parameter": {"norm_clipping": "per_parameter"},
        }.items()
    ),
)


class Turns(Callback):
    """A fit in a thread of its own that trains a few steps whenever it is its turn, and takes their seconds."""

    def __init__(self, stretch: int, clock: Callable[[], Any]) -> None:
        self._stretch, self._clock = stretch, clock
        self._mine, self._others = threading.Semaphore(0), threading.Semaphore(0)
        self._at: list[Any] = []
        self._error: BaseException | None = None
        self._threads = torch.get_num_threads()

    def start(self, fit: Callable[[], object]) -> None:
        """Runs a fit that has this callback, up to its first step."""

        def run() -> None:
            torch.set_num_threads(self._threads)  # OpenMP has a number for each thread
            try:
                fit()
            except BaseException as error:
                self._error = error
            self._others.release()

        threading.Thread(target=run, daemon=True).start()
        self._wait()

    def take(self) -> list[Any]:
        """Returns the seconds of the next steps, each from one batch to the next."""
        self._at = []
        self._mine.release()
        self._wait()
        return [after - before for before, after in pairwise(self._at)]

    def _wait(self) -> None:
        self._others.acquire()
        if self._error is not None:
            raise self._error

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._at.append(self._clock())
        if batch_idx % self._stretch == 0:
            self._others.release()
            self._mine.acquire()
            self._at[:] = [self._clock()]


def fit(model: Model, optim: str, variant: Variant, steps: int, callback: Callback) -> None:
    """Trains with the optimizer in this way."""
    options = OPTIONS.get(optim, {})
    arguments = {**options.get("optim_args", {}), **variant.options}
    module = model.build(optim=optim + variant.suffix, lr=1e-4, **{**options, "optim_args": arguments})
    batches = TensorDataset(model.batch.expand(steps, *model.batch.shape))
    trainer = Trainer(
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **variant.trainer,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))


def measure(
    model: Model, optim: str, variants: tuple[Variant, ...], clock: Callable[[], float]
) -> Iterator[ratios.Record]:
    """Yields a record for each variant."""
    warm_up = -(-WARM_UP // model.stretch)
    steps = (warm_up + model.rounds) * model.stretch + 1  # one more, with which the last turn ends
    turns = {variant.name: Turns(model.stretch, clock) for variant in variants}
    for variant in variants:
        callback = turns[variant.name]
        callback.start(partial(fit, model, optim, variant, steps, callback))
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    order, names = random.Random(0), list(turns)
    for number in range(warm_up + model.rounds):
        order.shuffle(names)
        for name in names:
            each = turns[name].take()[1:]
            if number >= warm_up:
                seconds[name].append(statistics.median(each))
    for turn in turns.values():
        turn.take()
    for variant in variants:
        yield {
            "model": model.name,
            "family": family(optim),
            "optimizer": optim,
            "variant": variant.name,
            "against": variant.against,
            "milliseconds": round(statistics.median(seconds[variant.name]) * 1e3, 3),
            "ratio": ratios.as_kept(Ratio.of(seconds[variant.name], seconds[variant.against])),
        }


def family(optim: str) -> str:
    """Returns whose code steps."""
    package = REGISTRY.find(optim).implementation.partition(".")[0]
    return FAMILIES.get(package, package)


def as_text(measured: ratios.Record) -> Iterator[str]:
    """Yields the lines of a table per model and family, and what the figures are."""
    records = measured["records"]
    for model, name in dict.fromkeys((record["model"], record["family"]) for record in records):
        own = [record for record in records if (record["model"], record["family"]) == (model, name)]
        optimizers = list(dict.fromkeys(record["optimizer"] for record in own))
        cells = {(record["optimizer"], record["variant"]): record for record in own}
        for start in range(0, len(optimizers), 4):
            columns = optimizers[start : start + 4]
            yield f"\n{measured['models'][model]}; {name}\n"
            yield f"{'':<35}{'in units of':<25}" + "".join(f"{column:>22}" for column in columns)
            for record in own:
                if record["optimizer"] != columns[0]:
                    continue
                shown = [cells[column, record["variant"]] for column in columns]
                if record["variant"] == PLAIN.name:
                    texts, against = [f"{one['milliseconds']:.2f} ms" for one in shown], ""
                else:
                    texts, against = [str(Ratio(**one["ratio"])) for one in shown], record["against"]
                yield f"{record['variant']:<35}{against:<25}" + "".join(f"{text:>22}" for text in texts)
    yield "\n" + ratios.legend(measured)


def optimizers(everything: bool) -> list[str]:
    """Returns what is compared, in the order of the families."""
    if not everything:
        return list(REPRESENTATIVES)
    # Not those that always step during backward, and what has to be compiled first takes too long.
    return [
        row.name
        for row in ROWS
        if not row.layerwise and not row.compiles and not row.coupled and REGISTRY.find(row.name).availability()
    ]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("optimizers", nargs="*", metavar="OPTIMIZER", help=f"(default: {', '.join(REPRESENTATIVES)})")
    parser.add_argument("--all", action="store_true", help="every optimizer, plain and layerwise by default only")
    parser.add_argument("--rounds", type=int, help="of all variants (default: as many as a model needs)")
    parser.add_argument("--quick", action="store_true", help="tiny models, two rounds: whether it runs")
    ratios.add_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)

    deep: Callable[..., LightningModule] = partial(Deep, layers=4) if arguments.quick else Deep
    gpt: Callable[..., LightningModule] = partial(GPT, layers=1, width=32, heads=2) if arguments.quick else GPT
    tokens = torch.randint(0, 256, (2, 9) if arguments.quick else (16, 129))
    rounds = 2 if arguments.quick else arguments.rounds
    models = [
        Model("deep and narrow", deep, torch.randn(16, 45), rounds or 30, 4),
        Model("gpt", gpt, tokens, rounds or 9, 2),
    ]
    variants = (PLAIN, LAYERWISE) if arguments.all else VARIANTS
    records: list[ratios.Record] = []
    for model in models:
        for optim in arguments.optimizers or optimizers(arguments.all):
            records += measure(model, optim, variants, ratios.clock(arguments.wall))
            print(f"{model.name}, {optim}: {Ratio(**records[1 - len(variants)]['ratio'])}", flush=True)
    measured = ratios.report(records, arguments.wall)
    measured["models"] = {model.name: str(model) for model in models}
    print(*as_text(measured), sep="\n")
    ratios.finish(measured, arguments, "families")


if __name__ == "__main__":
    main()
