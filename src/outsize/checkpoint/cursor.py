"""The values of a GGUF's header, read one after the other, each within the bounds of its file."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from outsize.checkpoint.foreign import pread
from outsize.errors import CheckpointError

MAX_ITEMS = 3_000_000  # strings and arrays in one header; the largest vocabularies have 0.8 million
MAX_DEPTH = 4
WINDOW = 1 << 20

SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4",
    7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
STRING, ARRAY = 8, 9


class Cursor:
    """A bounds-checked walk over the header of one file, through a window of it."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size = file, path, size
        self.start, self.window, self.at = 0, b"", 0
        self.items = 0

    @property
    def offset(self) -> int:
        return self.start + self.at

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path.name}: {problem} (byte {self.offset:,} of {self.size:,}); "
            "the file is damaged or not a GGUF: fetch it again"
        )

    def need(self, count: int, what: str) -> None:
        """Have `count` more bytes in the window."""
        if count > self.size - self.offset:
            raise self.fail(f"{what} needs {count:,} bytes, {self.size - self.offset:,} are left")
        if self.at + count > len(self.window):
            self.start, self.at = self.offset, 0
            length = min(max(count, WINDOW), self.size - self.start)
            self.window = bytes(pread(self.file, self.start, length, what))

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        self.at += count
        return self.window[self.at - count : self.at]

    def number(self, kind: str, what: str) -> int:
        return int(struct.unpack("<" + kind, self.take(struct.calcsize(kind), what))[0])

    def count_item(self, number: int = 1) -> None:
        self.items += number
        if self.items > MAX_ITEMS:
            raise self.fail(f"more than {MAX_ITEMS:,} strings and arrays in the header")

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.number("Q", what)
        if limit is not None and length > limit:
            raise self.fail(f"{what} is {length:,} bytes long, at most {limit:,} are allowed")
        return self.take(length, what).decode("utf-8", "replace")

    def strings(self, count: int, what: str) -> list[str]:
        """The hot loop of a header: up to half a million short strings."""
        if count * 8 > self.size - self.offset:
            raise self.fail(f"{what} claims {count:,} strings, which the file cannot hold")
        self.count_item(count)
        out, unpack = [], struct.Struct("<Q").unpack_from
        for _ in range(count):
            self.need(8, what)
            (length,) = unpack(self.window, self.at)
            self.at += 8
            self.need(length, what)
            out.append(self.window[self.at : self.at + length].decode("utf-8", "replace"))
            self.at += length
        return out

    def array(self, what: str, depth: int) -> object:
        kind, count = self.number("I", what), self.number("Q", what)
        if kind == STRING:
            return self.strings(count, what)
        if kind == ARRAY:
            return self.nested(count, what, depth + 1)
        dtype = self.scalar(kind, what)
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)

    def nested(self, count: int, what: str, depth: int) -> object:
        if depth > MAX_DEPTH:
            raise self.fail(f"{what} nests arrays deeper than {MAX_DEPTH}")
        if count * 12 > self.size - self.offset:
            raise self.fail(f"{what} claims {count:,} arrays, which the file cannot hold")
        self.count_item(count)
        return [self.array(what, depth) for _ in range(count)]

    def scalar(self, kind: int, what: str) -> np.dtype[np.generic]:
        if kind not in SCALARS:
            raise self.fail(f"{what} has value type {kind}, which GGUF does not define")
        return np.dtype(SCALARS[kind])

    def value(self, what: str) -> object:
        kind = self.number("I", what)
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what, 0)
        dtype = self.scalar(kind, what)
        return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
