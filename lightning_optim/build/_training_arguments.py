"""The arguments of Hugging Face's ``TrainingArguments``, one row each: their defaults, and what to write here.

The rows are those of transformers 5.23, and of 4.57 those that it has dropped since (``former``). Nothing here imports
transformers; a test holds the rows to what is installed of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: Where the counterpart of an argument stands. The first four are written by the conversion, the others are listed.
Place = Literal[
    "optimizer", "trainer", "checkpoint", "run", "data", "module", "strategy", "logger", "command", "hub", "none"
]

#: The places that the conversion writes to, and what all of them are called.
CARRIED = ("optimizer", "trainer", "checkpoint", "run")
PLACES: Mapping[str, str] = {
    "optimizer": "OptimMixin, OptimConfig",
    "trainer": "Trainer",
    "checkpoint": "ModelCheckpoint",
    "run": "seed_everything",
    "data": "In your data",
    "module": "In your module",
    "strategy": "By the strategy",
    "logger": "By the logger",
    "command": "On the command line",
    "hub": "On the hub",
    "none": "No counterpart",
}


@dataclass(frozen=True)
class TrainingArgument:
    """One argument.

    Attributes:
        name: Its name there.
        default: Its default there.
        place: Where its counterpart stands.
        here: What it is called, or what to write, in Markdown; for those without a counterpart, what there is instead.
        quiet: Values that ask for nothing either, such as those that its ``__post_init__`` puts in for the default.
        words: Values that are not of the default's type.
        former: Whether transformers has dropped it.
        always: Whether it is listed at its default, too, since that shapes the training.
    """

    name: str
    default: Any
    place: Place
    here: str
    quiet: tuple[Any, ...] = ()
    words: tuple[str, ...] = ()
    former: bool = False
    always: bool = False

    @property
    def carried(self) -> bool:
        """Whether the conversion writes its counterpart."""
        return self.place in CARRIED

    def is_quiet(self, value: Any) -> bool:
        """Whether ``value`` asks for nothing that the default does not."""
        silent = (self.default, *self.quiet)
        return any(type(value) is type(one) and value == one for one in silent) or (
            not isinstance(value, bool) and isinstance(value, (int, float)) and value in silent
        )


_Row = TrainingArgument
_CHECKPOINTING = "recompute activations in the module: `torch.utils.checkpoint`, or `gradient_checkpointing_enable()`"
_COMPILE = "`Trainer.fit(torch.compile(module))`, with its `backend=` and `mode=`"
_DDP = "`Trainer(strategy=DDPStrategy({}))`"
_LOADER = "`DataLoader({})` of your data"
_METRICS = "compute metrics in `validation_step`, with torchmetrics"
_FSDP = "`--trainer.strategy fsdp`, `fsdp2` for FSDP2; `layerwise_fsdp2` for a name that ends in _layerwise"
_HUB = "upload the checkpoint after training, with `huggingface_hub`"
_TRACKIO = "give `Trainer(logger=...)` a logger of your own for trackio"

_ACCELERATOR_CONFIG = {
    "split_batches": False,
    "dispatch_batches": None,
    "even_batches": True,
    "use_seedable_sampler": True,
    "non_blocking": False,
    "gradient_accumulation_kwargs": None,
    "use_configured_state": False,
}

_ROWS = (
    # Optimizer and schedule.
    _Row("optim", "adamw_torch_fused", "optimizer", "`optim`"),
    _Row("learning_rate", 5e-5, "optimizer", "`lr`"),
    _Row("weight_decay", 0.0, "optimizer", "`weight_decay`"),
    _Row("adam_beta1", 0.9, "optimizer", "`betas` in `optim_args`"),
    _Row("adam_beta2", 0.999, "optimizer", "`betas` in `optim_args`"),
    _Row("adam_epsilon", 1e-8, "optimizer", "`eps` in `optim_args`"),
    _Row("optim_args", None, "optimizer", "`optim_args`, as far as the optimizer reads it there", quiet=("", {})),
    _Row("optim_target_modules", None, "optimizer", "`optim_target_modules`"),
    _Row("lr_scheduler_type", "linear", "optimizer", "`lr_scheduler`"),
    _Row("lr_scheduler_kwargs", None, "optimizer", "`lr_scheduler_args`", quiet=({}, "")),
    _Row("warmup_steps", 0.0, "optimizer", "`warmup_steps`, a count or a fraction below 1 as there"),
    _Row("warmup_ratio", 0.0, "optimizer", "`warmup_steps`, a fraction below 1", former=True),
    _Row("adafactor", False, "optimizer", "`optim: adafactor`", former=True),
    # The Trainer.
    _Row("max_grad_norm", 1.0, "trainer", "`gradient_clip_val`"),
    _Row("gradient_accumulation_steps", 1, "trainer", "`accumulate_grad_batches`"),
    _Row("num_train_epochs", 3.0, "trainer", "`max_epochs`"),
    _Row("max_steps", -1, "trainer", "`max_steps`"),
    _Row("bf16", False, "trainer", "`precision: bf16-mixed`", words=("auto", "full")),
    _Row("fp16", False, "trainer", "`precision: 16-mixed`"),
    _Row("use_cpu", False, "trainer", "`accelerator: cpu`"),
    _Row("no_cuda", False, "trainer", "`accelerator: cpu`", former=True),
    _Row("full_determinism", False, "trainer", "`deterministic: true`"),
    _Row("logging_strategy", "steps", "trainer", "`log_every_n_steps`"),
    _Row("logging_steps", 500.0, "trainer", "`log_every_n_steps`"),
    _Row("disable_tqdm", None, "trainer", "`enable_progress_bar: false`", quiet=(False,)),
    _Row("report_to", "none", "trainer", "`logger: false` for none; `--trainer.logger CLASS` for others", quiet=([],)),
    _Row("eval_strategy", "no", "trainer", "`val_check_interval`, `check_val_every_n_epoch`, `limit_val_batches`"),
    _Row("evaluation_strategy", "no", "trainer", "as `eval_strategy`", former=True),
    _Row("eval_steps", None, "trainer", "`val_check_interval`, which counts batches"),
    _Row("output_dir", None, "trainer", "`default_root_dir`", quiet=("trainer_output",)),
    _Row("seed", 42, "run", "`seed_everything`"),
    _Row("save_strategy", "steps", "checkpoint", "`every_n_train_steps`, `every_n_epochs`; `enable_checkpointing`"),
    _Row("save_steps", 500.0, "checkpoint", "`every_n_train_steps`"),
    _Row("save_total_limit", None, "checkpoint", "`save_top_k`, by the step or the metric"),
    _Row("save_only_model", False, "checkpoint", "`save_weights_only`"),
    _Row("load_best_model_at_end", False, "checkpoint", "`monitor`; then `Trainer.test(ckpt_path='best')`"),
    _Row("metric_for_best_model", None, "checkpoint", "`monitor`, of a plateau schedule, too; `loss` is `val_loss`"),
    _Row("greater_is_better", None, "checkpoint", "`mode`"),
    # The data.
    _Row("per_device_train_batch_size", 8, "data", _LOADER.format("batch_size=..."), always=True),
    _Row("per_device_eval_batch_size", 8, "data", _LOADER.format("batch_size=...")),
    _Row("per_gpu_train_batch_size", None, "data", _LOADER.format("batch_size=..."), former=True),
    _Row("per_gpu_eval_batch_size", None, "data", _LOADER.format("batch_size=..."), former=True),
    _Row("auto_find_batch_size", False, "data", "`Tuner(trainer).scale_batch_size(module)`"),
    _Row("data_seed", None, "data", _LOADER.format("generator=...")),
    _Row("dataloader_drop_last", False, "data", _LOADER.format("drop_last=...")),
    _Row("dataloader_num_workers", 0, "data", _LOADER.format("num_workers=...")),
    _Row("dataloader_pin_memory", True, "data", _LOADER.format("pin_memory=...")),
    _Row("dataloader_persistent_workers", False, "data", _LOADER.format("persistent_workers=...")),
    _Row("dataloader_prefetch_factor", None, "data", _LOADER.format("prefetch_factor=...")),
    _Row("dataloader_multiprocessing_context", None, "data", _LOADER.format("multiprocessing_context=...")),
    _Row("dataloader_in_order", True, "data", _LOADER.format("in_order=...")),
    _Row("remove_unused_columns", True, "data", "choose the columns in your data"),
    _Row("label_names", None, "data", "name the labels in `training_step`"),
    _Row("train_sampling_strategy", "random", "data", _LOADER.format("sampler=... or shuffle=...")),
    _Row("group_by_length", False, "data", _LOADER.format("batch_sampler=..."), former=True),
    _Row("length_column_name", "length", "data", _LOADER.format("batch_sampler=...")),
    _Row("ignore_data_skip", False, "data", "a StatefulDataLoader goes on where it was"),
    # The module.
    _Row("label_smoothing_factor", 0.0, "module", "`F.cross_entropy(label_smoothing=...)` in `training_step`"),
    _Row("activation_checkpointing", None, "module", _CHECKPOINTING, quiet=(False,)),
    _Row("activation_checkpointing_kwargs", None, "module", _CHECKPOINTING),
    _Row("gradient_checkpointing", None, "module", _CHECKPOINTING, quiet=(False,)),
    _Row("gradient_checkpointing_kwargs", None, "module", _CHECKPOINTING),
    _Row("torch_compile", False, "module", _COMPILE),
    _Row("torch_compile_backend", None, "module", _COMPILE),
    _Row("torch_compile_mode", None, "module", _COMPILE),
    _Row("torchdynamo", None, "module", _COMPILE, former=True),
    _Row("tf32", None, "module", "`torch.set_float32_matmul_precision('high')`, or `'highest'` for false"),
    _Row("neftune_noise_alpha", None, "module", "add the noise to the embeddings in `training_step`"),
    _Row("use_liger_kernel", False, "module", "call Liger's `apply_liger_kernel_to_...` where the model is made"),
    _Row("liger_kernel_config", None, "module", "call Liger's `apply_liger_kernel_to_...` where the model is made"),
    _Row("use_cache", False, "module", "`use_cache=` of the model's config"),
    _Row("include_for_metrics", [], "module", _METRICS),
    _Row("include_inputs_for_metrics", False, "module", _METRICS, former=True),
    _Row("batch_eval_metrics", False, "module", _METRICS),
    _Row("prediction_loss_only", False, "module", "return what you need from `predict_step`"),
    _Row("eval_do_concat_batches", True, "module", _METRICS),
    _Row("eval_accumulation_steps", None, "module", _METRICS),
    _Row("eval_use_gather_object", False, "module", "`self.all_gather` in `validation_step`"),
    # Devices and processes.
    _Row("fsdp", None, "strategy", _FSDP, quiet=([], "", False)),
    _Row("fsdp_config", None, "strategy", _FSDP, quiet=({},)),
    _Row("fsdp_min_num_params", 0, "strategy", _FSDP, former=True),
    _Row("fsdp_transformer_layer_cls_to_wrap", None, "strategy", _FSDP, former=True),
    _Row("deepspeed", None, "strategy", "`--trainer.strategy deepspeed_stage_2`, or a DeepSpeedStrategy"),
    _Row("parallelism_config", None, "strategy", "`--trainer.strategy`, such as `fsdp2`"),
    _Row("accelerator_config", None, "strategy", "Trainer(use_distributed_sampler=...)", quiet=(_ACCELERATOR_CONFIG,)),
    _Row("ddp_find_unused_parameters", None, "strategy", "`--trainer.strategy ddp_find_unused_parameters_true`"),
    _Row("ddp_bucket_cap_mb", None, "strategy", _DDP.format("bucket_cap_mb=...")),
    _Row("ddp_broadcast_buffers", None, "strategy", _DDP.format("broadcast_buffers=...")),
    _Row("ddp_static_graph", None, "strategy", _DDP.format("static_graph=...")),
    _Row("ddp_backend", None, "strategy", _DDP.format("process_group_backend=...")),
    _Row("ddp_timeout", 1800, "strategy", _DDP.format("timeout=timedelta(...)")),
    _Row("average_tokens_across_devices", True, "strategy", "Lightning averages the losses of the devices"),
    _Row("local_rank", -1, "strategy", "Lightning's launcher sets it", quiet=(0,)),
    _Row("tpu_num_cores", None, "strategy", "`Trainer(accelerator='tpu', devices=...)`", former=True),
    _Row("use_mps_device", False, "strategy", "`Trainer(accelerator='mps')`", former=True),
    _Row("mp_parameters", "", "strategy", "`--trainer.strategy`", former=True),
    # Logs.
    _Row("logging_first_step", False, "logger", "Lightning logs at multiples of `log_every_n_steps`"),
    _Row("run_name", None, "logger", "`name=` of the logger"),
    _Row("project", "huggingface", "logger", "`project=` of the logger"),
    _Row("logging_dir", None, "logger", "`save_dir=` of the logger", former=True),
    _Row("trackio_space_id", None, "logger", _TRACKIO, quiet=("trackio",)),
    _Row("trackio_bucket_id", None, "logger", _TRACKIO),
    _Row("trackio_static_space_id", None, "logger", _TRACKIO),
    _Row("log_level", "passive", "logger", "`logging.getLogger('lightning.pytorch').setLevel(...)`"),
    _Row("log_level_replica", "warning", "logger", "Lightning logs on rank 0"),
    _Row("log_on_each_node", True, "logger", "Lightning logs on rank 0"),
    _Row("logging_nan_inf_filter", True, "logger", "what you log is what is shown"),
    _Row("include_num_input_tokens_seen", "no", "logger", "ThroughputMonitor, or self.log the number", quiet=(False,)),
    _Row("include_tokens_per_second", False, "logger", "the callback ThroughputMonitor", former=True),
    _Row("skip_memory_metrics", True, "logger", "the callback DeviceStatsMonitor"),
    # The hub.
    _Row("push_to_hub", False, "hub", _HUB),
    _Row("hub_model_id", None, "hub", _HUB),
    _Row("hub_token", None, "hub", _HUB, quiet=("<HUB_TOKEN>",)),
    _Row("hub_private_repo", None, "hub", _HUB),
    _Row("hub_strategy", "every_save", "hub", _HUB),
    _Row("hub_always_push", False, "hub", _HUB),
    _Row("hub_revision", None, "hub", _HUB),
    _Row("push_to_hub_model_id", None, "hub", _HUB, former=True),
    _Row("push_to_hub_organization", None, "hub", _HUB, former=True),
    _Row("push_to_hub_token", None, "hub", _HUB, quiet=("<PUSH_TO_HUB_TOKEN>",), former=True),
    # Nothing of the kind.
    _Row("eval_on_start", False, "none", "`num_sanity_val_steps: -1` validates in full, without logging"),
    _Row("eval_delay", 0.0, "none", "validation begins with training"),
    _Row("bf16_full_eval", False, "none", "validation has the precision of the training"),
    _Row("fp16_full_eval", False, "none", "validation has the precision of the training"),
    _Row("fp16_opt_level", "O1", "none", "`precision: 16-mixed` is native autocast", former=True),
    _Row("half_precision_backend", "auto", "none", "`precision: 16-mixed` is native autocast", former=True),
    _Row("fp16_backend", "auto", "none", "`precision: 16-mixed` is native autocast", former=True),
    _Row("torch_empty_cache_steps", None, "none", "`torch.cuda.empty_cache()` in `on_train_batch_end`"),
    _Row("save_on_each_node", False, "none", "the strategy decides which ranks write a checkpoint"),
    _Row("save_safetensors", True, "none", "checkpoints are torch's, read with `weights_only=True`", former=True),
    _Row("overwrite_output_dir", False, "none", "each run has its own folder below `default_root_dir`", former=True),
    _Row("enable_jit_checkpoint", False, "none", "`ModelCheckpoint(save_on_exception=True)` comes near"),
    _Row("restore_callback_states_from_checkpoint", False, "none", "`Trainer.fit(ckpt_path=...)` restores them"),
    _Row("resume_from_checkpoint", None, "none", "`Trainer.fit(ckpt_path=...)` reads Lightning's checkpoints only"),
    _Row("debug", "", "none", "`detect_anomaly: true` of the Trainer comes near", quiet=([],)),
    _Row("do_train", False, "command", "the subcommand fit"),
    _Row("do_eval", False, "command", "the subcommand validate"),
    _Row("do_predict", False, "command", "the subcommand predict"),
    _Row("past_index", -1, "none", "keep the state in the module", former=True),
    _Row("ray_scope", "last", "none", "use a tuner of your own", former=True),
    _Row("use_legacy_prediction_loop", False, "none", "the subcommand predict", former=True),
    _Row("jit_mode_eval", False, "none", "`torch.compile(module)`", former=True),
    _Row("use_ipex", False, "none", "torch has taken over what it did", former=True),
    _Row("dispatch_batches", None, "none", "every rank reads its own part of the data", former=True),
    _Row("split_batches", None, "none", "every rank reads its own part of the data", former=True),
    _Row("tpu_metrics_debug", False, "none", "`torch_xla`'s own metrics", former=True),
)  # fmt: skip

#: By name, in the order in which they are explained.
TRAINING_ARGUMENTS: Mapping[str, TrainingArgument] = {row.name: row for row in _ROWS}


@dataclass(frozen=True)
class Dialect:
    """How a program that trains with transformers writes its arguments.

    Attributes:
        name: The program.
        marks: Keys that only its files have.
        renamed: Its keys, and the names of the arguments.
        defaults: Its own defaults, where they are not those of ``TrainingArguments``.
        hints: Keys that are no arguments but change what is trained, and what to write here.
    """

    name: str
    marks: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    hints: Mapping[str, str] = field(default_factory=dict)


TRANSFORMERS = Dialect("transformers")
DIALECTS = (
    Dialect(
        "axolotl",
        marks=frozenset({"base_model"}),
        renamed={
            "optimizer": "optim",
            "lr_scheduler": "lr_scheduler_type",
            "micro_batch_size": "per_device_train_batch_size",
            "eval_batch_size": "per_device_eval_batch_size",
            "num_epochs": "num_train_epochs",
            "bfloat16": "bf16",
        },
        # Of the warm-up at most 100 steps, which cannot be said.
        defaults={
            "lr_scheduler_type": "cosine",
            "num_train_epochs": 1.0,
            "per_device_train_batch_size": 1,
            "warmup_steps": 0.03,
        },
        hints={
            "cosine_min_lr_ratio": "lr_scheduler: cosine_with_min_lr with min_lr_rate in lr_scheduler_args",
            "cosine_constant_lr_ratio": "no counterpart; warmup_stable_decay comes near",
            "lr_quadratic_warmup": "no counterpart: warm-ups are linear",
            "adam_eps": "eps in optim_args",
            "adam_beta3": "betas in optim_args, for an optimizer that has three",
            "adam_epsilon2": "eps in optim_args, for an optimizer that has two",
            "embedding_lr": "param_groups: {PATTERN: {lr: ...}}",
            "embedding_lr_scale": "param_groups: {PATTERN: {lr: ...}}",
            "lr_groups": "param_groups: {PATTERN: {lr: ...}}",
            "loraplus_lr_ratio": "param_groups: {'.*lora_B.*': {lr: ...}}",
            "batch_size": "DataLoader(batch_size=...) of your data",
            "early_stopping_patience": "the callback EarlyStopping",
            "evals_per_epoch": "trainer.val_check_interval, a fraction of the epoch",
            "saves_per_epoch": "ModelCheckpoint(every_n_train_steps=...)",
        },
    ),
    Dialect(
        "LLaMA-Factory",
        marks=frozenset({"finetuning_type"}),
        hints={
            "micro_batch_size": "DataLoader(batch_size=...) of your data",
            "pure_bf16": "trainer.precision: bf16-true",
            "use_galore": "optim: galore_adamw, or galore_adamw_layerwise for galore_layerwise",
            "galore_target": "optim_target_modules",
            "galore_rank": "rank in optim_args; 16 there if it is left out",
            "galore_update_interval": "update_proj_gap in optim_args",
            "galore_scale": "scale in optim_args",
            "galore_proj_type": "proj_type in optim_args",
            "use_apollo": "optim: apollo_adamw, or apollo_adamw_layerwise for apollo_layerwise",
            "apollo_target": "optim_target_modules",
            "apollo_rank": "rank in optim_args; 16 there if it is left out",
            "apollo_update_interval": "update_proj_gap in optim_args",
            "apollo_scale": "scale in optim_args; 32.0 there if it is left out",
            "apollo_proj_type": "proj_type in optim_args",
            "apollo_scale_type": "scale_type in optim_args",
            "use_badam": "no counterpart",
            "use_adam_mini": "no counterpart",
            "use_muon": "no counterpart",
            "loraplus_lr_ratio": "param_groups: {'.*lora_B.*': {lr: ...}}",
        },
    ),
)
