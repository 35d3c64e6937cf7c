"""A table: equally long records in one file, read whole, checked, and counted."""

from __future__ import annotations

import os
import threading
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from outsize.encoding.find import encoding
from outsize.encoding.plain import Encoding, Fields
from outsize.errors import PackError
from outsize.native.kernels import Kernels
from outsize.pack.format import Matrix, TableHeader, damaged, field_bytes


@dataclass(slots=True)
class Traffic:
    """What was read. Shared by the tables of one model."""

    bytes_read: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, size: int) -> None:
        with self.lock:
            self.bytes_read += size


@dataclass(frozen=True, slots=True)
class Weight:
    """One encoded matrix in memory. Rows beyond `num_rows` are padding."""

    encoding: Encoding
    fields: Fields
    num_rows: int

    @property
    def is_padded(self) -> bool:
        return self.encoding.stored_rows(self.fields) != self.num_rows


Weights = dict[str, tuple[Weight, ...]]


class Table:
    """The records of one file. Law: the same bytes twice; a bad checksum names file and record."""

    def __init__(self, folder: Path, header: TableHeader, traffic: Traffic) -> None:
        self.header, self.traffic, self.folder = header, traffic, folder
        self._handle = os.open(folder / header.file, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self.header.keys)

    def close(self) -> None:
        os.close(self._handle)

    def read(self, index: int, out: memoryview) -> None:
        """Fill `out` (stride bytes) with a record. Thread-safe. Raises PackError."""
        header, done = self.header, 0
        start = index * header.stride
        while done < header.stride:
            got = os.preadv(self._handle, [out[done:]], start + done)
            if got == 0:
                raise self._damaged(index, f"ends {header.stride - done:,} bytes early")
            done += got
        self.traffic.count(done)
        if zlib.crc32(out) != header.checksums[index]:
            raise self._damaged(index, "does not match its checksum")

    def _damaged(self, index: int, problem: str) -> PackError:
        header = self.header
        where = f"record {index} at byte {index * header.stride:,} of {header.file}"
        return damaged(self.folder, f"{where} {problem}")


def buffer(size: int) -> tuple[Tensor, memoryview]:
    """A byte tensor, and the same bytes as a memoryview to read into."""
    raw = torch.empty(size, dtype=torch.uint8)
    return raw, memoryview(raw.numpy().data)


def view(raw: Tensor, matrix: Matrix, kernels: Kernels | None) -> Weight:
    """A matrix's fields as views of its record: no copy."""
    fields = {}
    for (name, spec), offset in zip(matrix.specs.items(), matrix.offsets().values(), strict=True):
        fields[name] = raw[offset : offset + field_bytes(spec)].view(spec.dtype).view(spec.shape)
    return Weight(encoding(matrix.encoding, kernels), fields, matrix.num_rows)
