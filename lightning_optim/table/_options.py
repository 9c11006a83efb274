"""Typed options: ``"betas=(0.9, 0.95),eps=1e-6"`` or a mapping becomes a row's frozen dataclass.

Hugging Face's Trainer passes strings on unparsed or silently drops them. Here every option of every row is declared
with its type, range and meaning; anything undeclared, malformed or out of range is an error that lists what is allowed.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from typing_extensions import Self

from lightning_optim.errors import InvalidOption, listing
from lightning_optim.table._convert import convert, type_name
from lightning_optim.table._misnomers import refuse_option

# Separators other than the comma.
_SEPARATOR = re.compile(r"([;\s])\s*[A-Za-z_]\w*\s*=")
_OPENING, _CLOSING, _QUOTES = "([{", ")]}", "'\""

#: What a matrix is to a model if it is not hidden.
Role = Literal["embedding", "output"]
Scope = Literal["group", "constructor", "policy", "layerwise"]
OptionsT = TypeVar("OptionsT", bound="Options")


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers; ``None`` leaves a side unbounded."""

    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        if not -math.inf < value < math.inf:
            return False
        if self.low is not None and (value < self.low or (self.low_open and value == self.low)):
            return False
        return not (self.high is not None and (value > self.high or (self.high_open and value == self.high)))

    def __str__(self) -> str:
        left = "" if self.low is None else f"{self.low:g} {'<' if self.low_open else '<='} "
        right = "" if self.high is None else f" {'<' if self.high_open else '<='} {self.high:g}"
        return f"{left}value{right}"


NON_NEGATIVE = Range(low=0.0)
POSITIVE = Range(low=0.0, low_open=True)
AT_LEAST_ONE = Range(low=1.0)
UNIT = Range(low=0.0, high=1.0, high_open=True)
OPEN_UNIT = Range(low=0.0, high=1.0, low_open=True, high_open=True)


