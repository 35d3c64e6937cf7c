"""The values of a GGUF's header, read one after the other, each within the bounds of its file."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np

from outsize.checkpoint.checkpoint import pread
from outsize.errors import CheckpointError

MAX_VALUE = 16 << 20  # bytes of one string or list of numbers
MAX_MEMORY = (
    128 << 20
)  # bytes that a header's values may take; the largest vocabularies take 60 million
ITEM = 88  # bytes that the shortest string takes, and its place in a list
ARRAY_ITEM = 200  # and a list in a list
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
        self.kept = 0  # bytes of memory that the values so far take

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
        if count > MAX_VALUE:
            raise self.fail(f"{what} is {count:,} bytes long, at most {MAX_VALUE:,} are allowed")
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

    def keep(self, size: int) -> None:
        """Count bytes of memory that values take, or are going to take."""
        self.kept += size
        if self.kept > MAX_MEMORY:
            raise self.fail(f"a header whose values take more than {MAX_MEMORY:,} bytes of memory")

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.number("Q", what)
        if limit is not None and length > limit:
            raise self.fail(f"{what} is {length:,} bytes long, at most {limit:,} are allowed")
        text = self.take(length, what).decode("utf-8", "replace")
        self.keep(sys.getsizeof(text))
        return text

    def strings(self, count: int, what: str) -> list[str]:
        """The hot loop of a header: up to half a million short strings."""
        if count * 8 > self.size - self.offset:
            raise self.fail(f"{what} claims {count:,} strings, which the file cannot hold")
        self.keep(count * ITEM)
        out, unpack = [], struct.Struct("<Q").unpack_from
        before = self.offset + 8 * count
        for _ in range(count):
            self.need(8, what)
            (length,) = unpack(self.window, self.at)
            self.at += 8
            self.need(length, what)
            out.append(self.window[self.at : self.at + length].decode("utf-8", "replace"))
            self.at += length
            if length > ITEM:
                self.keep(sys.getsizeof(out[-1]))
        self.keep(self.offset - before)
        return out

    def array(self, what: str, depth: int) -> object:
        kind, count = self.number("I", what), self.number("Q", what)
        if kind == STRING:
            return self.strings(count, what)
        if kind == ARRAY:
            return self.nested(count, what, depth + 1)
        dtype = self.scalar(kind, what)
        self.keep(count * dtype.itemsize)
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)

    def nested(self, count: int, what: str, depth: int) -> object:
        if depth > MAX_DEPTH:
            raise self.fail(f"{what} nests arrays deeper than {MAX_DEPTH}")
        if count * 12 > self.size - self.offset:
            raise self.fail(f"{what} claims {count:,} arrays, which the file cannot hold")
        self.keep(count * ARRAY_ITEM)
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
