"""``OptimizerMonitor``: logs what optimizers really do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim._compat.lightning import logged_step
from lightning_optim.errors import IncompatibleTrainer, InvalidOption, listing
from lightning_optim.trainer import _packages as packages
from lightning_optim.trainer.callbacks._monitor_histograms import Histograms, summary
from lightning_optim.trainer.callbacks._monitor_numbers import METRICS, Numbers
from lightning_optim.trainer.callbacks._monitor_steps import Steps
from lightning_optim.trainer.callbacks._monitor_units import Per

_MIB = 2**20
# What is known where a strategy keeps gradients and weights to itself.
_ALWAYS_KNOWN = ("lr", "state_bytes")


class OptimizerMonitor(Callback):
    """Logs what the optimizers really do, to all loggers, ``trainer.callback_metrics`` and the progress bar.

    The names are ``optim/METRIC`` for all of an optimizer and ``optim/METRIC/UNIT`` for each param group or layer;
    with several optimizers ``optim_0/...``, ``optim_1/...``. The metrics:

    - ``lr``: the rate that the last step used, of each group; for all where the groups agree.
    - ``grad_norm``: 2-norm of the last step's gradients, before clipping and without loss scaling, also where they
      are freed during backward.
    - ``grad_norm_max``: the largest finite norm since the last time.
    - ``update_ratio``: norm of what the last step changed, by the norm of the weights before it.
    - ``momentum_norm``: norm of the first moments; of projected parameters, in their subspace.
    - ``nonfinite_steps``: steps with a gradient that was NaN or infinite, since training began.
    - ``skipped_steps``: steps that left a parameter as it was although it had a gradient, because loss scaling
      overflowed, since training began.
    - ``projection``: of GaLore and APOLLO: ``projection/refreshes``, how many subspaces were found;
      ``projection/energy``, the part of the squared gradient norm that is left in the subspace; ``projection/skipped``
      and ``projection/kept``, how often a parameter was not stepped and a decomposition failed.
    - ``state_bytes``: bytes of the state that this process holds.

    What is not known is left out. Between the steps that are logged nothing waits for the device.

    ``grad_norm_max`` and ``nonfinite_steps`` look at the gradients of every step, the others only at those of the steps
    that are logged: where a model is many small tensors, leave these two out of ``metrics`` for the least overhead.

    Args:
        every_n_steps: Optimizer steps between two logs; ``None`` takes the Trainer's ``log_every_n_steps``, so that the
            values stand next to those that ``self.log`` writes, under the same step numbers.
        per: ``"group"``, or ``"layer"``: the module that owns a parameter.
        metrics: Which to log.
        prog_bar: Which to show in the progress bar, for all of each optimizer.
        log_histograms: Whether to log histograms of gradients and weights, to TensorBoard.
        copy_mb: The most MiB of weights to copy at once for ``update_ratio``. A plain step moves all weights at once;
            if they are larger, evenly spaced elements stand for all. A layerwise step copies a bucket at a time.

    Raises:
        InvalidOption: If an argument is none of the above.
        IncompatibleTrainer: At the start of fit, if nothing could be logged, or a histogram by no logger.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        per: Per = "group",
        *,
        metrics: Collection[str] = METRICS,
        prog_bar: Collection[str] = (),
        log_histograms: bool = False,
        copy_mb: float = 256,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise InvalidOption(
                f"every_n_steps={every_n_steps!r} is not a number of steps: give 1 or more, or None", code="LO204"
            )
        if per not in get_args(Per):
            raise InvalidOption(f"per={per!r} is unknown; use one of {listing(get_args(Per))}", code="LO207")
        if not copy_mb > 0:
            raise InvalidOption(
                f"copy_mb={copy_mb!r} is not a size: give MiB, or leave 'update_ratio' out of metrics", code="LO204"
            )
        metrics, prog_bar = _names("metrics", metrics, METRICS), _names("prog_bar", prog_bar, METRICS)
        unlogged = [name for name in prog_bar if name not in metrics]
        if unlogged:
            raise InvalidOption(
                f"prog_bar shows {listing(unlogged)}, which is not among metrics={listing(metrics)}", code="LO207"
            )
        self.every_n_steps = every_n_steps
        self.per = per
        self.metrics = metrics
        self.prog_bar = prog_bar
        self.log_histograms = log_histograms
        self.copy_mb = copy_mb
        self._numbers: list[Numbers] = []
        self._counts: list[dict[str, dict[str, int]]] = []
        self._said: set[str] = set()

    @property
    def state_key(self) -> str:
        """Differs for monitors that log differently."""
        return f"{type(self).__qualname__}{{'every_n_steps': {self.every_n_steps!r}, 'per': {self.per!r}}}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            # Before a checkpoint is restored.
            self._counts = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._interval(trainer) == 0:
            raise IncompatibleTrainer(
                "OptimizerMonitor logs every log_every_n_steps steps, and Trainer(log_every_n_steps=0) logs never. "
                "Give it every_n_steps, for instance OptimizerMonitor(every_n_steps=50).",
                code="LO530",
            )
        if self.log_histograms and not _tensorboards(trainer):
            others = listing(type(logger).__name__ for logger in trainer.loggers) or "none"
            raise IncompatibleTrainer(
                f"log_histograms=True needs a TensorBoardLogger, and the Trainer's loggers are: {others}. Use "
                "Trainer(logger=TensorBoardLogger('logs')), also together with others: logger=[CSVLogger('logs'), "
                "TensorBoardLogger('logs')]; or leave log_histograms out.",
                code="LO530",
            )
        if not trainer.loggers and not self.prog_bar:
            rank_zero_warn(
                "OptimizerMonitor has no logger to write to and nothing to show: its values are in "
                "trainer.callback_metrics only. Give the Trainer a logger, or it prog_bar=['grad_norm']."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # When states and counts have been restored.
        self._detach()
        names: dict[Tensor, str] = {parameter: name for name, parameter in pl_module.named_parameters()}
        blind = isinstance(trainer.strategy, packages.kin(DeepSpeedStrategy, FSDPStrategy))
        metrics: Sequence[str] = self.metrics
        if blind:
            metrics = [name for name in metrics if name in _ALWAYS_KNOWN]
            self._say(
                f"{type(trainer.strategy).__name__} keeps gradients and weights to itself: OptimizerMonitor logs "
                f"{listing(metrics)} only."
            )
        for index, optimizer in enumerate(trainer.optimizers):
            histograms = Histograms() if self.log_histograms and not blind else None
            copy_bytes = max(1, int(self.copy_mb * _MIB))
            steps = Steps(optimizer, names, self.per, metrics, copy_bytes, histograms, blind=blind)
            numbers = Numbers(steps, metrics)
            if index < len(self._counts):
                numbers.counts = self._counts[index]
            self._numbers.append(numbers)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        measures = self._is_due(trainer)
        for numbers in self._numbers:
            numbers.steps.measures, numbers.steps.stepped = measures, False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        for numbers in self._numbers:
            if numbers.steps.optimizer is optimizer:
                numbers.steps.before_step(scaler)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for numbers in self._numbers:
            numbers.steps.end_skipped()
        if self._is_due(trainer) and any(numbers.steps.stepped for numbers in self._numbers):
            self._log(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Without asking the device, which may be what failed.
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._numbers:
            self._counts = [numbers.state_dict() for numbers in self._numbers]
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Returns what was counted, of each optimizer."""
        return {"counts": [numbers.state_dict() for numbers in self._numbers] or self._counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what was counted before the checkpoint."""
        self._counts = state_dict["counts"]

    # Inside.

    def _interval(self, trainer: Trainer) -> int:
        return int(trainer.log_every_n_steps if self.every_n_steps is None else self.every_n_steps)  # type: ignore[attr-defined]

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether the step that this batch belongs to is logged, by Lightning's own rule for ``self.log``."""
        return (logged_step(trainer) + 1) % self._interval(trainer) == 0

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = logged_step(trainer)
        logged: dict[str, float] = {}
        shown: dict[str, float] = {}
        for index, numbers in enumerate(self._numbers):
            prefix = "optim" if len(self._numbers) == 1 else f"optim_{index}"
            self._say_unknown(numbers.steps)
            values, histograms = numbers.collect()
            names = {key: "/".join(filter(None, (prefix, *key))) for key in values}
            logged.update((names[key], value) for key, value in values.items())
            shown.update((names[key], value) for key, value in values.items() if self._shows(*key, values))
            for (what, unit), counts in histograms.items():
                for logger in _tensorboards(trainer):
                    tag = "/".join(filter(None, (prefix, what, unit)))
                    logger.experiment.add_histogram_raw(tag, **summary(counts), global_step=step)
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=step)
        device = trainer.strategy.root_device
        trainer.callback_metrics.update(
            zip(logged, torch.tensor([*logged.values()], device=device).unbind(), strict=True)
        )
        for name, value in shown.items():
            pl_module.log(name, value, prog_bar=True, logger=False)

    def _shows(self, metric: str, unit: str, values: Any) -> bool:
        """Whether the progress bar shows a value: that of all, or those of the groups where their rates differ."""
        family = metric.partition("/")[0]
        return family in self.prog_bar and (not unit or (metric, "") not in values)

    def _say_unknown(self, steps: Steps) -> None:
        name = type(steps.optimizer).__name__
        if steps.unknown_momenta:
            self._say(f"optim/momentum_norm is left out where {name} keeps no first moment, or a quantized one.")
        if steps.sampled:
            self._say(
                f"optim/update_ratio of {name} is taken from evenly spaced elements of the weights: all together are "
                f"larger than copy_mb={self.copy_mb}."
            )

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            rank_zero_info(text)

    def _detach(self) -> None:
        for numbers in self._numbers:
            numbers.steps.detach()
        self._numbers = []


def _names(argument: str, given: Collection[str], known: Sequence[str]) -> tuple[str, ...]:
    given = (given,) if isinstance(given, str) else tuple(given)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InvalidOption(
            f"{argument} of OptimizerMonitor has {listing(unknown)}; use {listing(known)}", code="LO207"
        )
    return given


def _tensorboards(trainer: Trainer) -> list[Any]:
    return [logger for logger in trainer.loggers if isinstance(logger, packages.kin(TensorBoardLogger))]
