"""What the Hugging Face Trainer, torch and others call an argument, and what to write here, for error texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from lightning_optim.errors import InvalidOption, close_names, listing

# Our arguments, by their names elsewhere.
_ARGUMENTS = {
    "learning_rate": "lr",
    "learningrate": "lr",
    "base_lr": "lr",
    "max_lr": "lr",
    "peak_lr": "lr",
    "wd": "weight_decay",
    "l2": "weight_decay",
    "optimizer": "optim",
    "optimizer_name": "optim",
    "optimizer_cls": "optim",
    "opt": "optim",
    "optimizer_args": "optim_args",
    "optimizer_kwargs": "optim_args",
    "optim_kwargs": "optim_args",
    "target_modules": "optim_target_modules",
    "scheduler": "lr_scheduler",
    "lr_schedule": "lr_scheduler",
    "lr_scheduler_type": "lr_scheduler",
    "lr_scheduler_kwargs": "lr_scheduler_args",
    "scheduler_args": "lr_scheduler_args",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "num_warmup_steps": "warmup_steps",
    "layerwise_lr_decay": "layer_decay",
    "llrd": "layer_decay",
}
# Options of optimizers, by their names elsewhere.
_OPTIONS = {
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "eps",
    "adam_eps": "eps",
    "epsilon": "eps",
    "b1": "beta1",
    "b2": "beta2",
}
# What is set elsewhere, or not at all.
_ELSEWHERE = {
    "max_grad_norm": "set Trainer(gradient_clip_val=...)",
    "gradient_clip_val": "set Trainer(gradient_clip_val=...)",
    "percentile_clipping": "bitsandbytes has dropped it; set Trainer(gradient_clip_val=...)",
    "gradient_accumulation_steps": "set Trainer(accumulate_grad_batches=...)",
    "accumulate_grad_batches": "set Trainer(accumulate_grad_batches=...)",
    "total_steps": "set Trainer(max_steps=...) or Trainer(max_epochs=...)",
    "num_training_steps": "set Trainer(max_steps=...) or Trainer(max_epochs=...)",
    "max_steps": "set Trainer(max_steps=...)",
    "lr_scheduler": "build_schedule(optimizer, name, ...) makes a schedule",
    "block_wise": "bitsandbytes' 8-bit states are always block-wise; leave it out",
    "fused": "the identifier says it; use optim='adamw_torch_fused', or Trainer(strategy='fused') for sgd and adagrad",
    "optim_bits": "the identifier says it, such as optim='adamw_8bit'; param_groups may set optim_bits=32",
    "is_paged": "the identifier says it, such as optim='paged_adamw_8bit'",
    "scale_front": "the limit on the norm's growth is applied after the scale, as in the paper; leave it out",
}


def refuse_arguments(where: str, given: Mapping[str, Any], allowed: Iterable[str], options: Iterable[str]) -> NoReturn:
    """Raises :class:`InvalidOption` for unknown arguments, with what to write instead.

    Args:
        where: What was called.
        given: Its unknown arguments.
        allowed: Its known arguments.
        options: Options of the requested optimizer.
    """
    allowed = tuple(name for name in allowed if name != "target")
    options = tuple(options)
    lines = [f"{_shown(name, value)}: {_argument(name, value, allowed, options)}" for name, value in given.items()]
    raise InvalidOption(f"{where} has no such argument: {'; '.join(lines)}", code="LO201")


def refuse_option(owner: str, name: str, value: Any, options: Iterable[str], allowed: str) -> NoReturn:
    """Raises :class:`InvalidOption` for an option that an optimizer or a schedule does not have.

    Args:
        owner: Its identifier.
        name: The unknown name.
        value: Its value.
        options: The names of the known options.
        allowed: A sentence that describes them.
    """
    options = tuple(options)
    own = _OPTIONS.get(name, name)
    argument = _ARGUMENTS.get(name, name)
    hint = ""
    if own != name and _is_option(own, options):
        hint = f" Write {_shown(own, value)}."
    elif argument in ("lr", "weight_decay", "warmup_steps", "lr_scheduler"):
        hint = f" It is a separate argument: write {_shown(argument, value)} next to optim_args."
    elif name in _ELSEWHERE:
        hint = f" Instead: {_ELSEWHERE[name]}."
    elif near := close_names(str(name), options, limit=3):
        hint = f" Did you mean {listing(near)}?"
    raise InvalidOption(f"{owner!r} has no option {name!r}.{hint} {allowed}", code="LO201")


def _argument(name: str, value: Any, allowed: tuple[str, ...], options: tuple[str, ...]) -> str:
    """Returns what to write instead of an argument."""
    if name == "warmup_ratio":
        return f"write {_shown('warmup_steps', value)}, a fraction of the training if it is below 1"
    argument = _ARGUMENTS.get(name, name)
    if argument in allowed:
        return f"write {_shown(argument, value)}"
    own = _OPTIONS.get(name, name)
    if _is_option(own, options):
        return f"write optim_args={{{own!r}: {value!r}}}"
    if argument in _ELSEWHERE:
        return _ELSEWHERE[argument]
    near = close_names(name, (*allowed, *options), limit=3)
    meant = f"did you mean {listing(near)}? " if near else ""
    return f"{meant}allowed are {listing(allowed)}"


def _is_option(name: str, options: tuple[str, ...]) -> bool:
    return name in options or (name in ("beta1", "beta2", "beta3") and "betas" in options)


def _shown(name: str, value: Any) -> str:
    return f"{name}={str(value) if isinstance(value, type) else repr(value)}"
