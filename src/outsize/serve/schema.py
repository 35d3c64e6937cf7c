"""What every request body is: JSON of known fields. Each field is honoured, or accepted at its neutral value
alone, or said to be without effect; none is ignored in silence.

null means absent. A field that is not known is an error that names it, or, with --lenient, is reported in a
header.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from outsize.options import near
from outsize.serve.errors import ApiError, invalid

DEPTH = 100  # of brackets in brackets
MOST_VALUES = (
    1_000_000  # counted by brackets and commas: each takes up to 64 bytes once it is parsed
)
MOST_OBJECTS = 200_000  # counted by braces: each takes up to 2 KB once its fields are checked
MOST_ENTRIES = 10_000  # of a dictionary whose values are checked
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
B = TypeVar("B", bound="Body")


class Body(BaseModel):
    """The base of all request bodies and their parts: unknown fields are kept apart (`model_extra`), so that
    they are refused by name or, with --lenient, reported."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


@dataclass(frozen=True, slots=True)
class Neutral:
    """Marks a field that outsize does not have: these values change nothing, and any other is refused."""

    values: tuple[object, ...]
    why: str = "outsize does not have it"


@dataclass(frozen=True, slots=True)
class NoEffect:
    """Marks a field that by its nature changes no answer here: accepted, and documented so."""


def few(value: object) -> object:
    """Of a dictionary, whose every wrong value pydantic notes: it is not large. Raises ValueError."""
    if isinstance(value, dict) and len(value) > MOST_ENTRIES:
        raise ValueError(f"{len(value):,} entries; at most {MOST_ENTRIES:,} are taken")
    return value


def parse(raw: bytes) -> dict[str, object]:
    """A JSON object, as strictly as JSON is defined. Raises ApiError."""
    if sum(raw.count(mark) for mark in (b"[", b"{", b",")) > MOST_VALUES:
        raise invalid(f"the body holds more than {MOST_VALUES:,} values")
    if raw.count(b"{") > MOST_OBJECTS:
        raise invalid(f"the body holds more than {MOST_OBJECTS:,} objects")
    try:
        made = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
        if SURROGATE.search(raw):
            json.dumps(made, ensure_ascii=False).encode("utf-8")
    except ApiError:
        raise
    except UnicodeError:
        raise invalid("the body is no UTF-8, or holds half of a surrogate pair") from None
    except RecursionError:
        raise invalid(f"the body is nested more than {DEPTH} deep") from None
    except ValueError as e:  # a JSONDecodeError, or a number of too many digits
        raise invalid(f"the body is not JSON: {e}") from None
    if not isinstance(made, dict):
        raise invalid("the body is JSON, but no object: {...} is expected")
    _check_depth(made)
    return made


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise invalid(f"the key {twice[:80]!r} is given twice", twice[:80])
    return made


def _no_constant(name: str) -> NoReturn:
    raise invalid(f"{name} is no JSON number")


def _check_depth(made: object) -> None:
    level = [made]
    for _ in range(DEPTH):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)  # type: ignore[attr-defined]
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise invalid(f"the body is nested more than {DEPTH} deep")


def read(raw: bytes, kind: type[B], lenient: bool) -> tuple[B, list[str]]:
    """A body of its kind, and the names of fields that are ignored. Raises ApiError."""
    given = parse(raw)
    try:
        body = kind.model_validate(given)
    except ValidationError as e:
        raise _refusal(e.errors(include_url=False, include_context=False), given) from None
    ignored = []
    for path, part in _parts(body, ""):
        ignored += [path + name for name, value in _extra(part).items() if value is not None]
        if ignored and not lenient:
            raise _unknown(ignored[0], type(part))
        _check_neutral(path, part)
    return body, ignored


def _extra(part: Body) -> dict[str, object]:
    return part.model_extra or {}


def _parts(body: Body, path: str) -> Iterator[tuple[str, Body]]:
    """A body and the bodies within it, each with what comes before its fields' names."""
    yield path, body
    for name in type(body).model_fields:
        value = getattr(body, name)
        if isinstance(value, Body):
            yield from _parts(value, f"{path}{name}.")
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                if isinstance(inner, Body):
                    yield from _parts(inner, f"{path}{name}.{i}.")


def _unknown(path: str, kind: type[Body]) -> ApiError:
    shown = path[:200]
    close = near(shown.rpartition(".")[2], list(kind.model_fields))
    hint = f"; did you mean {close!r}?" if close else ""
    return invalid(f"the field {shown!r} is not known{hint}", shown, "unsupported_parameter")


def _check_neutral(path: str, part: Body) -> None:
    """Raises ApiError for a field that is there, and that outsize does not have."""
    for name, field in type(part).model_fields.items():
        mark = next((m for m in field.metadata if isinstance(m, Neutral)), None)
        value = getattr(part, name)
        if mark is None or value is None or value in mark.values:
            continue
        name = field.alias or name
        allowed = " or ".join(json.dumps(v) for v in mark.values)
        way_out = f"leave it out, or give {allowed}" if allowed else "leave it out"
        raise invalid(f"{path}{name}: {mark.why}; {way_out}", path + name, "unsupported_parameter")


def _refusal(errors: list[ErrorDetails], given: object) -> ApiError:
    """What pydantic found, as one sentence about the first field that is wrong."""
    first = errors[0]["loc"]
    param = ".".join(_place(first, given))[:200]
    said = "; or ".join(dict.fromkeys(e["msg"] for e in errors if e["loc"][:1] == first[:1]))
    return invalid(f"{param}: {said[:400]}" if param else said[:400], param or None)


def _place(steps: Sequence[int | str], given: object) -> Iterator[str]:
    """The way to a field through a body, without the kinds that pydantic tried: "messages.0.content"."""
    for number, step in enumerate(steps):
        if isinstance(given, list) and isinstance(step, int) and step < len(given):
            given = given[step]
        elif isinstance(given, dict) and step in given:
            given = given[str(step)]
        elif not isinstance(given, dict) or number + 1 < len(steps):  # the last may be missing
            continue
        yield str(step)
