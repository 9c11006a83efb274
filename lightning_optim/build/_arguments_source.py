"""Reading Hugging Face's ``TrainingArguments``: an object, a mapping, a JSON or YAML file.

What a file holds is data. No tag of YAML is evaluated, nothing that a file names is imported, and no pickle is opened.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_optim.build._plain import storable
from lightning_optim.build._training_arguments import DIALECTS, TRAINING_ARGUMENTS, TRANSFORMERS, Dialect
from lightning_optim.errors import InvalidOption, listing
from lightning_optim.table import convert

_SECRETS = ("token", "key", "password", "secret")
_PICKLES = (".bin", ".pt", ".pth", ".pkl")


@dataclass
class Source:
    """Arguments as they were given.

    Attributes:
        dialect: Whose keys they have.
        values: By the argument's name.
        given: Those that somebody chose.
        called: What the source calls an argument.
        unknown: What is no argument.
    """

    dialect: Dialect
    values: dict[str, Any] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)
    called: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, Any] = field(default_factory=dict)

    def value(self, name: str) -> Any:
        """Returns the value as it was given, or the default there."""
        default = self.dialect.defaults.get(name, TRAINING_ARGUMENTS[name].default)
        return self.values.get(name, default)

    def number(self, name: str, kind: type) -> Any:
        """Returns the value as a number or a truth value; YAML reads 5e-5 as a text.

        Raises:
            InvalidOption: If it is none.
        """
        value = self.value(name)
        if value is None or value in TRAINING_ARGUMENTS[name].words:
            return value
        try:
            return convert(value, kind)
        except (ValueError, TypeError, SyntaxError):
            raise InvalidOption(f"{self.name(name)}={value!r} is no {kind.__name__}", code="LO909") from None

    def mapping(self, name: str) -> dict[str, Any]:
        """Returns the value as a mapping, which may be written as JSON.

        Raises:
            InvalidOption: If it is none.
        """
        value = self.value(name)
        if isinstance(value, str):
            with suppress(ValueError):
                value = json.loads(value or "{}")
        if value is not None and not isinstance(value, Mapping):
            raise InvalidOption(f"{self.name(name)}={value!r} is no mapping, and no JSON of one", code="LO909")
        return dict(value or {})

    def chose(self, *names: str) -> bool:
        """Whether somebody chose one of the arguments."""
        return bool(self.given.intersection(names))

    def asks(self, name: str) -> bool:
        """Whether somebody chose the argument, and for something that its default does not do."""
        return name in self.given and not TRAINING_ARGUMENTS[name].is_quiet(self.values[name])

    def name(self, name: str) -> str:
        """Returns what the source calls an argument."""
        return self.called.get(name, name)


def read(args: Any) -> Source:
    """Returns what an object, a mapping or a file asks for.

    Raises:
        InvalidOption: If it cannot be read, or has no argument.
    """
    if isinstance(args, (str, Path)):
        return _from_mapping(_read_file(Path(args)), str(args))
    if isinstance(args, Mapping):
        return _from_mapping(args, "the mapping")
    return _from_object(args)


def _from_object(args: Any) -> Source:
    """Reads attributes; of them was chosen what is not the default of the object's class."""
    defaults = {one.name: one.default for one in dataclasses.fields(args)} if dataclasses.is_dataclass(args) else {}
    if not hasattr(args, "to_dict") and not hasattr(args, "__dict__"):
        raise InvalidOption(
            f"{args!r} ({type(args).__name__}) is no TrainingArguments, no mapping and no path of a file", code="LO909"
        )
    values = args.to_dict() if hasattr(args, "to_dict") else vars(args)
    source = _from_mapping(
        {name: value for name, value in values.items() if not name.startswith("_")}, type(args).__name__
    )
    absent = object()
    source.given = {
        name
        for name in source.given
        if source.values[name] != defaults.get(name, absent)
        and not TRAINING_ARGUMENTS[name].is_quiet(source.values[name])
    }
    # Fields of a subclass.
    source.unknown = {
        name: value for name, value in source.unknown.items() if not defaults or value != defaults.get(name, value)
    }
    return source


def _from_mapping(held: Mapping[Any, Any], where: str) -> Source:
    # An empty value, `max_steps:`, asks for the default.
    held = {str(key): _without_secrets(str(key), value) for key, value in held.items() if value is not None}
    if "compute_environment" in held:
        raise InvalidOption(
            f"{where} is a configuration of accelerate, which has no arguments of the Trainer", code="LO909"
        )
    dialect = next((one for one in DIALECTS if one.marks & held.keys()), TRANSFORMERS)
    source = Source(dialect)
    for key, value in held.items():
        name = dialect.renamed.get(key, key)
        # One that is written twice, with the same value, counts once.
        if name not in TRAINING_ARGUMENTS or (name in source.values and source.values[name] == value):
            source.unknown[key] = value
            continue
        if name in source.values:
            raise InvalidOption(
                f"{where} has {key!r} and {source.called[name]!r}, which are one: keep one of them", code="LO909"
            )
        source.values[name] = value
        source.called[name] = key
    source.given = set(source.values)
    if not source.values:
        has = f"It has {listing(list(held)[:8])}." if held else "It is empty."
        raise InvalidOption(f"{where} has no key of TrainingArguments, such as learning_rate. {has}", code="LO909")
    return source


def _without_secrets(key: str, value: Any) -> Any:
    """Returns a plain value, which may be shown and written to a file."""
    value = storable(value)
    if isinstance(value, dict):
        return {name: _without_secrets(str(name), item) for name, item in value.items()}
    # to_dict() shows tokens, those that are not set, too, in this way.
    hidden = isinstance(value, str) and key.endswith(_SECRETS) and value != f"<{key.upper()}>"
    return "..." if hidden else value


def _read_file(path: Path) -> Mapping[Any, Any]:
    import yaml  # type: ignore[import-untyped]  # Lightning needs it, too.

    if path.suffix in _PICKLES:
        raise InvalidOption(
            f"{path} is a pickle, and to read one is to run what it holds. Where transformers is installed, and if you "
            f"trust the file, write it as JSON: `torch.load('{path}', weights_only=False).to_json_string()`",
            code="LO909",
        )
    is_json = path.suffix == ".json"
    try:
        text = path.read_text(encoding="utf-8")
        held = storable(json.loads(text) if is_json else yaml.safe_load(text))
    except OSError as error:
        raise InvalidOption(f"cannot read {path}: {error.strerror}", code="LO909") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InvalidOption(f"{path} is no {'JSON' if is_json else 'plain YAML'}: {error}", code="LO909") from error
    if not isinstance(held, Mapping):
        raise InvalidOption(f"{path} holds no mapping of arguments, such as `learning_rate: 5.0e-5`", code="LO909")
    return held
