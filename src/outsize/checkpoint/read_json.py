"""JSON that others wrote: of bounded size, depth and number of values.

A value of two bytes becomes an object of a hundred, so the memory that the values would take is worked out
before they are made: from the commas, colons and brackets, those in strings included.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import cast

from outsize.checkpoint.bounded import read_regular
from outsize.errors import CheckpointError

MAX_JSON = 64 << 20  # bytes of a file; the largest tokenizer.json of the hub has 35 million
MAX_MEMORY = 192 << 20  # bytes that its text and values may take
MAX_DEPTH = 64
_WIDE = re.compile(rb"[\xf0-\xff]")
COSTS = {b"{": 232, b"[": 104, b",": 80, b":": 120}  # bytes of memory for each in the text


def fail(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path.name}: {problem}; the file is damaged: fetch it again")


def memory_of(raw: bytes | bytearray) -> int:
    """At most so many bytes does a JSON text take while it is read, beside `raw`."""
    width = 1 if raw.isascii() else 4 if _WIDE.search(raw) else 2  # of a character
    return width * len(raw) + len(raw) + sum(raw.count(mark) * c for mark, c in COSTS.items())


def loads(text: str | bytes | bytearray) -> object:
    """`json.loads` within bounds. Raises ValueError, whatever is wrong."""
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > 1 << 16 and (size := memory_of(raw)) > MAX_MEMORY:
        raise ValueError(
            f"its values would take about {size:,} bytes of memory, at most {MAX_MEMORY:,} are allowed"
        )
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _refuse_deep(value)
    return cast("object", value)


def _refuse_deep(value: object) -> None:
    """Level by level: what is as deep as the interpreter allows would fail those who walk it."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        )
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, object]:
    """A JSON object from a file of bounded size. Raises CheckpointError."""
    return parse_json(path, read_regular(path, limit))


def parse_json(path: Path, raw: bytes | bytearray) -> dict[str, object]:
    try:
        value = loads(raw)
    except ValueError as e:
        said = str(e) if type(e) is ValueError else type(e).__name__
        raise fail(path, f"not JSON ({said})") from None
    if not isinstance(value, dict):
        raise fail(path, f"the JSON is a {type(value).__name__}, not an object")
    return cast("dict[str, object]", value)


def optional_json(path: Path) -> dict[str, object]:
    """What `read_json` gives; nothing where there is no such file."""
    return read_json(path) if path.is_file() else {}
