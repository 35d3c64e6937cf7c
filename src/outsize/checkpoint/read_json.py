"""JSON files of a checkpoint: of bounded size, and objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from outsize.checkpoint.foreign import file_size
from outsize.errors import CheckpointError

MAX_JSON = 128 << 20


def fail(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path.name}: {problem}; the file is damaged: fetch it again")


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, object]:
    """A JSON object from a file of bounded size. Raises CheckpointError."""
    size = file_size(path)
    if size > limit:
        raise fail(path, f"{size:,} bytes of JSON, at most {limit:,} are allowed")
    return parse_json(path, path.read_bytes())


def parse_json(path: Path, raw: bytes | bytearray) -> dict[str, object]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise fail(path, f"not JSON ({type(e).__name__})") from None
    if not isinstance(value, dict):
        raise fail(path, f"the JSON is a {type(value).__name__}, not an object")
    return cast("dict[str, object]", value)


def optional_json(path: Path) -> dict[str, object]:
    """What `read_json` gives; nothing where there is no such file."""
    return read_json(path) if path.is_file() else {}
