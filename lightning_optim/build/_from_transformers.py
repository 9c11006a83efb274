"""From Hugging Face's ``TrainingArguments`` to the arguments here: what trains there trains here, or a remark says why.

``_training_arguments.py`` has the rows, ``_training_optimizers.py`` what reaches which optimizer there,
``_arguments_source.py`` reads. Every argument that is given is written, in a remark, or asks for nothing: none is lost.
transformers is never imported.
"""

from __future__ import annotations

import difflib
import math
from typing import Any

from lightning_optim.build._arguments_source import Source, read
from lightning_optim.build._conversion import Conversion, Kind, Remark
from lightning_optim.build._curves import SCHEDULES
from lightning_optim.build._training_arguments import DIALECTS, TRAINING_ARGUMENTS
from lightning_optim.build._training_optimizers import FORMER_OPTIMIZERS, HandedOn, handed_on
from lightning_optim.errors import InvalidOption, close_names, listing
from lightning_optim.table import REGISTRY, OptimizerSpec, as_mapping, coerce, convert, describe

_BETAS = ("beta1", "beta2", "beta3")
_SAVING = ("save_strategy", "save_steps", "save_total_limit", "save_only_model", "load_best_model_at_end")
_BEST = ("metric_for_best_model", "greater_is_better")


def convert_training_arguments(args: Any) -> Conversion:
    """Translates Hugging Face's ``TrainingArguments``.

    What is written trains as it does there. So an argument that is left out counts with Hugging Face's default, such as
    a learning rate of 5e-5, a linear schedule or clipping to a norm of 1.0, and one that has no effect there is not
    written.

    Args:
        args: The object, a mapping, or the path of a JSON or YAML file, which may have keys of LLaMA-Factory or axolotl
            besides. A file is only read: no tag in it is evaluated, and nothing that it names is imported.

    Raises:
        InvalidOption: If ``args`` cannot be read, or a value is of the wrong type.
        UnknownOptimizer: If there is no such optimizer here.
    """
    return _Translation(read(args)).result()


