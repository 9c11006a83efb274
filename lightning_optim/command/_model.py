"""What the command line and a config file say of an optimizer, a model and its batch."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor, nn

from lightning_optim.build import ARGUMENTS
from lightning_optim.choose import SHAPES, Shape, find_shape
from lightning_optim.command import _machine as machine
from lightning_optim.errors import said

# What the estimate calls the strategies that a file may name by their class.
_STRATEGIES = {
    "DDPStrategy": "ddp",
    "ModelParallelStrategy": "fsdp2",
    "FSDP2Strategy": "fsdp2",
    "LayerwiseStrategy": "layerwise",
    "LayerwiseDDPStrategy": "layerwise_ddp",
    "LayerwiseFSDP2Strategy": "layerwise_fsdp2",
}
_SIZES = ("hidden", "layers", "heads", "intermediate", "vocab")


class BadRequest(ValueError):
    """What was typed cannot be answered."""


def read_config(path: str) -> Mapping[str, Any]:
    """Returns what a YAML file of LightningCLI or OptimCLI says.

    Raises:
        BadRequest: If it cannot be read, or is no mapping.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise BadRequest(f"--config {path}: {error}") from error
    if isinstance(found, Mapping) and isinstance(found.get("fit"), Mapping):
        found = found["fit"]
    if not isinstance(found, Mapping):
        raise BadRequest(f"--config {path} is no mapping with model: and trainer:, as `python train.py fit` takes it")
    return found


def optim_of(arguments: argparse.Namespace, request: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the optimizer that was typed or written: for OptimCLI, or for a module with OptimMixin.

    Raises:
        BadRequest: If options were given, and no name.
    """
    of_module = _init_of(request)
    place = of_module if "optim" in of_module and "optim" not in request else request
    written = {name: place[name] for name in ARGUMENTS if name in place}
    typed = {name: getattr(arguments, name, None) for name in ("optim", "optim_args", "optim_target_modules")}
    patterns = getattr(arguments, "param_groups", None)
    typed["param_groups"] = None if patterns is None else _yaml("--param-groups", patterns)
    typed = {name: value for name, value in typed.items() if value is not None}
    if typed and "optim" not in written | typed:
        options = ", ".join("--" + name.replace("_", "-") for name in typed)
        raise BadRequest(f"{options} without --optim: name the identifier that takes it")
    return written | typed if "optim" in written | typed else {}


def _init_of(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns what a file says of the module's arguments."""
    in_file = request.get("model", {})
    if not isinstance(in_file, Mapping):
        return {}
    return in_file.get("init_args" if in_file.get("class_path") else "", in_file) or {}


def _yaml(flag: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadRequest(f"{flag} {text!r}: {error}") from error


def model_of(arguments: argparse.Namespace, request: Mapping[str, Any]) -> tuple[nn.Module | Shape, bool]:
    """Returns the module or the shape that was named, and whether it is a shape.

    Raises:
        BadRequest: If none or several were named, or it cannot be made.
    """
    families = {name: getattr(arguments, name, None) for name in ("llama", "gpt2", "bert", "vit")}
    named = [_preset(family, size) for family, size in families.items() if size]
    named += [arguments.model] if arguments.model else []
    given = {name: getattr(arguments, name, None) for name in (*_SIZES, "kv_heads")}
    sizes = {name: value for name, value in given.items() if value is not None}
    in_file = request.get("model", {})
    class_path = in_file.get("class_path") if isinstance(in_file, Mapping) else None
    if class_path and not named:
        named = [class_path]
    if len(named) + bool(sizes) != 1:
        what = f"{len(named) + bool(sizes)} models" if named or sizes else "no model"
        raise BadRequest(
            f"{what} given: name one, as in `lightning-optim memory --llama 7b`, `memory package.module:Class` or "
            "`memory --hidden 4096 --layers 32 --heads 32 --intermediate 11008 --vocab 32000`"
        )
    if sizes:
        missing = [name for name in _SIZES if name not in sizes]
        if missing:
            raise BadRequest(f"a shape of your own needs {', '.join(f'--{name}' for name in missing)}, too")
        return Shape("llama", **sizes, length=arguments.length or 2048), True
    (name,) = named
    if name in SHAPES or not (":" in name or "." in name):
        return find_shape(name), True
    return _module(name, {**_init_of(request), **_init_args(arguments.init_args)}), False


def strategy_in(trainer: Mapping[str, Any]) -> Any:
    """Returns the strategy of a file's ``trainer:``, which may be a flag or a class; ``None`` if there is none."""
    given = trainer.get("strategy")
    name = given.get("class_path") if isinstance(given, Mapping) else given
    return _STRATEGIES.get(str(name).rpartition(".")[2], name)


def shard_in(trainer: Mapping[str, Any]) -> str | None:
    """Returns the option ``shard`` of a file's strategy; ``None`` if there is none."""
    given = trainer.get("strategy")
    init_args = given.get("init_args") if isinstance(given, Mapping) else None
    return (init_args or {}).get("shard")


def batch_of(arguments: argparse.Namespace, model: nn.Module | Shape, is_shape: bool) -> Any:
    """Returns the batch that was described.

    Raises:
        BadRequest: If it is not for such a model.
    """
    if is_shape:
        if arguments.input:
            raise BadRequest("--input is for a module; a shape takes --batch and --length")
        count = 1 if arguments.batch is None else arguments.batch
        assert isinstance(model, Shape)
        if not count:
            return None
        return count if model.kind == "vit" else (count, arguments.length or model.length)
    if arguments.batch is not None or arguments.length is not None:
        raise BadRequest("--batch and --length are for shapes; of a module describe the batch: --input 8x2048:int64")
    pairs = [_tensor(text) for text in arguments.input]
    if not pairs:
        return None
    if any(name for name, _ in pairs):
        return dict(pairs)
    tensors = [tensor for _, tensor in pairs]
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _preset(family: str, size: str) -> str:
    return family if f"{family}-{size}" not in SHAPES else f"{family}-{size}"


def _module(path: str, init_args: Mapping[str, Any]) -> nn.Module:
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        with machine.folder_is_searched():
            kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BadRequest(f"there is no {path} ({error}): give package.module:Class, seen from here") from error
    try:
        # Nothing is allocated; what it loads or computes in its constructor it may not find.
        with torch.device("meta"):
            made = kind(**init_args)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in init_args.items())
        raise BadRequest(
            f"{path}({given}) could not be made on the meta device: {type(error).__name__}: {said(error)}. Give its "
            "arguments by --init-args, or make it in Python and call lightning_optim.estimate_memory(module)"
        ) from error
    if not isinstance(made, nn.Module):
        raise BadRequest(f"{path} is no module but a {type(made).__name__}")
    return made


def _init_args(pairs: list[str]) -> dict[str, Any]:
    wrong = next((pair for pair in pairs if "=" not in pair), None)
    if wrong is not None:
        raise BadRequest(f"--init-args {wrong!r} is no name=value")
    return {name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in pairs)}


def _tensor(text: str) -> tuple[str, Tensor]:
    name, _, rest = text.rpartition("=")
    sizes, _, dtype = rest.partition(":")
    try:
        shape = [int(size) for size in sizes.split("x")]
        return name, torch.empty(shape, dtype=getattr(torch, dtype or "float32"), device="meta")
    except (ValueError, AttributeError, TypeError, RuntimeError) as error:
        raise BadRequest(f"--input {text!r} is no shape such as 8x2048:int64 or images=8x3x224x224") from error
