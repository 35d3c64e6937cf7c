"""A block of keys and values as a file: a record padded to whole pages, then a page that says what it is.

The last page comes last, so that a file cut short has none; the record's checksum is in it. What does not
match in every respect is no block: a miss, never an answer.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outsize.pack.tables import TableHeader, aligned
from outsize.storage.buffers import buffer
from outsize.storage.file import PAGE, File
from outsize.storage.stats import IOStats
from outsize.storage.table import Table

SUFFIX = ".records"  # as `TableHeader.file` has it
MAGIC, VERSION = b"outsizeK", 1
_LAST = struct.Struct("<8sIIQ32s")  # magic, version, checksum of the record, its bytes, its name
_SUM = struct.Struct("<I")  # of all that


def name_of(key: bytes) -> str:
    return key.hex()


def last_page(key: bytes, data: NDArray[np.uint8], size: int) -> bytes:
    """What a file of these `size` padded bytes ends with."""
    crc = zlib.crc32(bytes(size - data.nbytes), zlib.crc32(data.data))
    said = _LAST.pack(MAGIC, VERSION, crc, data.nbytes, key)
    return (said + _SUM.pack(zlib.crc32(said))).ljust(PAGE, b"\0")


def write(part: Path, key: bytes, data: NDArray[np.uint8]) -> None:
    """A new file that only this process knows of. Raises OSError."""
    size = aligned(data.nbytes, PAGE)
    with open(part, "xb") as file:
        os.chmod(part, 0o600)  # what was asked can be read off it
        file.write(data.data)
        file.write(bytes(size - data.nbytes))
        file.write(last_page(key, data, size))


def opened(folder: Path, key: bytes, nbytes: int, stats: IOStats) -> Table | None:
    """The file of a block of so many bytes, as a table of one record; None: there is none. One that is not
    what it must be is removed: it would be looked at each time."""
    name, size = name_of(key), aligned(nbytes, PAGE)
    path = folder / f"{name}{SUFFIX}"
    try:
        file = File(path)
    except OSError:
        return None
    crc = _checked(file, key, nbytes, size)
    if crc is None:
        file.close()
        remove(path)
        return None
    header = TableHeader(name, "prefix", (0,), size, {}, (crc,))
    return Table(folder, header, stats, "always", file)


def remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _checked(file: File, key: bytes, nbytes: int, size: int) -> int | None:
    """The record's checksum, if the last page is what it must be."""
    page, view = buffer(PAGE)
    try:
        whole = file.stamp()[0] == size + PAGE and file.read(view, size) == PAGE
    except OSError:
        return None
    raw = page.numpy().tobytes()
    said, summed = raw[: _LAST.size], raw[_LAST.size : _LAST.size + _SUM.size]
    if not whole or _SUM.pack(zlib.crc32(said)) != summed:
        return None
    magic, version, crc, there, name = _LAST.unpack(said)
    good = (magic, version, there, name) == (MAGIC, VERSION, nbytes, key)
    return int(crc) if good else None
