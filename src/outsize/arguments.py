"""Arguments as callers give them: of the right kind, or refused by one sentence that names the argument, what
it was given, and what it takes. Numbers may be numpy's."""

from __future__ import annotations

import numbers
import os
from collections.abc import Mapping
from pathlib import Path

from outsize.errors import OptionError

SHOWN = 80  # characters of a value that a message quotes


def wrong(name: str, value: object, expected: str) -> OptionError:
    """The refusal."""
    shown = repr(value)
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}... ({len(shown):,} characters)"
    return OptionError(f"{name} is {shown}; {expected} is expected")


def whole(name: str, value: object, low: int, high: int) -> int:
    """A whole number in a range; True and False are none. Raises OptionError."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or not low <= int(value) <= high:  # type: ignore[call-overload]
        raise wrong(name, value, f"a whole number from {low:,} to {high:,}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def real(name: str, value: object, low: float, high: float) -> float:
    """A number in a range. Raises OptionError."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_real or not low <= float(value) <= high:  # type: ignore[arg-type]
        raise wrong(name, value, f"a number from {low:,} to {high:,}")
    return float(value)  # type: ignore[arg-type]


def share(name: str, value: object) -> str | float:
    """A word or a number. Raises OptionError."""
    is_one = isinstance(value, str | numbers.Real) and not isinstance(value, bool)
    if not is_one or value == "":
        raise wrong(name, value, "a word, or a number above 0 and up to 1")
    return value  # type: ignore[return-value]


def flag(name: str, value: object) -> bool:
    """Raises OptionError."""
    if not isinstance(value, bool):
        raise wrong(name, value, "True or False")
    return value


def text(name: str, value: object, expected: str = "a string") -> str:
    """Raises OptionError."""
    if not isinstance(value, str):
        raise wrong(name, value, expected)
    return value


def word(name: str, value: object, expected: str = "a string") -> str:
    """A text that may become the name of a file. Raises OptionError."""
    if "\0" in text(name, value, expected):
        raise wrong(name, value, f"{expected} without NUL characters")
    return str(value)


def place(name: str, value: object, expected: str = "a path") -> str:
    """A path, as a string or as pathlib has it. Raises OptionError."""
    return word(name, os.fspath(value) if isinstance(value, os.PathLike) else value, expected)


def path(name: str, value: object) -> Path:
    """A path that the system can look up, of this user where it begins with ~. Raises OptionError."""
    told = place(name, value)
    try:
        found = Path(told).expanduser()
        found.exists()
    except (OSError, RuntimeError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise wrong(name, told, f"a path that can be looked up ({why})") from None
    return found


def mapping(name: str, value: object, expected: str) -> Mapping[str, object]:
    """With keys that are strings. Raises OptionError."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise wrong(name, value, expected)
    return value


def function(name: str, value: object) -> None:
    """Something to call, or None. Raises OptionError."""
    if value is not None and not callable(value):
        raise wrong(name, value, "a function")


def strings(name: str, value: object) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(s, str) for s in items):
        raise wrong(name, value, "a string or a list of strings")
    return tuple(items)


def schema(value: object) -> Mapping[str, object] | None:
    """A JSON schema; True is the one of any JSON."""
    if value is None or value is True:
        return None if value is None else {}
    return mapping("schema", value, "a JSON schema as a dict, or True for any JSON")


def biases(value: object) -> Mapping[int, float] | None:
    """By token id: from -100 to 100, as OpenAI's."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise wrong("logit_bias", value, "a dict with numbers by token id")
    return {
        whole("a token of logit_bias", k, 0, 1 << 31): real(
            "a bias of logit_bias", v, -100.0, 100.0
        )
        for k, v in value.items()
    }


def adapter_names(value: object) -> str | tuple[str | None, ...] | None:
    """Of adapters."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(s, str | None) for s in value):
        raise wrong(
            "adapter", value, "an adapter's name, or a list with one (or None) for each prompt"
        )
    return tuple(value)