class _Translation:
    """One translation, part by part."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._optim: dict[str, Any] = {}
        self._trainer: dict[str, Any] = {}
        self._checkpoint: dict[str, Any] = {}
        self._written: dict[str, None] = {}
        self._remarks: list[Remark] = []

    def result(self) -> Conversion:
        source = self._source
        seed = source.number("seed", int)
        self._wrote("seed")
        for part in (self._optimizer, self._schedule, self._length, self._numerics, self._evaluation):
            part()
        for part in (self._checkpoints, self._logs, self._rows_to_list, self._unknown_keys):
            part()
        written = tuple(map(source.name, self._written))
        said = {*written, *(name for remark in self._remarks for name in remark.values)}
        silent = tuple(key for key in source.called.values() if key not in said)
        return Conversion(
            dialect=source.dialect.name,
            optim=self._optim,
            trainer=self._trainer,
            checkpoint=self._checkpoint,
            seed=seed,
            written=written,
            remarks=tuple(self._remarks),
            silent=silent,
        )

    # What becomes of an argument.

    def _write(self, where: dict[str, Any], key: str, value: Any, *names: str) -> None:
        where[key] = value
        self._wrote(*names)

    def _wrote(self, *names: str) -> None:
        self._written |= dict.fromkeys(name for name in names if name in self._source.values)

    def _remark(self, kind: Kind, text: str, *names: str) -> None:
        values = {self._source.name(name): self._source.value(name) for name in names}
        self._remarks.append(Remark(kind, values, text, TRAINING_ARGUMENTS[names[0]].place))

    def _unused(self, text: str, *names: str) -> None:
        """Says of those of the arguments that ask for something that they have no effect there."""
        for name in names:
            if self._source.asks(name):
                self._remark("unused", text, name)

    # The optimizer and its schedule.

    def _optimizer(self) -> None:
        source = self._source
        optim = "adafactor" if source.number("adafactor", bool) else str(source.value("optim"))
        if "." in optim and optim not in REGISTRY:
            raise InvalidOption(
                f"{source.name('optim')}={optim!r} is a class, and what a file names is not imported: leave it "
                f"out, and name the class where you train, by optim={optim!r} or --optim {optim}",
                code="LO909",
            )
        if optim in FORMER_OPTIMIZERS:
            optim, text = FORMER_OPTIMIZERS[optim]
            self._remark("differs", text, "optim")
        # Not find(), which would import what a dotted path names.
        spec, handed = REGISTRY[optim], handed_on(optim)
        self._write(self._optim, "optim", optim, "optim", "adafactor")
        self._write(self._optim, "lr", source.number("learning_rate", float), "learning_rate")
        if handed.decay:
            self._write(self._optim, "weight_decay", source.number("weight_decay", float), "weight_decay")
        else:
            self._optim |= {"weight_decay": handed.own_decay} if handed.own_decay else {}
            self._unused(f"it does not reach {optim} there", "weight_decay")
        options = self._options(spec, handed)
        if options:
            self._optim["optim_args"] = options
        if spec.projects:
            targets = source.value("optim_target_modules")
            targets = "all-linear" if targets in (None, "all_linear") else targets
            self._write(self._optim, "optim_target_modules", targets, "optim_target_modules")
        else:
            self._unused(f"{optim} projects nothing", "optim_target_modules")
        if handed.note:
            self._remark("differs", handed.note, "optim")

    def _options(self, spec: OptimizerSpec, handed: HandedOn) -> dict[str, Any]:
        """Returns the options that are given there, or whose defaults there are others."""
        source, name = self._source, str(self._optim["optim"])
        defaults = {option.name: option.default for option in describe(spec.options)}
        given = as_mapping(source.value("optim_args"), name)
        read = {key: given.pop(key) for key in handed.options if key in given}
        if read:
            self._wrote("optim_args")
        for key in given:
            if key in handed.lost:
                self._remark("none", f"there is no {key} here", "optim_args")
            else:
                text = (
                    "weight_decay overrules the one in it" if key == "weight_decay" else f"{name} does not read {key}"
                )
                self._remark("unused", f"{text} there; `lightning-optim info {name}` shows its options", "optim_args")

        wanted = dict(handed.fixed)
        if handed.betas and "betas" in defaults:
            betas = [source.number("adam_beta1", float), source.number("adam_beta2", float), *defaults["betas"][2:]]
            own = [read.pop(key, beta) for key, beta in zip(_BETAS, betas, strict=False)]
            wanted["betas"] = tuple(convert(one, float) for one in own)
            self._wrote("adam_beta1", "adam_beta2")
        else:
            self._unused(f"it does not reach {name} there", "adam_beta1", "adam_beta2")
        if handed.eps and "eps" in defaults:
            wanted["eps"] = source.number("adam_epsilon", float)
            self._wrote("adam_epsilon")
        else:
            self._unused(f"it does not reach {name} there", "adam_epsilon")
        options = {key: value for key, value in wanted.items() if value != defaults[key]}
        for key, value in read.items():
            options[key] = coerce(spec.options, key, value, name)
            if key in handed.true and not options[key]:
                options[key] = True
                self._remark("differs", f"{key} is true there, whatever its value", "optim_args")
        return options

    def _schedule(self) -> None:
        source = self._source
        name, spec = str(source.value("lr_scheduler_type")), REGISTRY[self._optim["optim"]]
        warmup, warmup_name = self._warmup()
        options = source.mapping("lr_scheduler_kwargs")
        if spec.averages_weights:
            if name != "constant":
                text = f"there, the schedule {name} scales a schedule-free optimizer's rate; here, it has no schedule"
                self._remark("differs", text, "lr_scheduler_type")
            self._unused("a schedule-free optimizer has no schedule here", "lr_scheduler_kwargs")
            warms_up = spec.warmup == "optimizer"
        elif name not in SCHEDULES:
            text = f"there is no such schedule here, so none is written. There are {listing(SCHEDULES)}"
            self._remark("none", text, "lr_scheduler_type")
            self._unused("they belong to that schedule", "lr_scheduler_kwargs")
            warms_up = False
        else:
            self._write(self._optim, "lr_scheduler", name, "lr_scheduler_type")
            schedule, warms_up = SCHEDULES[name], SCHEDULES[name].warms_up
            if schedule.multiplier is None:
                options["monitor"] = metric = self._metric() or "val_loss"
                self._remark("differs", f"it watches {metric!r}: log it in validation_step", "lr_scheduler_type")
            if describe(schedule.options):
                self._wrote("lr_scheduler_kwargs")
            else:
                self._unused(f"{name} takes none there", "lr_scheduler_kwargs")
                options = {}
            if options:
                self._optim["lr_scheduler_args"] = options
        if warmup and warms_up:
            self._write(self._optim, "warmup_steps", warmup, warmup_name)
            if not source.chose(warmup_name):
                self._remark("differs", f"{source.dialect.name}'s default; there it is at most 100 steps", warmup_name)
        elif source.chose(warmup_name):
            self._unused("there is no warm-up with it here", warmup_name)

    def _warmup(self) -> tuple[int | float, str]:
        """Returns the warm-up and the argument that sets it."""
        source = self._source
        steps, ratio = source.number("warmup_steps", float), source.number("warmup_ratio", float)
        if ratio and not (steps and source.chose("warmup_steps")):
            return ratio, "warmup_ratio"
        self._unused("warmup_steps overrules it", "warmup_ratio")
        return int(steps) if steps >= 1 else steps, "warmup_steps"

    def _metric(self) -> str | None:
        """Returns the metric under the name by which it is usually logged in Lightning."""
        metric = self._source.value("metric_for_best_model")
        self._wrote("metric_for_best_model")
        own = str(metric).removeprefix("eval_")
        return None if metric is None else "val_loss" if own == "loss" else own

    # The Trainer.

    def _length(self) -> None:
        epochs = self._source.number("num_train_epochs", float)
        steps = self._source.number("max_steps", int)
        if steps > 0:
            self._write(self._trainer, "max_steps", steps, "max_steps")
            self._unused("max_steps overrules it", "num_train_epochs")
            return
        self._write(self._trainer, "max_epochs", math.ceil(epochs), "num_train_epochs")
        if epochs != math.ceil(epochs):
            text = (
                "max_epochs takes whole epochs, and the schedule lasts as long. Instead, write max_steps: "
                f"{epochs:g} times the optimizer steps of an epoch, rounded up"
            )
            self._remark("differs", text, "num_train_epochs")

    def _numerics(self) -> None:
        source, optim = self._source, self._optim["optim"]
        clip = source.number("max_grad_norm", float)
        if handed_on(optim).clipped:
            self._wrote("max_grad_norm")
            self._trainer |= {"gradient_clip_val": clip} if clip > 0 else {}
        elif clip > 0:
            self._remark("unused", f"{optim} is not clipped there; gradient_clip_val clips it here", "max_grad_norm")
        if (batches := source.number("gradient_accumulation_steps", int)) != 1:
            self._write(self._trainer, "accumulate_grad_batches", batches, "gradient_accumulation_steps")
            text = (
                "Lightning averages the losses of the batches. There, a model that takes num_items_in_batch, as "
                "language models do, divides by the number of tokens of all of them"
            )
            self._remark("differs", text, "gradient_accumulation_steps")
        bf16, fp16 = source.number("bf16", bool), source.number("fp16", bool)
        if bf16 and bf16 != "auto" and fp16:
            raise InvalidOption(f"{source.name('bf16')} and fp16 are both set: keep one of them", code="LO909")
        if bf16 or fp16:
            precision = "bf16-true" if bf16 == "full" else "bf16-mixed" if bf16 else "16-mixed"
            self._write(self._trainer, "precision", precision, "bf16" if bf16 else "fp16")
            if bf16 == "auto":
                self._remark("differs", "write 16-mixed or 32-true for a device without bfloat16", "bf16")
        for name in ("use_cpu", "no_cuda"):
            if source.number(name, bool):
                self._write(self._trainer, "accelerator", "cpu", name)
        if source.number("full_determinism", bool):
            self._write(self._trainer, "deterministic", True, "full_determinism")

    def _evaluation(self) -> None:
        source = self._source
        name = "eval_strategy" if source.chose("eval_strategy") else "evaluation_strategy"
        strategy = str(source.value(name))
        if source.dialect.name == "axolotl" and source.chose("eval_steps"):
            strategy = "steps"
        if source.chose(name):
            self._wrote(name)
        if strategy == "steps":
            every = "eval_steps" if source.number("eval_steps", float) else "logging_steps"
            if (count := self._count(every)) is not None:
                # It counts batches, and those of all epochs if it is told to leave the epochs alone.
                count *= self._trainer.get("accumulate_grad_batches", 1)
                self._write(self._trainer, "val_check_interval", count, every)
                self._trainer["check_val_every_n_epoch"] = None
        else:
            self._unused(f"eval_strategy is {strategy}", "eval_steps")
            if strategy == "no" and source.chose(name):
                self._trainer["limit_val_batches"] = 0

    def _count(self, name: str) -> int | None:
        """Returns a number of steps; ``None``, with a remark, for a part of a training of unknown length."""
        steps: float = self._source.number(name, float)
        if steps >= 1:
            return int(steps)
        if "max_steps" in self._trainer:
            return math.ceil(int(self._trainer["max_steps"]) * steps)
        self._remark("yours", "a fraction of the training; here, write a number of steps", name)
        return None

    def _checkpoints(self) -> None:
        source, axolotl = self._source, self._source.dialect.name == "axolotl"
        strategy = str(source.value("save_strategy"))
        best = source.number("load_best_model_at_end", bool)
        if not source.chose(*_SAVING):
            if self._optim.get("lr_scheduler") != "reduce_lr_on_plateau":
                self._unused("no checkpoint is chosen by it", "metric_for_best_model")
            self._unused("no checkpoint is chosen by it", "greater_is_better")
            return
        self._wrote("save_strategy")
        if strategy == "no":
            self._trainer["enable_checkpointing"] = False
            self._unused("save_strategy is no", *_SAVING[1:], *_BEST)
            return
        if axolotl:
            strategy = (
                "steps" if source.chose("save_steps") else "epoch" if not source.chose("save_strategy") else strategy
            )
        checkpoint: dict[str, Any] = {}
        if strategy == "steps":
            if (count := self._count("save_steps")) is not None:
                self._write(checkpoint, "every_n_train_steps", count, "save_steps")
        else:
            checkpoint |= {"every_n_epochs": 1} if strategy == "epoch" else {}
            self._unused(f"save_strategy is {strategy}", "save_steps")
        limit = source.number("save_total_limit", int)
        self._write(checkpoint, "save_top_k", limit or (1 if strategy == "best" else -1), "save_total_limit")
        if best or strategy == "best":
            metric, higher = self._metric() or "val_loss", source.number("greater_is_better", bool)
            higher = not metric.endswith("loss") if higher is None else higher
            checkpoint |= {"monitor": metric, "mode": "max" if higher else "min"}
            self._wrote("load_best_model_at_end", "greater_is_better")
            text = (
                f"it watches {metric!r}: log it in validation_step. The best weights are not loaded "
                "after training: Trainer.test(ckpt_path='best')"
            )
            self._remark("differs", text, "load_best_model_at_end" if best else "save_strategy")
        else:
            # The last ones, as there; without a metric Lightning keeps one.
            checkpoint |= {"monitor": "step", "mode": "max"} if limit else {}
            self._unused("no checkpoint is chosen by it", *_BEST)
        if source.number("save_only_model", bool):
            self._write(checkpoint, "save_weights_only", True, "save_only_model")
        self._checkpoint = checkpoint

    def _logs(self) -> None:
        source = self._source
        strategy = str(source.value("logging_strategy"))
        if strategy != "steps":
            text = "self.log(..., on_step=False, on_epoch=True)" if strategy == "epoch" else "leave self.log out"
            self._remark("yours", text, "logging_strategy")
            self._unused(f"logging_strategy is {strategy}", "logging_steps")
        elif source.chose("logging_steps") and (count := self._count("logging_steps")) is not None:
            self._write(self._trainer, "log_every_n_steps", count, "logging_steps")
        if source.number("disable_tqdm", bool):
            self._write(self._trainer, "enable_progress_bar", False, "disable_tqdm")
        if source.chose("report_to"):
            if source.value("report_to") in ("none", ["none"], []):
                self._write(self._trainer, "logger", False, "report_to")
            else:
                text = "--trainer.logger CLASS, such as TensorBoardLogger, WandbLogger, MLFlowLogger or CometLogger"
                self._remark("yours", text, "report_to")
        if source.chose("output_dir"):
            self._write(self._trainer, "default_root_dir", str(source.value("output_dir")), "output_dir")

    # What is not written.

    def _rows_to_list(self) -> None:
        for name, row in TRAINING_ARGUMENTS.items():
            if not row.carried and (row.always or self._source.asks(name)):
                self._remark("none" if row.place == "none" else "yours", row.here.replace("`", ""), name)

    def _unknown_keys(self) -> None:
        hints = {key: hint for dialect in (*DIALECTS, self._source.dialect) for key, hint in dialect.hints.items()}
        rest = {}
        for key, value in self._source.unknown.items():
            near = close_names(key, TRAINING_ARGUMENTS, limit=1)
            if key in TRAINING_ARGUMENTS or key in self._source.dialect.renamed:
                self._remarks.append(Remark("unused", {key: value}, "written twice"))
            elif key in hints:
                self._remarks.append(Remark("yours", {key: value}, hints[key]))
            elif near and difflib.SequenceMatcher(None, key, near[0]).ratio() > 0.9:
                self._remarks.append(Remark("unknown", {key: value}, f"did you mean {near[0]}?"))
            else:
                rest[key] = value
        if rest:
            self._remarks.append(Remark("unknown", rest, ""))
