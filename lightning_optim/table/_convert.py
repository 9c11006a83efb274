"""Converts values as users write them, strings included, to the declared types of options."""

from __future__ import annotations

import ast
import math
import types
import typing
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal

import torch

_TRUE = ("true", "1", "yes", "y", "on", "t")
_FALSE = ("false", "0", "no", "n", "off", "f")


def convert(value: Any, hint: Any) -> Any:
    """Converts ``value`` to the type ``hint``; raises ValueError or TypeError rather than lose or guess anything."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return _literal(value) if isinstance(value, str) else value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, typing.get_args(hint))
    if origin is Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        # A dtype, as an object or as torch writes it.
        if isinstance(value, (str, torch.dtype)) and (name := str(value).removeprefix("torch.")) in choices:
            return name
        raise ValueError(value)
    if origin is tuple:
        return _convert_tuple(value, typing.get_args(hint))
    if hint is bool:
        return _convert_bool(value)
    if hint is str:
        if isinstance(value, str):
            return value
        raise TypeError(value)
    if isinstance(value, str):
        value = _literal(value.strip())
    # Real, not (int, float), to accept numpy's numbers.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(value)
    if hint is int:
        whole = value if isinstance(value, Integral) else float(value)
        if isinstance(whole, float) and not whole.is_integer():
            raise ValueError(value)
        return int(whole)
    assert hint is float, f"options of type {hint} are not supported"
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(value) from None
    if math.isnan(number):
        raise ValueError(value)
    return number


def _convert_union(value: Any, members: tuple[Any, ...]) -> Any:
    if type(None) in members and (
        value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null"))
    ):
        return None
    for member in members:
        if member is not type(None):
            try:
                return convert(value, member)
            except (ValueError, TypeError, SyntaxError):
                continue
    raise ValueError(value)


def _convert_tuple(value: Any, members: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = ast.literal_eval(value)
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != len(members):
        raise TypeError(value)
    return tuple(convert(item, member) for item, member in zip(value, members, strict=True))


def _convert_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _TRUE + _FALSE:
        return value.strip().lower() in _TRUE
    raise TypeError(value)


def _literal(text: str) -> Any:
    """Reads a Python literal; ``1e-3`` and ``inf`` are numbers, anything else stays a string."""
    try:
        return float(text) if text.lower().lstrip("+-") in ("inf", "infinity") else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def type_name(hint: Any) -> str:
    """Returns a type as a user reads it, such as ``(float, float)``."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(member) for member in typing.get_args(hint))
    if origin is Literal:
        return " | ".join(repr(choice) for choice in typing.get_args(hint))
    if origin is tuple:
        return f"({', '.join(type_name(member) for member in typing.get_args(hint))})"
    if hint is type(None):
        return "None"
    return getattr(hint, "__name__", str(hint))
