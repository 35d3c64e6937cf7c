"""Blocks of prompts on disk: read directly, several at once; written by a thread, while answers go on."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from queue import Queue

import numpy as np
import torch
from torch import Tensor

from outsize.errors import OutsizeError, PackError
from outsize.kernels.backend import Backend
from outsize.log import warn
from outsize.pack.tables import aligned
from outsize.prefix.file import SUFFIX, name_of, opened, remove, write
from outsize.prefix.folder import PART, take_room
from outsize.storage.buffers import buffer, huge_bytes
from outsize.storage.file import PAGE
from outsize.storage.reader import Reader
from outsize.storage.stats import IOStats
from outsize.storage.table import Table
from outsize.storage.tickets import Ticket

AHEAD = 2  # blocks that are read while another one is copied
QUEUED = 1  # blocks that wait for the one that is written
_numbers = count()


def staging_bytes(block: int) -> int:
    """Memory for blocks on their way, where one has so many bytes: being read; or being made, waiting and
    being written."""
    return (1 + max(AHEAD, QUEUED + 1)) * huge_bytes(aligned(block, PAGE))


@dataclass(slots=True)
class Traffic:
    """Bytes of blocks that one request had read and written."""

    read: int = 0
    written: int = 0
    since: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a block (L, C, chunk, E)."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


Pending = tuple[bytes, Table | None, Tensor, Ticket | None]


class DiskBlocks:
    """Blocks of one shape, in a folder that others may use, too."""

    def __init__(self, folder: Path, most: int, daily: int, is_writable: bool) -> None:
        self._folder, self._most, self._daily = folder, most, daily
        self._is_writable, self._stats = is_writable, IOStats()
        self._queue: Queue[tuple[bytes, int, Tensor, Traffic] | None] = Queue(QUEUED)
        self._thread: threading.Thread | None = None
        self._has_said = False

    def path(self, key: bytes) -> Path:
        return self._folder / f"{name_of(key)}{SUFFIX}"

    def __contains__(self, key: bytes) -> bool:
        return self.path(key).exists()

    def read(
        self, keys: Sequence[bytes], shape: Shape, backend: Backend, traffic: Traffic
    ) -> Iterator[Tensor]:
        """The blocks of these names in order, up to the first that is not there or not sound."""
        waiting, left = deque[Pending](), deque(keys)
        with Reader(backend=backend) as reader:
            while left or waiting:
                while left and len(waiting) < AHEAD:
                    waiting.append(self._submit(reader, left.popleft(), shape.nbytes))
                block = self._finish(*waiting.popleft(), shape)
                if block is None:
                    break
                traffic.read += shape.nbytes
                yield block
            for pending in waiting:  # behind a gap
                self._finish(*pending, shape)

    def _submit(self, reader: Reader, key: bytes, nbytes: int) -> Pending:
        table = opened(self._folder, key, nbytes, self._stats)
        if table is None:
            return key, None, torch.empty(0, dtype=torch.uint8, device="cpu"), None
        raw, view = buffer(table.header.stride)
        return key, table, raw, reader.submit(table, 0, view)

    def _finish(
        self, key: bytes, table: Table | None, raw: Tensor, ticket: Ticket | None, shape: Shape
    ) -> Tensor | None:
        """A block that was asked for, once it is there."""
        if table is None or ticket is None:
            return None
        try:
            ticket.wait()
        except PackError:
            remove(self.path(key))
            return None
        except OutsizeError:
            return None
        finally:
            table.close()
        return raw[: shape.nbytes].view(shape.dtype).view(shape.sizes)

    def touch(self, keys: Sequence[bytes]) -> None:
        """A prompt's blocks were used now."""
        now = time.time()
        for number, key in enumerate(keys):
            with contextlib.suppress(OSError):
                _used(self.path(key), number, now)

    def fitting(self, nbytes: int) -> int:
        """How many blocks of so many bytes there is room for at all: of a longer prompt, the last ones would
        put out the first."""
        return self._most // (aligned(nbytes, PAGE) + PAGE)

    def put(self, key: bytes, number: int, block: Tensor, traffic: Traffic) -> None:
        """Have a prompt's block of this number written, once the thread has written those before it."""
        if not self._is_writable:
            return
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._serve, name="outsize-prefixes", daemon=True
            )
            self._thread.start()
        self._queue.put((key, number, block, traffic))

    def flush(self) -> None:
        """Wait until everything is written."""
        if self._thread is not None:
            self._queue.join()

    def close(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if self._is_writable:
                    self._write(*item)
            except OSError as e:
                self._stop(_reason(e))
            finally:
                del item  # its memory
                self._queue.task_done()
        self._queue.task_done()

    def _write(self, key: bytes, number: int, block: Tensor, traffic: Traffic) -> None:
        data = block.flatten().view(torch.uint8).numpy()
        path, size = self.path(key), aligned(data.nbytes, PAGE) + PAGE
        if path.exists():
            return
        if why := take_room(self._folder, size, self._most, self._daily):
            self._say(why)
            return
        part = path.with_suffix(f".{os.getpid()}-{next(_numbers)}{PART}")
        try:
            write(part, key, np.ascontiguousarray(data))
            _used(part, number, traffic.since)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        traffic.written += size

    def _stop(self, why: str) -> None:
        self._is_writable = False
        self._say(why)

    def _say(self, why: str) -> None:
        """Once: why something is not kept."""
        if not self._has_said:
            warn(f"the prefix cache in {self._folder} does not take this prompt: {why}")
        self._has_said = True


def _used(path: Path, number: int, when: float) -> None:
    """A prompt's block of this number was used then. Later ones are of no use without the first, which count
    as used last, and stay longest."""
    at = when - number / 1000
    os.utime(path, (at, at))


def _reason(e: OSError) -> str:
    if e.errno == errno.ENOSPC:
        return "the disk is full; make room, or `outsize cache clear`"
    return f"it cannot be written ({e.strerror})"
