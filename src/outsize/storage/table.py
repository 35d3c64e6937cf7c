"""A record table: equally long records in one file. A record is the smallest thing that is moved between disk
and memory: a layer's attention or feed-forward, an expert, or a block of an embedding's rows. Records are
read whole or in part, compared with their checksums, and counted; `view` makes weights of the bytes.
"""

from __future__ import annotations

import threading
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from outsize.encoding.find import encoding
from outsize.encoding.plain import Encoding, Fields
from outsize.errors import OptionError, PackError, ReadError
from outsize.kernels.backend import Backend
from outsize.kernels.structs import Coded
from outsize.pack.format import damaged
from outsize.pack.tables import Matrix, TableHeader, field_bytes
from outsize.storage.file import PAGE, File
from outsize.storage.stats import IOStats

VERIFY = ("first", "always", "never")
RETRIES = 3


@dataclass(frozen=True, slots=True)
class Weight:
    """One encoded matrix in memory: encoding and stored fields. Rows beyond `num_rows` are padding."""

    encoding: Encoding
    fields: Fields
    num_rows: int

    @property
    def is_padded(self) -> bool:
        return self.encoding.stored_rows(self.fields) != self.num_rows

    def coded(self) -> Coded | None:
        """What kernels that run several matrices at once take; None if this one is not for them."""
        return None if self.is_padded else self.encoding.coded(self.fields)


Weights = dict[str, tuple[Weight, ...]]  # a record's tensors by name, each in one piece or several


class Table:
    """The records of one file. Law: the same bytes twice; an error names file, record and offset.

    `verify` says when checksums are compared: at the "first" read of each record, "always" or "never"."""

    def __init__(
        self,
        folder: Path,
        header: TableHeader,
        stats: IOStats,
        verify: str = "first",
        file: File | None = None,
    ) -> None:
        if verify not in VERIFY:
            raise OptionError(f"verify is {verify!r}; known are {', '.join(VERIFY)}")
        self.header, self.stats, self.folder, self._verify = header, stats, folder, verify
        self.bytes_of = array(
            "q", bytes(8 * len(header.keys))
        )  # by record: read so far, for watchers
        self._file = file or _opened(folder / header.file)
        self._stamp = self._file.stamp()
        self._seen: set[int] = set()

    def __len__(self) -> int:
        return len(self.header.keys)

    def close(self) -> None:
        self._file.close()

    @property
    def is_direct(self) -> bool:
        """Do reads bypass the page cache?"""
        return self._file.is_direct

    def handle(self) -> int | None:
        """An open file for threads of C; None: read through `read`."""
        return self._file.handle()

    def count(self, index: int, size: int, requests: int = 1) -> None:
        """Add to the bytes read, in all and of this record, and to the requests. Thread-safe."""
        with self.stats.lock:
            self.stats.bytes_read += size
            self.stats.requests += requests
            self.bytes_of[index] += size

    def passed(self, index: int) -> None:
        """Remember that a record matched its checksum."""
        self._seen.add(index)

    def is_verified(self, index: int) -> bool:
        """May this record be read in part? False once the file has been written to."""
        if self._verify == "never":
            return True
        stamp = self._file.stamp()
        if stamp != self._stamp:
            self._seen = set()  # first: broken off here, it is looked at again
            self._stamp = stamp
        return index in self._seen and self._verify == "first"

    def read(self, index: int, out: memoryview) -> None:
        """Fill `out` (stride bytes) with a record, and check it. Raises PackError, ReadError."""
        self.read_part(index, out, 0)
        self.check(index, out)

    def read_part(self, index: int, out: memoryview, start: int) -> None:
        """Fill `out` from byte `start` of a record on. Thread-safe; tries again where that helps."""
        done, size = 0, len(out)
        while done < size:
            got = self._read(index, out[done:], start + done)
            if got < min(PAGE, size - done):  # of a page, the rest will never come
                raise self._damaged(index, f"ends {size - done - got:,} bytes early")
            done = size if done + got >= size else (done + got) // PAGE * PAGE
        self.count(index, size)

    def _read(self, index: int, out: memoryview, start: int) -> int:
        offset = index * self.header.stride + start
        for attempt in range(RETRIES + 1):
            try:
                return self._file.read(out, offset)
            except OSError as e:
                if attempt == RETRIES:
                    raise ReadError(
                        f"cannot read record {index} at byte {offset:,} of "
                        f"{self.folder / self.header.file}: {e.strerror or e}, {RETRIES + 1} times; "
                        "check the disk, or move the pack to another one"
                    ) from None
                threading.Event().wait(0.01 * 4**attempt)
        raise AssertionError

    def check(self, index: int, out: memoryview) -> None:
        """Compare a whole record with its checksum, as often as asked for; a record that does not
        match is read once more, since the error may have been on the way."""
        if self.is_verified(index):
            return
        if zlib.crc32(out) != self.header.checksums[index]:
            self.read_part(index, out, 0)
            if zlib.crc32(out) != self.header.checksums[index]:
                raise self._damaged(index, "does not match its checksum")
        self.passed(index)

    def _damaged(self, index: int, problem: str) -> PackError:
        header = self.header
        where = f"record {index} at byte {index * header.stride:,} of {header.file}"
        return damaged(self.folder, f"{where} {problem}")


def _opened(path: Path) -> File:
    """Raises ReadError: since the pack was found, its file may have gone, or become something else."""
    try:
        return File(path)
    except OSError as e:
        raise ReadError(
            f"{path} cannot be opened: {e.strerror or e}; is another process removing the pack?"
        ) from None


def view(raw: Tensor, matrix: Matrix, backend: Backend) -> Weight:
    """One matrix of a record: views of the record's bytes, no copy."""
    fields = {}
    for (name, spec), offset in zip(matrix.specs.items(), matrix.offsets().values(), strict=True):
        fields[name] = raw[offset : offset + field_bytes(spec)].view(spec.dtype).view(spec.shape)
    return Weight(encoding(matrix.encoding, backend), fields, matrix.num_rows)


def views(raw: Tensor, header: TableHeader, backend: Backend) -> Weights:
    """All tensors of a record, as views of its bytes."""
    return {k: tuple(view(raw, m, backend) for m in ms) for k, ms in header.tensors.items()}


def activation_type(matrices: Sequence[Matrix] | Sequence[Weight]) -> torch.dtype:
    """The type of activations: fp32 packs run in fp32, all others in bf16."""
    first = matrices[0]
    name = first.encoding if isinstance(first, Matrix) else first.encoding.name
    return torch.float32 if name == "fp32" else torch.bfloat16
