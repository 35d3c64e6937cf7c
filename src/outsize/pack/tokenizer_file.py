"""A pack's tokenizer.json, compressed: gzip, a third of the text. Packs of before have it as it is.

Hostile as any other file of a pack: its length, which the planner counts with, is what its last bytes say, is
bounded, and must hold when it is read.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from outsize.checkpoint.read_json import MAX_JSON

NAME, PLAIN = "tokenizer.json.gz", "tokenizer.json"
LEVEL = 6  # higher ones take three times as long for 1 % less
_LENGTH = 4  # bytes at the end of a gzip file: the text's length


def write(folder: Path, text: bytes) -> None:
    (folder / NAME).write_bytes(gzip.compress(text, LEVEL, mtime=0))


def read(folder: Path) -> bytes:
    """The text; nothing where it cannot be read, or is longer than said."""
    path = folder / NAME
    if not path.is_file():
        return (folder / PLAIN).read_bytes()
    try:
        stream = zlib.decompressobj(wbits=31)
        text = stream.decompress(path.read_bytes(), size(folder) + 1)
    except zlib.error:
        return b""
    return text if stream.eof and len(text) == size(folder) else b""


def size(folder: Path) -> int:
    """Bytes of the text. Raises OSError."""
    path = folder / NAME
    if not path.is_file():
        return (folder / PLAIN).stat().st_size
    with open(path, "rb") as file:
        file.seek(-min(_LENGTH, path.stat().st_size), 2)
        return int.from_bytes(file.read(_LENGTH), "little")


def is_sized(folder: Path) -> bool:
    """Is it there, and not too long?"""
    try:
        return size(folder) <= MAX_JSON and _stored(folder).stat().st_size <= MAX_JSON
    except OSError:
        return False


def _stored(folder: Path) -> Path:
    found = folder / NAME
    return found if found.is_file() else folder / PLAIN
