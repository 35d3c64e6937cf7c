"""JSON -> dataclasses, strictly: every value of the type that its field states, and no more.

A number is finite and fits 64 bits, true and false are no numbers, and a key that no field has is refused.
Errors are ValueErrors that name the place: `description.layers[3].window is "x", a whole number is due`.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

MOST = 1 << 64  # whole numbers are less, in both directions
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def read_fields(kind: Any, value: object, where: str, but: str = "") -> dict[str, Any]:
    """The fields of a dataclass, out of a JSON object; `but` one; what has a default may be left out.
    Raises ValueError."""
    if not isinstance(value, dict):
        raise _due(where, value, "an object")
    known = {name: hint for name, hint in _hints(kind).items() if name != but}
    for key in value:
        if key not in known:
            raise ValueError(f"{where or 'it'} has a key {str(key)[:80]!r} that is not known")
    for field in fields(kind):
        is_due = field.default is MISSING and field.default_factory is MISSING
        if is_due and field.name in known and field.name not in value:
            raise ValueError(f"{where or 'it'} has no {field.name!r}")
    prefix = f"{where}." if where else ""
    return {key: read(known[key], item, f"{prefix}{key}") for key, item in value.items()}


def read(kind: Any, value: object, where: str) -> Any:
    """A value of this type: a dataclass, a plain type, an optional one, tuples and mappings of them.
    Raises ValueError."""
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return kind(**read_fields(kind, value, where))  # type: ignore[operator]
    if origin in (types.UnionType, Union):
        (only,) = (k for k in inner if k is not types.NoneType)
        return None if value is None else read(only, value, where)
    if origin is tuple:
        return _tuple(inner, value, where)
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _due(where, value, "an object")
        return {key: read(inner[1], item, f"{where}.{key[:80]}") for key, item in value.items()}
    return _plain(kind, value, where)


def _tuple(kinds: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _due(where, value, "a list")
    if kinds[-1] is Ellipsis:
        return tuple(read(kinds[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(kinds):
        raise _due(where, value, f"a list of {len(kinds)}")
    pairs = zip(kinds, value, strict=True)
    return tuple(read(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(pairs))


def _plain(kind: type[Any], value: object, where: str) -> Any:
    if kind is float and type(value) is int and -MOST < value < MOST:
        return float(value)
    if type(value) is not kind or (kind is int and not -MOST < value < MOST):  # type: ignore[operator]
        raise _due(where, value, NAMES[kind])
    if kind is float and not math.isfinite(value):  # type: ignore[arg-type]
        raise _due(where, value, "a finite number")
    return value


def _due(where: str, value: object, what: str) -> ValueError:
    return ValueError(f"{where} is {_short(value)}, {what} is due")


def _short(value: object) -> str:
    if isinstance(value, int) and not -MOST < value < MOST:
        return "a number of more than 64 bits"
    return repr(value)[:80] if isinstance(value, int | float | str | None) else type(value).__name__


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
