"""Small record files, and a backend that fails as told."""

from __future__ import annotations

import errno
import os
import time
import zlib
from pathlib import Path

import torch

from outsize.pack.tables import PAGE, Matrix, TableHeader
from outsize.storage.file import File
from outsize.storage.stats import IOStats
from outsize.storage.table import Table

ROWS, WIDTH = 16, 128  # of fp32: two pages
STRIDE = ROWS * WIDTH * 4


def write_table(folder: Path, count: int, kind: str = "layers") -> TableHeader:
    """`count` records of random fp32 in `folder`/t.records."""
    generator = torch.Generator().manual_seed(count)
    raw = torch.randn(count, ROWS, WIDTH, generator=generator).numpy().tobytes()
    records = [raw[i * STRIDE : (i + 1) * STRIDE] for i in range(count)]
    (folder / "t.records").write_bytes(raw)
    keys = tuple(range(count)) if kind == "layers" else tuple(range(0, count * ROWS, ROWS))
    matrix = {"w": (Matrix("fp32", ROWS, WIDTH, 0),)}
    sums = tuple(zlib.crc32(r) for r in records)
    return TableHeader("t", kind, keys, STRIDE, matrix, sums, count * ROWS)


def open_table(folder: Path, header: TableHeader, verify: str = "first", **faults: object) -> Table:
    backend = Faulty(folder / header.file, **faults) if faults else None  # type: ignore[arg-type]
    return Table(folder, header, IOStats(), verify, backend)


class Faulty(File):
    """A file whose reads are short, fail, are slow, or have a bit flipped."""

    def __init__(
        self,
        path: Path,
        short: int = 0,
        errors: int = 0,
        flips: int = 0,
        bytes_per_s: float = 0.0,
        after: int = 0,
    ) -> None:
        super().__init__(path)
        self.short, self.errors, self.flips, self.after = short, errors, flips, after
        self.bytes_per_s, self.reads = bytes_per_s, 0

    def handle(self) -> int | None:
        return None

    def read(self, out: memoryview, offset: int) -> int:
        self.reads += 1
        if self.reads > self.after and self.errors:
            self.errors -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.reads > self.after and self.short and len(out) > PAGE:
            self.short -= 1
            out = out[:PAGE]
        got = super().read(out, offset)
        if self.reads > self.after and self.flips:
            self.flips -= 1
            out[got // 2] ^= 1
        if self.bytes_per_s:
            time.sleep(got / self.bytes_per_s)
        return got