@dataclass(frozen=True)
class Options:
    """Base of every row's options; the subclasses' fields are made by :func:`option`."""

    #: The argument that holds the options, for error texts.
    kind: ClassVar[str] = "optim_args"
    #: Names of options that only matter for parameters whose gradients are projected.
    only_projected: ClassVar[frozenset[str]] = frozenset()
    #: Names of options that a state's meaning depends on, not just its content: they cannot change while it is kept.
    bound_to_state: ClassVar[frozenset[str]] = frozenset()

    def check(self) -> None:
        """Raises :class:`InvalidOption` for values that cannot work together."""

    def default_lr(self, default: float | None) -> float | None:
        """Returns the default learning rate; ``default`` is the row's."""
        return default

    def for_role(self, role: Role) -> dict[str, Any]:
        """Returns what an optimizer for all matrices sets for those of a role."""
        return {}

    def settled(self) -> Self:
        """Returns the options with defaults that depend on other options filled in, for the report."""
        return self

    def select(self, *scopes: Scope) -> dict[str, Any]:
        """Returns the options of the given scopes as keyword arguments."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata["scope"] in scopes
        }


def option(default: Any, help: str, range: Range | None = None, scope: Scope = "group") -> Any:
    """Declares an option of a row.

    Args:
        default: The default, usually the upstream library's.
        help: One line for ``lightning-optim info`` and the docs.
        range: Allowed values of a number, or of each number in a tuple.
        scope: ``"group"``: an argument of the constructor that may also differ between param groups;
            ``"constructor"``: one value for the whole optimizer; ``"policy"``: used when parameters are grouped, not
            passed on; ``"layerwise"``: how the optimizer is stepped during backward, not passed on.
    """
    return dataclasses.field(default=default, metadata={"help": help, "range": range, "scope": scope})


def required(help: str, range: Range | None = None, scope: Scope = "group") -> Any:
    """Declares an option without a default."""
    return dataclasses.field(metadata={"help": help, "range": range, "scope": scope})


@dataclass(frozen=True)
class OptionInfo:
    """One option as ``info``, the docs and error texts show it."""

    name: str
    type: str
    default: Any
    range: str
    help: str
    scope: Scope

    def __str__(self) -> str:
        bounds = f", {self.range}" if self.range else ""
        default = "required" if self.default is dataclasses.MISSING else f"default {self.default!r}"
        return f"{self.name}: {self.type} ({default}{bounds})"


def describe(options: type[Options]) -> list[OptionInfo]:
    """Returns the declared options in order of declaration."""
    hints = typing.get_type_hints(options)
    return [
        OptionInfo(
            name=field.name,
            type=type_name(hints[field.name]),
            default=field.default,
            range=str(field.metadata["range"] or ""),
            help=field.metadata["help"],
            scope=field.metadata["scope"],
        )
        for field in dataclasses.fields(options)
    ]


def parse(options: type[OptionsT], raw: Mapping[str, Any] | str | None, owner: str) -> OptionsT:
    """Turns what a user wrote into the row's options.

    Args:
        options: The row's dataclass.
        raw: A mapping, a string ``"key=value,key=value"`` as in Hugging Face's Trainer, or ``None``. Strings inside a
            mapping are parsed by the option's type, too. If the row has ``betas``, single ``beta1``, ``beta2`` and
            ``beta3`` are understood.
        owner: The identifier, for error texts.

    Raises:
        InvalidOption: For an unknown key, a value of the wrong type or out of range, or a malformed string.
    """
    given = _merge_single_betas(options, as_mapping(raw, owner, options.kind), owner)
    values = {name: coerce(options, name, value, owner) for name, value in given.items()}
    missing = [
        field.name
        for field in dataclasses.fields(options)
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        raise InvalidOption(f"{owner!r} needs {listing(missing)} in {options.kind}; {_allowed(options)}", code="LO202")
    parsed = options(**values)
    try:
        parsed.check()
    except InvalidOption as error:
        raise InvalidOption(f"{options.kind} of {owner!r}: {error.text}", code=error.codes) from None
    return parsed


def as_mapping(raw: Mapping[str, Any] | str | None, owner: str, kind: str = Options.kind) -> dict[str, Any]:
    """Returns the options as a user wrote them, a string or a mapping, as a new dict of unconverted values."""
    if isinstance(raw, str):
        return dict(split(raw, owner))
    if raw is not None and not isinstance(raw, Mapping):
        raise InvalidOption(
            f"{kind}={raw!r} ({type(raw).__name__}), given to {owner!r}, is neither a mapping nor a string "
            "'name=value,...'",
            code="LO203",
        )
    return dict(raw or {})


def split(text: str, owner: str) -> dict[str, str]:
    """Splits ``"rank=64,betas=(0.9, 0.99)"`` at commas outside of brackets and quotes."""
    pairs: dict[str, str] = {}
    depth, start, quote = 0, 0, ""
    pieces = []
    for index, character in enumerate(text + ","):
        if character in _QUOTES and quote in ("", character):
            quote = "" if quote else character
        if quote:
            continue
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth < 0:
            break
        if character == "," and depth == 0:
            pieces.append(text[start:index])
            start = index + 1
    if depth != 0 or quote:
        raise InvalidOption(
            f"unbalanced {'quotes' if quote else 'brackets'} in {text!r}, given to {owner!r}", code="LO205"
        )
    for piece in pieces:
        if not piece.strip():
            continue
        key, equals, value = piece.partition("=")
        if not equals or not key.strip():
            raise InvalidOption(
                f"cannot read {piece.strip()!r} in {text!r}, given to {owner!r}; {_instead_of(piece.strip(), pairs)}",
                code="LO205",
            )
        if (other := _SEPARATOR.search(value)) and value.strip()[:1] not in _OPENING + _QUOTES:
            raise InvalidOption(
                f"{other.group(1)!r} between the options in {text!r}, given to {owner!r}; separate them by commas: "
                f"'name=value,name=value'",
                code="LO205",
            )
        if key.strip() in pairs:
            raise InvalidOption(f"{key.strip()!r} is given twice in {text!r}, given to {owner!r}", code="LO206")
        pairs[key.strip()] = _unquoted(value.strip())
    return pairs


def coerce(options: type[Options], name: str, value: Any, owner: str) -> Any:
    """Returns ``value`` converted to the type of the option ``name``, with its range checked.

    Raises:
        InvalidOption: If the row has no such option, or the value does not fit.
    """
    fields = {field.name: field for field in dataclasses.fields(options)}
    if name not in fields:
        refuse_option(owner, name, value, fields, _allowed(options))
    hint_type = typing.get_type_hints(options)[name]
    bounds: Range | None = fields[name].metadata["range"]
    try:
        converted = convert(value, hint_type)
    except (ValueError, TypeError, SyntaxError):
        raise InvalidOption(
            f"{name}={value!r} ({type(value).__name__}) does not fit the option of {owner!r}: "
            f"{next(info for info in describe(options) if info.name == name)}",
            code="LO203",
        ) from None
    numbers = converted if isinstance(converted, tuple) else (converted,)
    for number in numbers:
        if bounds is not None and number is not None and number not in bounds:
            raise InvalidOption(
                f"{name}={value!r} of {owner!r} is out of range: allowed is {bounds}{_finite(number)} "
                f"({fields[name].metadata['help']})",
                code="LO204",
            )
    return converted


def as_number(name: str, value: Any, range: Range, optional: bool = True) -> float | None:
    """Checks a plain hyperparameter such as ``lr``; returns it as a float (``None`` stays ``None``)."""
    if value is None and optional:
        return None
    try:
        number: float = convert(value, float)
    except (ValueError, TypeError):
        raise InvalidOption(
            f"{name}={value!r} ({type(value).__name__}) is not a number: {range} is allowed", code="LO203"
        ) from None
    if number not in range:
        raise InvalidOption(f"{name}={value!r} is out of range: {range}{_finite(number)} is allowed", code="LO204")
    return number


def _finite(number: float) -> str:
    return "" if -math.inf < number < math.inf else " (finite)"


def _instead_of(piece: str, before: Mapping[str, str]) -> str:
    """Returns what to write instead of an option without a name."""
    if piece.isidentifier():
        return f"write '{piece}=True', or another value, as in 'name=value,name=value'"
    last = next(reversed(list(before)), None)
    if last is not None:
        return f"several values go into brackets: '{last}=({before[last]}, {piece})'"
    return "write 'name=value,name=value'"


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] in _QUOTES and text[0] == text[-1]
    return text[1:-1] if quoted else text


def _allowed(options: type[Options]) -> str:
    infos = describe(options)
    if not infos:
        return "It takes no options."
    return "Allowed: " + "; ".join(str(info) for info in infos) + "."


def _merge_single_betas(options: type[Options], given: dict[str, Any], owner: str) -> dict[str, Any]:
    """Folds ``beta1=0.9`` into ``betas``, as Hugging Face does for AdEMAMix."""
    fields = {field.name: field for field in dataclasses.fields(options)}
    if "betas" not in fields:
        return given
    default: Any = fields["betas"].default
    if not isinstance(default, tuple):
        # By dotted path, betas may be required or a single number.
        return given
    betas = list(default)
    names = [f"beta{index + 1}" for index in range(len(betas)) if f"beta{index + 1}" in given]
    if not names:
        return given
    if "betas" in given:
        raise InvalidOption(f"{owner!r} got both 'betas' and {listing(names)}; give one of them", code="LO206")
    merged = {key: value for key, value in given.items() if key not in names}
    for name in names:
        betas[int(name[-1]) - 1] = as_number(name, given[name], UNIT, optional=False)
    merged["betas"] = tuple(betas)
    return merged
